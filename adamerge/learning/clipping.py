"""AdamW behind a limit on the gradient's norm."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_


class ClippedAdamW(torch.optim.AdamW):
    """AdamW whose gradient, all parameters taken together, is scaled down to ``max_norm`` where it is longer.

    Lightning clips only where it steps itself. Here the gradient has already lost the factor of float16.

    Args:
        parameters: What to optimise.
        max_norm: Largest Euclidean norm.
        options: As ``AdamW`` takes them.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, max_norm: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._max_norm = max_norm

    def step(self, closure: Any = None) -> Any:
        """Clip, then step; the closure has been called by then, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self._max_norm)
        super().step()
        return loss
