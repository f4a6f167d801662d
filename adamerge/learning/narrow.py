"""Parameters that are too many to be kept in float32."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adamerge.merging.noise import rounded


class Narrow(Optimizer):
    """Steps bfloat16 parameters in float32, one tensor at a time.

    Between steps the parameters and whatever of the optimiser's state is as large as they are bfloat16, rounded up or
    down at random: on average a step that is smaller than the spacing counts in full. The noise depends on the seed and
    the number of the step alone.

    Args:
        parameters: bfloat16.
        make: Parameters → the optimiser that does the work; its state is per parameter.
        seed: Of the rounding.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], make: Callable[[Iterable[nn.Parameter]], Optimizer], *, seed: int
    ) -> None:
        self._wide = nn.Parameter(torch.empty(0))
        self._inner = make([self._wide])
        super().__init__(parameters, {"lr": self._inner.param_groups[0]["lr"], "steps": 0})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            self._inner.param_groups[0]["lr"] = group["lr"]
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._step(parameter, f"{self._seed}/round/{group['steps']}/{index}")
            group["steps"] += 1

    def _step(self, parameter: nn.Parameter, name: str) -> None:
        wide, state = self._wide, self.state[parameter]
        wide.data = parameter.float()
        wide.grad = parameter.grad.float() if parameter.grad is not None else None
        self._inner.state[wide] = {key: value.float() if _large(key, value) else value for key, value in state.items()}
        self._inner.step()
        for key, value in self._inner.state.pop(wide).items():
            state[key] = rounded(f"{name}/{key}", value) if _large(key, value) else value
        parameter.copy_(rounded(name, wide.data))
        wide.data, wide.grad = torch.empty(0), None


def _large(key: str, value: Any) -> bool:
    """Whether a state's entry has the size of the parameter; torch's optimisers also count their steps."""
    return isinstance(value, Tensor) and key != "step"
