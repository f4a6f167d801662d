"""The pretrained model, as a reference row of every table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from adamerge.bank import ParameterBank


@dataclass(frozen=True)
class Pretrained:
    """θ₀, unchanged."""

    def __call__(self, bank: ParameterBank) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in bank.pretrained.items()}

    def candidates(self) -> Sequence[Self]:
        return [self]
