"""How well every expert does its own task."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from adamerge.errors import DataError
from adamerge.learning.experts import autocast
from adamerge.statistics.gather import Expert


@dataclass(frozen=True)
class Scores:
    """``accuracy`` (a fraction) and ``loss`` (mean cross-entropy in nats) of each expert on its labelled split.

    Args:
        images_per_task: Images to score; None for all.

    Raises:
        DataError: If a label is none of the head's classes.
    """

    images_per_task: int | None

    @property
    def needs(self) -> Literal["labels"]:
        return "labels"

    @torch.no_grad()
    def __call__(self, expert: Expert) -> dict[str, Tensor]:
        """Numbers, float64 ()."""
        assert expert.images is not None
        assert expert.labels is not None
        classes = len(expert.head)
        if bad := {int(label) for label in expert.labels.unique() if not 0 <= label < classes}:
            raise DataError(
                f"task '{expert.task}': labels are numbers of its {classes} classes, from 0; found {min(bad)}. "
                "Correct the label column of its labelled split."
            )
        loss, right = 0.0, 0
        for some, labels in zip(
            expert.images.split(expert.batch_size), expert.labels.split(expert.batch_size), strict=True
        ):
            with autocast(expert.device, expert.precision):
                features = expert.network(some.to(expert.device))
            logits = normalize(features.float(), dim=-1) @ expert.head.float().T
            placed = labels.to(expert.device)
            loss += cross_entropy(logits, placed, reduction="sum").item()
            right += int((logits.argmax(-1) == placed).sum())
        total = len(expert.labels)
        return {
            "accuracy": torch.tensor(right / total, dtype=torch.float64),
            "loss": torch.tensor(loss / total, dtype=torch.float64),
        }

    def to_json(self) -> dict[str, Any]:
        return {"name": "scores", **asdict(self)}
