"""The only thing that learns: λ."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adamerge.errors import ConfigError, ShapeError
from adamerge.merging.constraints import Constraint, constraint_named


class Coefficients(nn.Module):
    """Learnable merging coefficients.

    Args:
        num_tasks: K.
        num_groups: G.
        init: Initial λ: one number, one per task (K), or all of them (K, G).
        constraint: ``identity``, ``clamp``, ``sigmoid``, ``softmax`` (over tasks) or one that is not named.
        fixed: Which λ stay at their initial value whatever the constraint, bool (K, G) or broadcastable to it.

    Raises:
        ShapeError: If ``init`` has another shape.
        ConfigError: If the constraint is unknown or cannot reach ``init``.
    """

    def __init__(
        self,
        num_tasks: int,
        num_groups: int,
        *,
        init: float | Sequence[float] | Tensor,
        constraint: str | Constraint,
        fixed: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._constraint = constraint_named(constraint) if isinstance(constraint, str) else constraint
        start = torch.as_tensor(init, dtype=torch.get_default_dtype())
        if start.dim() == 1 and start.shape[0] == num_tasks:
            start = start[:, None]
        full = self._shape = (num_tasks, num_groups)
        if start.dim() not in (0, 2) or any(n not in (1, full[axis]) for axis, n in enumerate(start.shape)):
            raise ShapeError(
                f"the initial coefficients have shape {tuple(start.shape)}. Give one number, one per task "
                f"({num_tasks}), or all of them ({num_tasks}, {num_groups})."
            )
        start = start.expand(full)
        free = start if fixed is None else start[~fixed.expand(full)]
        if not (start.isfinite().all() and self._constraint.admits(free)):
            raise ConfigError(
                f"constraint '{constraint}' takes initial coefficients that are {self._constraint.range}, "
                f"found {start.min():g} to {start.max():g}. Change method.init or method.constraint."
            )
        self.fixed: Tensor | None
        self.start: Tensor | None
        self.register_buffer("fixed", None if fixed is None else fixed.expand(full).clone(), persistent=False)
        self.register_buffer("start", None if fixed is None else start.clone(), persistent=False)
        raw = self._constraint.inverse(start)
        self.raw = nn.Parameter((raw if fixed is None else raw.masked_fill(fixed, 0)).contiguous())

    @torch.no_grad()
    def set(self, value: float | Tensor) -> None:
        """Let λ be ``value``, one number or (K, G), as far as it is not fixed; the constraint must admit it."""
        self.raw.copy_(self._constraint.inverse(torch.as_tensor(value).to(self.raw).expand(self._shape)))

    def forward(self) -> Tensor:
        """λ, (K, G)."""
        value = self._constraint.forward(self.raw)
        return value if self.fixed is None or self.start is None else torch.where(self.fixed, self.start, value)
