"""Our own learner, for people who do not care which paper."""

from collections.abc import Sequence
from dataclasses import dataclass

from adamerge.bank import ParameterBank
from adamerge.merging import Coefficients, Partition
from adamerge.methods.learned.learner import Learner


@dataclass(frozen=True, kw_only=True)
class AdaMerge(Learner):
    """Many coefficients, learned by agreement with each task's own expert on that task's unlabeled images.

    Entropy rewards confidence, right or wrong, so the few coefficients of AdaMerging are already enough to collapse.
    Agreement (``objectives.Alignment``) has its least value where every task's predictions are its expert's, which is
    what a merge is for; so more coefficients mean a better merge, not a worse one. Here every row of a matrix, which
    is an output channel of its layer, has a λ per task, without bounds. Learning starts from the constant λ that
    agrees best, 0 (the pretrained model) among them, and the result is that one should learning end above it. Where a
    task has fewer than 100 images, and they are not just those that are scored, half are held out, and the result is
    the iterate that agrees best on them.

    Args:
        granularity: As ``Partition.build`` takes it.
        constraint: As ``Coefficients`` takes it.
        init: λ before the grid is looked at, one number or one per task.
        grid: Constant λ to start from the best of; none: ``init``.

    Source: none; the objective's sources are named there. Evidence: README, "Learners".
    """

    granularity: str
    constraint: str
    init: float | Sequence[float]
    grid: Sequence[float]

    @property
    def starts(self) -> Sequence[float]:
        return self.grid

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        partition = Partition.build(self.granularity, bank.shapes)
        init = self.init if isinstance(self.init, (int, float)) else list(self.init)
        return partition, Coefficients(bank.num_tasks, partition.num_groups, init=init, constraint=self.constraint)
