"""Task negation: forget one task by subtracting its task vector."""

from collections.abc import Mapping
from dataclasses import dataclass

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.learned.learner import check_task
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class TaskNegation(Scaled):
    """θ₀ - scaling · τ of the target.

    A search takes the factor of the lowest accuracy on the target among those that keep the control's, on the labelled
    split; of equals the first in the grid.

    Args:
        target: The task to forget.
        control: The task to keep.
        keep: Smallest share of the pretrained model's accuracy on the control.

    Differs: the paper's control is ImageNet; here it is any other task of the suite.

    Raises:
        ConfigError: If an option is out of range, or target and control are one task or not among those merged.

    Source: Task Arithmetic, arXiv:2212.04089.
    """

    target: str
    control: str
    keep: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == self.control:
            raise ConfigError(f"method.target and method.control are both '{self.target}'. Name two tasks.")
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"method.keep lies in [0, 1], found {self.keep:g}.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        check_task("method.target", self.target, bank.task_names)
        check_task("method.control", self.control, bank.task_names)
        target = bank.task_names.index(self.target)
        return lambda key, task_vectors: -task_vectors[target]

    def merit(
        self, merged: Mapping[str, float], pretrained: Mapping[str, float], experts: Mapping[str, float]
    ) -> float | None:
        if merged[self.control] < self.keep * pretrained[self.control]:
            return None
        return -merged[self.target]
