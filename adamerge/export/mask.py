"""A mask of the task vectors as a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.bank.checkpoints import hash_tensors
from adamerge.errors import CheckpointError
from adamerge.export.writers import save_tensors
from adamerge.files import atomic_file

MASK_NAME = "mask.safetensors"
_FORMAT = "adamerge.mask/1"


def write_mask(path: Path, mask: Mapping[str, Tensor]) -> None:
    """Write factors of the task vectors, by key, in float32.

    Raises:
        OutputError: If the file cannot be written.
    """
    with atomic_file(path) as temporary:
        tensors = {key: tensor.detach().to("cpu", torch.float32) for key, tensor in mask.items()}
        save_tensors(temporary, tensors, {"adamerge": _FORMAT})


def read_mask(path: Path) -> dict[str, Tensor]:
    """Read what ``write_mask`` wrote.

    Raises:
        CheckpointError: If the file is missing or is no mask.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no mask {path}, within which the coefficients beside it were learned. Copy {path.name} of the "
            "same run there."
        )
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("adamerge") != _FORMAT:
                raise CheckpointError(f"{path} is no mask of this version, which has the format '{_FORMAT}'.")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read the mask {path}: {error}. Copy it again from its run.") from error


def describe_mask(mask: Mapping[str, Tensor], before: dict[str, Any] | None) -> dict[str, Any]:
    """The record of a mask as a transform of task vectors.

    Args:
        mask: As written.
        before: The record of what was done to them first.
    """
    return {"name": "mask", "sha256": hash_tensors(mask), "before": before}
