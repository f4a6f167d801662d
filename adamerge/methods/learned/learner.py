"""What learned methods have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.merging import Coefficients, Partition
from adamerge.methods.protocol import Transform


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """Learns λ by gradient steps on an objective; both are chosen beside the method, in the configuration.

    Args:
        transform: Applied to the task vectors first.
        coefficients: File of learned coefficients to merge with instead of learning.
    """

    transform: Transform | None
    coefficients: str | None

    @abstractmethod
    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        """Groups and initial coefficients for a bank."""

    def refine(
        self, stage: int, bank: ParameterBank, partition: Partition, coefficients: Tensor
    ) -> tuple[Partition, Coefficients] | None:
        """Groups and initial coefficients of a further stage of learning, or None where there is none.

        Args:
            stage: Of the stage to come, from 1.
            bank: As ``prepare`` saw it.
            partition: Of the stage before.
            coefficients: λ that it learned, (K, G).
        """
        return None

    def penalty(self, coefficients: Tensor) -> Tensor | None:
        """A scalar of λ (K, G) that is added to the loss of a step."""
        return None

    def learns_from(self, tasks: Sequence[str]) -> Sequence[str]:
        """The tasks whose images are learned from, of those merged."""
        return tasks
