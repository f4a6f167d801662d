"""MagMax: every coordinate belongs to the task that changed it most."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.methods.protocol import NOTHING, Context, Transform


@dataclass(frozen=True)
class MagMax(Transform):
    """Of the K entries at a coordinate only the one of largest magnitude stays.

    Where several are as large, that of the task whose name comes first in the alphabet.

    Differs: the original code and FusionBench give ties to the task that is merged last. The paper merges experts that
    were fine-tuned one from another; here they may as well be independent.

    Source: MagMax, arXiv:2407.06322.
    """

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        names = bank.task_names
        alphabetical = sorted(range(len(names)), key=names.__getitem__)

        def apply(key: str, task_vectors: Tensor) -> Tensor:
            largest = task_vectors.abs().amax(0)
            free = torch.ones_like(largest, dtype=torch.bool)
            kept = torch.zeros_like(task_vectors)
            for task in alphabetical:
                mine = free & (task_vectors[task].abs() == largest)
                kept[task] = task_vectors[task] * mine
                free &= ~mine
            return kept

        return apply

    def to_json(self) -> dict[str, Any]:
        return {"name": "magmax"}
