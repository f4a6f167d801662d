"""How the rate falls over a run, and which of its iterates count."""

from dataclasses import dataclass
from math import cos, pi

from adamerge.errors import ConfigError

_DECAYS = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + cos(pi * done)),
}


@dataclass(frozen=True)
class Schedule:
    """Rate and averaging as functions of the step alone, so that a resumed run needs no state for them.

    Attributes:
        steps: Optimiser steps of a run, which the Trainer takes as its ``max_steps``.
        decay: Of the rate, from all of it to (nearly) nothing: ``constant``, ``linear`` or ``cosine``.
        average: The result is the mean of the iterates of this last share of the steps; 0: the last iterate.

    Raises:
        ConfigError: If an attribute is out of range.
    """

    steps: int
    decay: str
    average: float

    def __post_init__(self) -> None:
        if self.decay not in _DECAYS:
            raise ConfigError(f"schedule.decay: expected one of {', '.join(_DECAYS)}, found '{self.decay}'.")
        if not 0 <= self.average <= 1:
            raise ConfigError(f"schedule.average lies in [0, 1], found {self.average}.")

    def factor(self, step: int, steps: int) -> float:
        """Of the rate at ``step`` of ``steps``."""
        return _DECAYS[self.decay](step / steps)

    def weight(self, step: int, steps: int) -> float:
        """What the iterate after ``step`` of ``steps`` weighs in the running mean: 0 outside it, 1 for its first."""
        first = steps - max(1, round(self.average * steps))
        return 1 / (step - first + 1) if step >= first else 0.0
