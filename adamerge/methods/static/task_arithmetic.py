"""Task Arithmetic: one factor on the summed task vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.merging import Partition, merge
from adamerge.methods.static.scaling import Scaled


@dataclass(frozen=True)
class TaskArithmetic(Scaled):
    """θ₀ + λ Σ_k τ_k.

    Source: Task Arithmetic, arXiv:2212.04089; λ = 0.3 is the field's convention for eight tasks.
    """

    def __call__(self, bank: ParameterBank) -> dict[str, Tensor]:
        partition = Partition.build("task", bank.shapes)
        reference = next(iter(bank.pretrained.values()))
        coefficients = torch.full((bank.num_tasks, 1), self.factor, dtype=reference.dtype, device=reference.device)
        return merge(bank, coefficients, partition)
