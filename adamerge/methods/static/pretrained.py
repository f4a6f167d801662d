"""The pretrained model, as a reference row of every table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.methods.protocol import NOTHING, Context, Statistic, mean_normalized


@dataclass(frozen=True)
class Pretrained:
    """θ₀, unchanged."""

    @property
    def statistic(self) -> Statistic | None:
        return None

    def __call__(self, bank: ParameterBank, context: Context = NOTHING) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in bank.pretrained.items()}

    def candidates(self, bank: ParameterBank, context: Context = NOTHING) -> Iterator[tuple[Self, dict[str, Tensor]]]:
        yield self, self(bank, context)

    def merit(
        self, merged: Mapping[str, float], pretrained: Mapping[str, float], experts: Mapping[str, float]
    ) -> float | None:
        return mean_normalized(merged, experts)
