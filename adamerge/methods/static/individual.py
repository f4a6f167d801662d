"""Every task with its own expert: the ceiling of every table, and not one model."""

from dataclasses import dataclass

from torch import Tensor

from adamerge.bank import ParameterBank


@dataclass(frozen=True)
class Individual:
    """θ_k for task k. Evaluated, never exported: there is no single model."""

    def __call__(self, bank: ParameterBank, task: str) -> dict[str, Tensor]:
        return bank.expert(task)
