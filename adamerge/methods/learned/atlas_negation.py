"""aTLAS for negation: unlearn one task and keep another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Coefficients, Partition
from adamerge.methods.learned.learner import Learner, check_task, column


@dataclass(frozen=True, kw_only=True)
class AtlasNegation(Learner):
    """λ of one task's vector, started at zero, by -CE of that task + CE of a control; λ of all others stays 0.

    The result is the candidate of the lowest accuracy on the target among those that keep the control's; the run
    ends at the first that does not. Accuracies are of labelled images that are not learned from, if there are any.

    Args:
        granularity: As ``Partition.build`` takes it.
        init: Initial λ, one number or one per task.
        target: The task to unlearn.
        control: The task to keep.
        keep: Smallest share of the pretrained model's accuracy on the control.
        select_every: Steps between two candidates.

    Raises:
        ConfigError: If an option is out of range, or target and control are one task.

    Differs: the paper's control is ImageNet; here it is any other task of the suite. The paper looks after each epoch,
    whose number, like the rate, it tunes for every data set.

    Source: aTLAS, arXiv:2407.02880.
    """

    granularity: str
    init: float | Sequence[float]
    target: str
    control: str
    keep: float
    select_every: int

    def __post_init__(self) -> None:
        if self.target == self.control:
            raise ConfigError(f"method.target and method.control are both '{self.target}'. Name two tasks.")
        if self.select_every < 1:
            raise ConfigError(f"method.select_every is at least 1, found {self.select_every}.")
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"method.keep lies in [0, 1], found {self.keep}.")

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        check_task("method.target", self.target, bank.task_names)
        partition = Partition.build(self.granularity, bank.shapes)
        fixed = torch.ones(bank.num_tasks, partition.num_groups, dtype=torch.bool)
        fixed[bank.task_names.index(self.target)] = False
        start = column(self.init).expand(fixed.shape).masked_fill(fixed, 0)
        return partition, Coefficients(*fixed.shape, init=start, constraint="identity", fixed=fixed)

    def learns_from(self, tasks: Sequence[str]) -> Sequence[str]:
        check_task("method.target", self.target, tasks)
        check_task("method.control", self.control, tasks)
        return [self.target, self.control]

    def factor(self, task: str) -> float:
        return -1.0 if task == self.target else 1.0

    @property
    def candidates_every(self) -> int | None:
        return self.select_every

    def merit(
        self, merged: Mapping[str, float], pretrained: Mapping[str, float], experts: Mapping[str, float]
    ) -> float | None:
        if merged[self.control] < self.keep * pretrained[self.control]:
            return None
        return -merged[self.target]
