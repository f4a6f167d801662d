"""Weights at rest: the pretrained tensors and, per tensor, the task vectors of all experts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from adamerge.bank.checkpoints import hash_tensors, read_checkpoint
from adamerge.bank.keys import TOWER
from adamerge.bank.storage import StoredTaskVectors
from adamerge.errors import CheckpointError, ConfigError, KeyMismatchError, shortlist

Expert = Path | Mapping[str, Tensor]
ApplyTransform = Callable[[str, Tensor], Tensor]
"""``(key, task vectors (K, *shape)) -> transformed task vectors (K, *shape)``, a new tensor."""


@dataclass(frozen=True, eq=False)
class ParameterBank:
    """θ₀ and τ, checked once.

    Attributes:
        pretrained: The mergeable tensors of the pretrained model, by state-dict key.
        task_vectors: Expert minus pretrained for the same keys, (K, *shape), contiguous, tasks first.
        task_names: The K tasks, in order.
    """

    pretrained: Mapping[str, Tensor]
    task_vectors: Mapping[str, Tensor]
    task_names: tuple[str, ...]

    @classmethod
    def from_experts(
        cls,
        pretrained: Mapping[str, Tensor],
        experts: Mapping[str, Expert],
        keys: Sequence[str],
        *,
        strict_dtype: bool = True,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        file: Path | None = None,
    ) -> "ParameterBank":
        """Read the experts one at a time; never hold more than one beside the bank.

        Args:
            pretrained: The full pretrained state dict, as stored; the bank shares its tensors of ``dtype``.
            experts: Per task a checkpoint file or a state dict: a full CLIP or its image tower alone.
            keys: What to merge.
            strict_dtype: Whether an expert must be stored in the pretrained model's dtypes.
            dtype: In which the bank computes.
            stored: In which τ is kept: ``dtype`` itself by default, or bfloat16, float16, int8 (a scale per row).
            file: Kept there instead, and mapped into memory: a new file, which may be deleted once the bank exists.

        Raises:
            KeyMismatchError: If experts differ from the pretrained model in keys, shapes, dtypes or text tower;
                one error for all that is wrong.
            CheckpointError: If a file cannot be read or holds NaN or Inf.
            ConfigError: If there are no experts.
        """
        if not experts:
            raise ConfigError("there is no expert to merge. Name at least one task in suite.tasks.")
        if bad := [key for key in keys if not pretrained[key].isfinite().all()]:
            raise CheckpointError(f"the pretrained model holds NaN or Inf in {shortlist(bad)}. Use another checkpoint.")
        base = {key: pretrained[key].detach().to(dtype).contiguous() for key in keys}
        shapes = {key: tensor.shape for key, tensor in base.items()}
        task_vectors = StoredTaskVectors.empty(shapes, len(experts), stored or dtype, dtype, file)
        mismatches: list[str] = []
        unusable: list[str] = []
        for index, (task, source) in enumerate(experts.items()):
            place = f" ({source})" if isinstance(source, Path) else ""
            try:
                expert = read_checkpoint(source) if isinstance(source, Path) else source
            except CheckpointError as error:
                unusable.append(f"task '{task}': {error}")
                continue
            if found := _differences(pretrained, expert, keys, strict_dtype=strict_dtype):
                mismatches += [f"task '{task}'{place} {difference}" for difference in found]
                continue
            if bad := [key for key in keys if not expert[key].isfinite().all()]:
                unusable.append(
                    f"task '{task}'{place} holds NaN or Inf in {shortlist(bad)}. Fine-tune it again or leave it out."
                )
            if mismatches or unusable:
                continue
            for key in keys:
                task_vectors.store(key, index, expert[key].detach().to(dtype) - base[key])
            del expert
        if mismatches:
            raise KeyMismatchError("\n".join([*mismatches, *unusable]))
        if unusable:
            raise CheckpointError("\n".join(unusable))
        return cls(base, task_vectors, tuple(experts))

    @property
    def num_tasks(self) -> int:
        return len(self.task_names)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every mergeable tensor."""
        return {key: tensor.shape for key, tensor in self.pretrained.items()}

    @cached_property
    def base_hash(self) -> str:
        """SHA-256 of the pretrained tensors: coefficients fit no other base."""
        return hash_tensors(self.pretrained)

    def expert(self, task: int | str) -> dict[str, Tensor]:
        """Weights of one expert, within one rounding of its checkpoint."""
        index = self.task_names.index(task) if isinstance(task, str) else task
        return {key: base + self.task_vectors[key][index] for key, base in self.pretrained.items()}

    def to(self, device: torch.device | str) -> "ParameterBank":
        """The bank on ``device``; itself where it is there already."""
        if all(tensor.device == torch.device(device) for tensor in self.pretrained.values()):
            return self
        pretrained = {key: tensor.to(device) for key, tensor in self.pretrained.items()}
        source = self.task_vectors
        if isinstance(source, StoredTaskVectors):
            return replace(self, pretrained=pretrained, task_vectors=source.to(device))
        return replace(self, pretrained=pretrained, task_vectors={key: t.to(device) for key, t in source.items()})

    def read_on(self, device: torch.device) -> "ParameterBank":
        """The bank with θ₀ on ``device``, where every task vector goes when it is read; itself if it lies there."""
        if all(tensor.device == device for tensor in self.pretrained.values()):
            return self
        placed = replace(self, pretrained={key: tensor.to(device) for key, tensor in self.pretrained.items()})
        return placed.transformed(lambda key, task_vectors: task_vectors.to(device))

    def transformed(self, apply: ApplyTransform, *, in_place: bool = False) -> "ParameterBank":
        """The bank with transformed task vectors, computed tensor by tensor whenever one is read.

        With ``in_place`` they are computed now and overwrite this bank's own, so that repeated reads cost nothing and
        no second bank exists. (Task vectors that are themselves computed when read cannot be overwritten; those
        are stored in a new bank.)
        """
        if not in_place:
            return replace(self, task_vectors=_Transformed(self.task_vectors, apply))
        if isinstance(self.task_vectors, _Transformed):
            return replace(self, task_vectors={key: apply(key, tensor) for key, tensor in self.task_vectors.items()})
        for key, task_vectors in self.task_vectors.items():
            transformed = apply(key, task_vectors)
            if isinstance(self.task_vectors, StoredTaskVectors):
                self.task_vectors.store(key, slice(None), transformed)
            else:
                task_vectors.copy_(transformed)
        return self


class _Transformed(Mapping[str, Tensor]):
    """Task vectors behind a transform."""

    def __init__(self, source: Mapping[str, Tensor], apply: ApplyTransform) -> None:
        self._source, self._apply = source, apply

    def __getitem__(self, key: str) -> Tensor:
        return self._apply(key, self._source[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def _differences(
    pretrained: Mapping[str, Tensor], expert: Mapping[str, Tensor], keys: Sequence[str], *, strict_dtype: bool
) -> list[str]:
    """Everything that keeps ``expert`` from being merged, one sentence a kind."""
    found = []
    if missing := [key for key in keys if key not in expert]:
        found.append(
            f"lacks {len(missing)} keys of the pretrained model ({shortlist(missing)}). "
            "Was it fine-tuned from this model? Exclude them with model.exclude=[…]."
        )
    if extra := [key for key in expert if key not in pretrained]:
        found.append(
            f"has {len(extra)} keys that the pretrained model lacks ({shortlist(extra)}). "
            "Was it fine-tuned from this model? Remove them from the file."
        )
    shared = [key for key in keys if key in expert]
    if shapes := [
        f"{key} {tuple(expert[key].shape)} for {tuple(pretrained[key].shape)}"
        for key in shared
        if expert[key].shape != pretrained[key].shape
    ]:
        found.append(
            f"has {len(shapes)} tensors of another shape ({shortlist(shapes)}). "
            "It has another architecture; give an expert of this one."
        )
    if dtypes := [
        f"{key} {expert[key].dtype} for {pretrained[key].dtype}"
        for key in shared
        if (strict_dtype or not expert[key].is_floating_point()) and expert[key].dtype != pretrained[key].dtype
    ]:
        found.append(
            f"has {len(dtypes)} tensors of another dtype ({shortlist(dtypes)}). "
            "Convert it, or accept the rounding with bank.strict_dtype=false."
        )
    if text := [
        key
        for key, tensor in expert.items()
        if key in pretrained and not key.startswith(TOWER) and not _equal(tensor, pretrained[key], strict_dtype)
    ]:
        found.append(
            f"has a changed text tower ({shortlist(text)}). Only image towers are merged; "
            "give an expert that was fine-tuned with the text tower frozen."
        )
    return found


def _equal(left: Tensor, right: Tensor, strict_dtype: bool) -> bool:
    """Whether two tensors hold the same values; unless strict, as far as the narrower dtype can tell."""
    if not strict_dtype and left.is_floating_point() and right.is_floating_point():
        left = left.to(min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize))
        right = right.to(left.dtype)
    return left.shape == right.shape and torch.equal(left.to(right.dtype), right)
