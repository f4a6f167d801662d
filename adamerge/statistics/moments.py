"""Second moments of gradients that an optimiser left behind."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.bank import read_checkpoint
from adamerge.errors import CheckpointError, ConfigError, KeyMismatchError, shortlist
from adamerge.files import sha256_file
from adamerge.statistics.gather import Expert


@dataclass(frozen=True)
class Moments:
    """Adam's ``exp_avg_sq`` at the end of each expert's fine-tuning, from a file each.

    A file holds one tensor for every merged one, under its name and of its shape (all else in it is left alone), in
    any format that weights may have; safetensors is best.

    Args:
        files: By task.

    Raises:
        CheckpointError: If a file cannot be read, or holds what no mean of squares can be.
        ConfigError: If a task has no file.
        KeyMismatchError: If a file lacks tensors or has them in other shapes.

    Source: OTA, arXiv:2509.11167.
    """

    files: Mapping[str, str]

    @property
    def needs(self) -> Literal["nothing"]:
        return "nothing"

    @property
    def images_per_task(self) -> None:
        return None

    def __call__(self, expert: Expert) -> dict[str, Tensor]:
        """v by key, with the shapes of ``expert.keys``, float32 or wider."""
        if expert.task not in self.files:
            raise ConfigError(
                f"task '{expert.task}' has no file of second moments. Name one for every task in the files of Moments, "
                f"which has them for {shortlist(self.files) or 'none'}."
            )
        file = self.files[expert.task]
        stored = read_checkpoint(Path(file))
        shapes = {name: parameter.shape for name, parameter in expert.network.named_parameters()}
        if missing := [key for key in expert.keys if key not in stored]:
            raise KeyMismatchError(
                f"task '{expert.task}' ({file}) lacks second moments of {len(missing)} merged tensors "
                f"({shortlist(missing)}). Save exp_avg_sq under the names of the weights."
            )
        if other := [
            f"{key} {tuple(stored[key].shape)} for {tuple(shapes[key])}"
            for key in expert.keys
            if stored[key].shape != shapes[key]
        ]:
            raise KeyMismatchError(
                f"task '{expert.task}' ({file}) has {len(other)} second moments of another shape ({shortlist(other)}). "
                "Give those of this model, whole: not flattened, not sharded."
            )
        if bad := [key for key in expert.keys if not _is_mean_of_squares(stored[key])]:
            raise CheckpointError(
                f"task '{expert.task}' ({file}): second moments are finite numbers of at least 0, unlike those of "
                f"{shortlist(bad)}. Save exp_avg_sq, not exp_avg."
            )
        return {key: stored[key].to(torch.promote_types(stored[key].dtype, torch.float32)) for key in expert.keys}

    def to_json(self) -> dict[str, Any]:
        """With the files' contents by hash, so that others are read anew."""
        hashes = {task: sha256_file(Path(file)) for task, file in self.files.items() if Path(file).is_file()}
        return {"name": "moments", "files": dict(self.files), "sha256": hashes}


def _is_mean_of_squares(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all()) and bool((tensor >= 0).all())
