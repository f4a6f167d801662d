"""AdaMerging: coefficients by entropy minimisation on unlabeled test images."""

from collections.abc import Sequence
from dataclasses import dataclass

from adamerge.bank import ParameterBank
from adamerge.merging import Coefficients, Partition
from adamerge.methods.learned.learner import Learner


@dataclass(frozen=True, kw_only=True)
class AdaMerging(Learner):
    """λ per task and group, started at a constant.

    Task-wise, layer-wise (one λ per tensor) and block-wise forms differ in the granularity alone; the ++ forms
    put the TIES transform before it.

    Args:
        granularity: As ``Partition.build`` takes it.
        constraint: As ``Coefficients`` takes it; the official code clamps to [0, 1] in the forward pass.
        init: Initial λ, one number or one per task.

    Differs: the official code also gives coefficients to six text tensors, which never get a gradient; here the
    text tower takes no part. FusionBench leaves the clamp off and draws one batch a step instead of two.

    Source: AdaMerging, arXiv:2310.02575.
    """

    granularity: str
    constraint: str
    init: float | Sequence[float]

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        partition = Partition.build(self.granularity, bank.shapes)
        init = self.init if isinstance(self.init, (int, float)) else list(self.init)
        return partition, Coefficients(bank.num_tasks, partition.num_groups, init=init, constraint=self.constraint)
