"""aTLAS: anisotropic scaling of task vectors, learned from zero."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Coefficients, Partition
from adamerge.methods.learned.learner import Learner, check_task, column


@dataclass(frozen=True, kw_only=True)
class Atlas(Learner):
    """λ per task and group without bounds, started at zero, which is the pretrained model.

    Args:
        granularity: As ``Partition.build`` takes it.
        seed: Of random groups.
        others: What a random granularity does to tensors that are no matrices: ``random``, the same as to matrices;
            ``tensor``, one λ each; ``none``, nothing, they stay pretrained.
        init: Initial λ, one number or one per task.
        target: A task that is learned alone, from the other tasks' vectors: λ of its own stays 0. None learns all
            tasks from all vectors.
        budget: At most so many task vectors per group, those of the largest |∂L/∂λ| at the start; None takes all.
        norm: p of a regulariser, half the mean over groups of ‖λ_g‖_p, p = 1 or 2; None leaves it out.
        select_every: Steps between two candidates for the result, which is then the one of the best accuracy relative
            to the experts (a target's as it is), on labelled images that are not learned from if there are any; the
            start is one too. None takes the last iterate.

    Raises:
        ConfigError: If an option is out of range, or a transform would mix a target's vector into others.

    Differs: the reference code also scales six text tensors, which never get a gradient. For K random groups it leaves
    all but matrices at their pretrained values (``others=none``), shares the groups among tensors of one shape, and
    neither seeds nor saves them. It accumulates gradients over batches, stepping at the first; here a step sees all of
    its images. Its result is the best of 20 epochs, after each of which all labelled images are scored; that takes
    longer than learning, so that it is an option here.

    Source: aTLAS, arXiv:2407.02880.
    """

    granularity: str
    seed: int
    others: Literal["random", "tensor", "none"]
    init: float | Sequence[float]
    target: str | None
    budget: int | None
    norm: int | None
    select_every: int | None

    def __post_init__(self) -> None:
        if self.others not in ("random", "tensor", "none"):
            raise ConfigError(f"method.others is 'random', 'tensor' or 'none', found '{self.others}'.")
        if self.norm not in (None, 1, 2):
            raise ConfigError(f"method.norm is null, 1 or 2, found {self.norm}.")
        for name in ("budget", "select_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"method.{name} is null or at least 1, found {value}.")
        if self.target is not None and self.transform is not None:
            raise ConfigError(
                f"method.target={self.target} leaves that task's vector out, but method.transform looks at all of them "
                "together. Drop one of the two."
            )

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        partition = self._partition(bank)
        fixed = torch.zeros(bank.num_tasks, partition.num_groups, dtype=torch.bool)
        if self.target is not None:
            check_task("method.target", self.target, bank.task_names)
            if bank.num_tasks == 1:
                raise ConfigError(f"there is no task but '{self.target}' to learn it from. Add some to suite.tasks.")
            fixed[bank.task_names.index(self.target)] = True
        if self.others == "none" and self._random:
            matrices = {key for key, shape in bank.shapes.items() if len(shape) == 2}
            fixed[:, [runs[0][2] for key, runs in partition.segments.items() if key not in matrices]] = True
        start = column(self.init).expand(fixed.shape).masked_fill(fixed, 0)
        return partition, Coefficients(*fixed.shape, init=start, constraint="identity", fixed=fixed)

    @property
    def _random(self) -> bool:
        return self.granularity.startswith("random")

    def _partition(self, bank: ParameterBank) -> Partition:
        granularity = self.granularity
        if self._random and self.others != "random":
            granularity = granularity.replace("random", "matrices")
        return Partition.build(granularity, bank.shapes, seed=self.seed)

    def restrict(self, coefficients: Coefficients, gradient: Callable[[], Tensor]) -> Coefficients:
        if self.budget is None:
            return coefficients
        start = coefficients().detach()
        fixed = torch.zeros_like(start, dtype=torch.bool) if coefficients.fixed is None else coefficients.fixed
        size = gradient().abs().to(start).masked_fill(fixed, -1)
        order = size.argsort(dim=0, descending=True, stable=True)  # (K, G), the best task of a group first
        left_out = torch.ones_like(fixed).scatter_(0, order[: self.budget], False)
        return Coefficients(*start.shape, init=start, constraint="identity", fixed=fixed | left_out)

    def penalty(self, coefficients: Tensor, raw: Tensor) -> Tensor | None:
        if self.norm is None:
            return None
        return 0.5 * torch.linalg.vector_norm(coefficients, ord=self.norm, dim=0).mean()

    def learns_from(self, tasks: Sequence[str]) -> Sequence[str]:
        if self.target is None:
            return tasks
        check_task("method.target", self.target, tasks)
        return [self.target]

    @property
    def candidates_every(self) -> int | None:
        return self.select_every

    def merit(
        self, merged: Mapping[str, float], pretrained: Mapping[str, float], experts: Mapping[str, float]
    ) -> float | None:
        """As for any learner, but a target's own expert has no say in its result."""
        return super().merit(merged, pretrained, experts) if self.target is None else merged[self.target]
