"""Where τ lives: in which dtype, on the device, in (page-locked) memory, or in a file that is mapped into it."""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
"""What ``bank.dtype`` may be."""


@dataclass(frozen=True)
class Rows:
    """Task vectors of some rows of one tensor, or of a part of one row, as stored.

    Attributes:
        values: (K, R, C), contiguous in the last two dimensions.
        scales: Factor of every row, (K, R), float32; None where values are what they say.
    """

    values: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, task_vectors: Mapping[str, Tensor], key: str) -> "Rows":
        """All of one tensor, as it lies in the bank."""
        if isinstance(task_vectors, StoredTaskVectors):
            values, scales = task_vectors.stored(key)
        else:
            values, scales = task_vectors[key], None
        return cls(values.reshape(values.shape[0], row_count(values.shape[1:]), -1), scales)

    def split(self, num_tasks: int) -> Iterator["Rows"]:
        """A few tasks at a time."""
        for first in range(0, len(self.values), num_tasks):
            some = slice(first, first + num_tasks)
            yield Rows(self.values[some], None if self.scales is None else self.scales[some])

    def to(self, device: torch.device) -> "Rows":
        """The same on ``device``."""
        scales = None if self.scales is None else self.scales.to(device, non_blocking=True)
        return Rows(self.values.to(device, non_blocking=True), scales)

    def part(self, run: slice) -> "Rows":
        """Some whole rows, or entries within one row, by their place among the flattened R·C."""
        columns = self.values.shape[2]
        first, offset = divmod(run.start, columns)
        rows = slice(first, max(first + 1, run.stop // columns))
        scales = None if self.scales is None else self.scales[:, rows]
        if run.stop - run.start < columns:
            return Rows(self.values[:, rows, offset : offset + run.stop - run.start], scales)
        return Rows(self.values[:, rows], scales)

    def widened(self, dtype: torch.dtype, block: int) -> Iterator[tuple[slice, Tensor]]:
        """Runs of about ``block`` of the n = R·C entries, each with its task vectors (K, run) in ``dtype``."""
        num_tasks, rows, columns = self.values.shape
        if self.scales is None:
            flat = self.values.reshape(num_tasks, -1)
            for start in range(0, flat.shape[1], block):
                part = slice(start, min(start + block, flat.shape[1]))
                yield part, flat[:, part].to(dtype)
            return
        step = max(1, block // columns)
        for first in range(0, rows, step):
            some = slice(first, min(first + step, rows))
            wide = self.values[:, some].to(dtype) * self.scales[:, some, None].to(dtype)
            yield slice(first * columns, some.stop * columns), wide.reshape(num_tasks, -1)


class StoredTaskVectors(Mapping[str, Tensor]):
    """Task vectors in a narrow dtype; reading one by key widens it to ``dtype``.

    Args:
        values: (K, *shape) by key, as stored.
        scales: Per key the factor of every row (K, R), R the first dimension (1 for vectors); None without.
        dtype: In which a tensor is read.
        mapped: Whether the values stay where they are, in a file, whatever device computes with them.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        scales: Mapping[str, Tensor] | None,
        dtype: torch.dtype,
        *,
        mapped: bool = False,
    ) -> None:
        self.values_by_key = dict(values)
        self.scales_by_key = None if scales is None else dict(scales)
        self._dtype, self._stays = dtype, mapped

    @classmethod
    def empty(
        cls,
        shapes: Mapping[str, torch.Size],
        num_tasks: int,
        stored: torch.dtype,
        dtype: torch.dtype,
        file: Path | None,
    ) -> "StoredTaskVectors":
        """Room for ``num_tasks`` task vectors in ``stored``; in ``file``, mapped into memory, if one is given."""
        sizes = {key: num_tasks * shape.numel() for key, shape in shapes.items()}
        if file is None:
            flat = {key: torch.empty(size, dtype=stored) for key, size in sizes.items()}
        else:
            total = sum(sizes.values())
            with file.open("r+b") as handle:  # room now: a page that finds none later kills the process
                os.posix_fallocate(handle.fileno(), 0, max(1, total * stored.itemsize))
            whole = torch.from_file(str(file), shared=True, size=total, dtype=stored)
            flat = dict(zip(sizes, whole.split(list(sizes.values())), strict=True))
        values = {key: tensor.view(num_tasks, *shapes[key]) for key, tensor in flat.items()}
        scales = None
        if stored == torch.int8:
            scales = {key: torch.ones(num_tasks, row_count(shape)) for key, shape in shapes.items()}
        return cls(values, scales, dtype, mapped=file is not None)

    def store(self, key: str, task: int | slice, task_vectors: Tensor) -> None:
        """Write task vectors (*shape or K', *shape), rounded to the stored dtype; int8 rounds to 127ths of a row's
        largest magnitude."""
        target = self.values_by_key[key][task]
        if self.scales_by_key is None:
            target.copy_(task_vectors)
            return
        scales = self.scales_by_key[key][task]  # (…, R)
        rows = task_vectors.reshape(*scales.shape, -1)
        largest = rows.abs().amax(-1)
        scales.copy_(torch.where(largest > 0, largest / 127, 1.0))
        target.copy_((rows / scales[..., None]).round_().reshape(target.shape))

    def stored(self, key: str) -> tuple[Tensor, Tensor | None]:
        """Values (K, *shape) and factors of rows (K, R) of one tensor, as they lie there."""
        return self.values_by_key[key], None if self.scales_by_key is None else self.scales_by_key[key]

    def __getitem__(self, key: str) -> Tensor:
        values, scales = self.stored(key)
        if scales is None:
            return values.to(self._dtype)
        return (values.to(self._dtype).view(*scales.shape, -1) * scales[..., None].to(self._dtype)).view(values.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)

    def pin(self) -> None:
        """Move everything into page-locked memory, where it stays whatever device computes with it.

        It is one block, registered with the driver: torch's own page-locked tensors are rounded up to powers of two.
        Without CUDA nothing happens.

        Raises:
            ConfigError: If the system does not lock so much.
        """
        if not torch.cuda.is_available():
            return
        places = [tensors for tensors in (self.values_by_key, self.scales_by_key) if tensors is not None]
        sizes = [-(-tensor.nbytes // 64) * 64 for tensors in places for tensor in tensors.values()]
        block = torch.empty(sum(sizes), dtype=torch.uint8)
        rooms = iter(block.split(sizes))
        for tensors in places:
            for key, old in tensors.items():  # one at a time, so that nothing but one tensor exists twice
                tensors[key] = next(rooms)[: old.nbytes].view(old.dtype).view(old.shape).copy_(old)
        runtime: Any = torch.cuda.cudart()
        if error := int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)):
            raise ConfigError(
                f"bank.device=host: {block.nbytes / 2**30:.1f} GiB of task vectors cannot be locked in memory (CUDA "
                f"error {error}). Narrow them with bank.dtype, or use bank.device=disk."
            )
        weakref.finalize(self, _unlock, runtime, block.data_ptr()).atexit = False
        self._stays = True

    def to(self, device: torch.device | str) -> "StoredTaskVectors":
        """The same on ``device``; itself where the values stay in a file or in page-locked memory."""
        if self._stays:
            return self
        values = {key: tensor.to(device) for key, tensor in self.values_by_key.items()}
        scales = self.scales_by_key and {key: tensor.to(device) for key, tensor in self.scales_by_key.items()}
        return StoredTaskVectors(values, scales, self._dtype)


def _unlock(runtime: Any, address: int) -> None:
    """Undo the registration of page-locked memory, when no copy out of it is on its way."""
    torch.cuda.synchronize()
    runtime.cudaHostUnregister(address)


def row_count(shape: Sequence[int]) -> int:
    """Rows of a tensor of ``shape``: its first dimension, one for vectors and scalars."""
    return shape[0] if len(shape) > 1 else 1


def dtype_named(name: str) -> torch.dtype:
    """Look a storage dtype up.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in DTYPES:
        raise ConfigError(f"unknown bank.dtype '{name}'. Choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]
