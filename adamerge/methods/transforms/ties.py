"""TIES trim and elect, as a transform of task vectors."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.methods.coordinates import blocks, total
from adamerge.methods.protocol import NOTHING, Context, Transform
from adamerge.methods.transforms.magnitude import Magnitude


@dataclass(frozen=True)
class Ties(Transform):
    """Keep each task's largest entries, and of those the ones that agree with the sign elected per coordinate.

    Trim: ``Magnitude``. Elect: the sign of the sum of trimmed vectors, a coordinate that sums to zero taking the
    majority sign of all coordinates. Entries of another sign become zero. No rescaling, no aggregation: AdaMerging++
    learns on the K surviving vectors.

    Differs: the reference code counts the text tower's structural zeros among the d entries of the trim, which are 22 %
    of them for ViT-B/32 (``structural_zeros=25599489``); here only mergeable (visual) entries count.
    In mergekit a coordinate that sums to zero takes plus.

    Args:
        density: As ``Magnitude`` takes it.
        thresholds: As ``Magnitude`` takes it; the paper's are ``global``.
        structural_zeros: As ``Magnitude`` takes it.

    Raises:
        ConfigError: If an option is out of range.

    Source: TIES-Merging, arXiv:2306.01708; AdaMerging, arXiv:2310.02575 (the ++ variants).
    """

    density: float
    thresholds: Literal["global", "tensor"]
    structural_zeros: int

    def __post_init__(self) -> None:
        self._magnitude()

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        trim = self._magnitude().fit(bank, context)
        signs = (
            total(part).sign().sum()
            for key, task_vectors in bank.task_vectors.items()
            for part in blocks(trim(key, task_vectors))
        )
        # Summed as they come: a list of such scalars lies between the freed blocks and keeps them from the system.
        majority = sum(signs, torch.zeros(())).sign()

        def apply(key: str, task_vectors: Tensor) -> Tensor:
            trimmed = trim(key, task_vectors).contiguous()
            for part in blocks(trimmed):
                elected = total(part).sign()
                part.mul_(part.sign() == torch.where(elected == 0, majority, elected))
            return trimmed

        return apply

    def to_json(self) -> dict[str, Any]:
        return {"name": "ties", **asdict(self)}

    def _magnitude(self) -> Magnitude:
        return Magnitude(self.density, self.thresholds, self.structural_zeros)
