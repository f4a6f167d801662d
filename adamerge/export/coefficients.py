"""Learned coefficients as a file that is enough to merge again without learning."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.errors import CheckpointError, ShapeError
from adamerge.export.writers import save_tensors
from adamerge.files import atomic_file
from adamerge.merging.partition import Partition

_FORMAT = "adamerge.coefficients/1"


@dataclass(frozen=True)
class SavedCoefficients:
    """λ and all that gives it its meaning.

    Attributes:
        coefficients: λ after its constraint, (K, G).
        task_names: The K tasks, in the order of the rows.
        partition: Which of the G groups an entry of a tensor belongs to; its keys are the keys to merge.
        transform: What was done to the task vectors before (as in the configuration), or None.
        base_hash: ``ParameterBank.base_hash`` of the pretrained weights that λ was learned for.
        method: Name of the method that made λ.
    """

    coefficients: Tensor
    task_names: tuple[str, ...]
    partition: Partition
    transform: dict[str, Any] | None
    base_hash: str
    method: str

    def __post_init__(self) -> None:
        expected = (len(self.task_names), self.partition.num_groups)
        if tuple(self.coefficients.shape) != expected:
            raise ShapeError(
                f"coefficients have the shape {tuple(self.coefficients.shape)}, but the tasks and the groups of the "
                f"partition ask for {expected}."
            )


def write_coefficients(path: Path, saved: SavedCoefficients) -> None:
    """Write a safetensors file: λ as the tensor ``coefficients``, everything else as JSON in its metadata.

    Raises:
        OutputError: If the file cannot be written.
    """
    metadata = {
        "adamerge": _FORMAT,
        "method": saved.method,
        "base_hash": saved.base_hash,
        "task_names": json.dumps(saved.task_names, ensure_ascii=False),
        "transform": json.dumps(saved.transform),
        "partition": json.dumps(saved.partition.to_json()),
    }
    with atomic_file(path) as temporary:
        save_tensors(temporary, {"coefficients": saved.coefficients.detach().cpu()}, metadata)


def read_coefficients(path: Path) -> SavedCoefficients:
    """Read what ``write_coefficients`` wrote.

    Raises:
        CheckpointError: If the file is missing, is no such file, is of another version or contradicts itself.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no coefficients file {path}. Give method.coefficients the coefficients.safetensors of a run."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensor = file.get_tensor("coefficients") if "coefficients" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read the coefficients file {path}: {error}. Write it again.") from error
    found = metadata.get("adamerge")
    if found != _FORMAT or tensor is None:
        raise CheckpointError(
            f"{path} is not a coefficients file of this version: expected the format '{_FORMAT}' with a tensor "
            f"'coefficients', found {f'the format {found!r}' if found else 'another kind of safetensors file'}. Give "
            "the coefficients.safetensors of a run of this version."
        )
    try:
        saved = SavedCoefficients(
            tensor,
            tuple(json.loads(metadata["task_names"])),
            Partition.from_json(json.loads(metadata["partition"])),
            json.loads(metadata["transform"]),
            metadata["base_hash"],
            metadata["method"],
        )
    except (KeyError, TypeError, ValueError, ShapeError) as error:
        raise CheckpointError(f"the coefficients file {path} contradicts itself or lacks a part: {error}.") from error
    groups = [group for runs in saved.partition.segments.values() for _, _, group in runs]
    groups += [group for s in saved.partition.scattered.values() for group in (s.first, s.first + s.count - 1)]
    if any(group not in range(saved.partition.num_groups) for group in groups):
        raise CheckpointError(f"the coefficients file {path} contradicts itself: its partition names unknown groups.")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"the coefficients file {path} holds values that are not finite. Learn them again.")
    return saved


def write_coefficients_csv(path: Path, saved: SavedCoefficients) -> None:
    """Write λ for a spreadsheet: a row per group, a column per task; nine digits give every float32 back exactly.

    Raises:
        OutputError: If the file cannot be written.
    """
    rows = saved.coefficients.detach().double().T.tolist()  # (G, K)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["group", *saved.task_names])
        for name, row in zip(saved.partition.groups, rows, strict=True):
            writer.writerow([name, *(f"{value:.9g}" for value in row)])
