"""Concrete subspace learning: coefficients within a learned mask over all coordinates."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Coefficients, Partition
from adamerge.methods.learned.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Concrete(Learner):
    """θ₀ + Σ_k λ_k m̃ ∘ τ_k: a mask m̃, the same for every task, is learned first, then λ within one draw of it.

    Without an inner optimiser and without learning λ it is Concrete Task Arithmetic, with both Concrete AdaMerging; how
    λ is shared is a matter of the granularity.

    Args:
        granularity: As ``Partition.build`` takes it.
        constraint: As ``Coefficients`` takes it; ``clamp`` is the original repository's.
        init: Initial λ, one number or one per task.
        learn_coefficients: Whether λ is learned after the mask.
        mask_init: Initial logit of every coordinate.
        mask_dtype: In which logits and their optimiser's state are kept: ``float32`` or ``bfloat16``.
        mask_lr: The optimiser's rate while the mask is learned.
        mask_steps: Its steps.
        temperature: t of ``ConcreteMask``.
        redraw: Whether the outer merge of a step draws a mask of its own.
        inner_optimizer: λ's parameters → optimiser of the inner step, whose state goes on from step to step though λ
            starts anew; None: no inner step.
        inner_at: Where the inner gradient is taken: at the ``initial`` λ, or at the ``previous`` step's.
        final_mask: ``continuous``, or ``binary``: 1 where the continuous one exceeds a half, before the division by the
            mean.

    Raises:
        ConfigError: If an option is out of range.

    Differs: the inner step of rate 1 is gradient descent at the initial λ. The reference implementations take Adam
    (``inner_optimizer._target_=torch.optim.Adam``) at the previous step's λ (``inner_at=previous``), where it corrects
    itself; at the initial λ Adam's steps all have one sign and end as ±1, whatever the gradient. The original
    repository also draws another mask at every merge (``redraw=true``), clamps λ to [0, 1] in the merge
    (``constraint=clamp``) and learns the mask for 2000 steps (``mask_steps=2000``).

    Source: Concrete subspace learning, arXiv:2312.06173.
    """

    granularity: str
    constraint: str
    init: float | Sequence[float]
    learn_coefficients: bool
    mask_init: float
    mask_dtype: str
    mask_lr: float
    mask_steps: int
    temperature: float
    redraw: bool
    inner_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None
    inner_at: Literal["initial", "previous"]
    final_mask: Literal["continuous", "binary"]

    def __post_init__(self) -> None:
        if self.inner_at not in ("initial", "previous"):
            raise ConfigError(f"method.inner_at is 'initial' or 'previous', found '{self.inner_at}'.")
        if self.final_mask not in ("continuous", "binary"):
            raise ConfigError(f"method.final_mask is 'continuous' or 'binary', found '{self.final_mask}'.")
        if self.mask_steps < 0:
            raise ConfigError(f"method.mask_steps is at least 0, found {self.mask_steps}.")

    def draws(self, steps: int) -> int:
        per_step = 1 if self.inner_optimizer is None else 2
        return max(per_step * self.mask_steps, steps if self.learn_coefficients else 0)

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        partition = Partition.build(self.granularity, bank.shapes)
        init = self.init if isinstance(self.init, (int, float)) else list(self.init)
        return partition, Coefficients(bank.num_tasks, partition.num_groups, init=init, constraint=self.constraint)
