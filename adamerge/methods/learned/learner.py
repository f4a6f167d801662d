"""What learned methods have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Coefficients, Partition
from adamerge.methods.protocol import Statistic, Transform, mean_normalized


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """Learns λ by gradient steps on an objective; both are chosen beside the method, in the configuration.

    Args:
        transform: Applied to the task vectors first.
        coefficients: File of learned coefficients to merge with instead of learning.
    """

    transform: Transform | None
    coefficients: str | None

    @property
    def statistic(self) -> Statistic | None:
        """What must be known about the experts; None where their weights are enough."""
        return self.transform.statistic if self.transform else None

    @abstractmethod
    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        """Groups and initial coefficients for a bank."""

    def restrict(self, coefficients: Coefficients, gradient: Callable[[], Tensor]) -> Coefficients:
        """The coefficients to learn, of those that were prepared.

        Args:
            coefficients: From ``prepare``.
            gradient: Computes ∂L/∂λ at their start, (K, G), over about one look at every image.
        """
        return coefficients

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

    def shares(self, bank: ParameterBank, coefficients: Tensor) -> Mapping[str, tuple[float, int]]:
        """By tensor its importance and how many λ per task a further stage gives it for that; none where it is not so.

        Args:
            bank: As ``prepare`` saw it.
            coefficients: λ that the stage before learned, (K, G).
        """
        return {}

    def penalty(self, coefficients: Tensor, raw: Tensor) -> Tensor | None:
        """A scalar that is added to the loss of a step.

        Args:
            coefficients: λ, (K, G).
            raw: The parameter that λ is a function of.
        """
        return None

    @property
    def starts(self) -> Sequence[float]:
        """Constant λ that the result must not be worse than by the objective; learning starts from the best of them."""
        return ()

    def draws(self, steps: int) -> int:
        """How many draws of every task's images are seen where λ is learned for ``steps`` optimiser steps."""
        return steps

    def learns_from(self, tasks: Sequence[str]) -> Sequence[str]:
        """The tasks whose images are learned from, of those merged."""
        return tasks

    def factor(self, task: str) -> float:
        """Of a task's loss, beside data.task_weights."""
        return 1.0

    @property
    def candidates_every(self) -> int | None:
        """Steps between two candidates for the result, scored on labelled images; None: the result is the last."""
        return None

    def merit(
        self, merged: Mapping[str, float], pretrained: Mapping[str, float], experts: Mapping[str, float]
    ) -> float | None:
        """What a candidate is worth, or None where it is none and the run ends: its mean accuracy relative to the
        experts', unless a method says otherwise.

        Args:
            merged: Accuracy of the merged model on labelled images of the tasks that are learned from.
            pretrained: Of the pretrained model on the same.
            experts: Of each task's expert on the same.
        """
        return mean_normalized(merged, experts)


def column(init: float | Sequence[float]) -> Tensor:
    """Initial λ, one number or one per task, as a column (1, 1) or (K, 1)."""
    values = [init] if isinstance(init, (int, float)) else list(init)
    return torch.tensor(values, dtype=torch.get_default_dtype())[:, None]


def check_task(option: str, task: str, tasks: Sequence[str]) -> None:
    """Raise ConfigError unless ``task``, given for ``option``, is one of those merged."""
    if task not in tasks:
        raise ConfigError(f"{option}={task} is not among the tasks that are merged: {', '.join(sorted(tasks))}.")
