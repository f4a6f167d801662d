"""How the rate falls over a run, and which of its iterates count."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi

from adamerge.errors import ConfigError

_FALL = 0.3
"""The share of a run in which a rate that was held falls."""

_PLATEAU = 0.05
"""By how much the loss must still fall, of itself, from one stretch of steps to the next."""

_DECAYS = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + cos(pi * done)),
    "hold": lambda done: min(1.0, (1 - done) / _FALL),
}


@dataclass(frozen=True)
class Schedule:
    """Rate and averaging as functions of the step alone, so that a resumed run needs no state for them.

    Attributes:
        steps: Optimiser steps of a run, which the Trainer takes as its ``max_steps``.
        decay: Of the rate, from all of it to (nearly) nothing: ``constant``, ``linear``, ``cosine`` or ``hold``, which
            keeps it and lets it fall linearly over the last 30 % of the steps.
        average: The result is the mean of the iterates of this last share of the steps; 0: the last iterate.
        patience: Over so many steps a loss must fall by 5 %; where it does not, a held rate falls at once and the run
            ends early. 0: the run never ends early.

    Raises:
        ConfigError: If an attribute is out of range.
    """

    steps: int
    decay: str
    average: float
    patience: int

    def __post_init__(self) -> None:
        if self.decay not in _DECAYS:
            raise ConfigError(f"schedule.decay: expected one of {', '.join(_DECAYS)}, found '{self.decay}'.")
        if not 0 <= self.average <= 1:
            raise ConfigError(f"schedule.average lies in [0, 1], found {self.average}.")
        if self.patience < 0 or (self.patience and self.decay != "hold"):
            raise ConfigError("schedule.patience is 0 or more, and above 0 it needs schedule.decay=hold.")
        if self.patience and self.average > _FALL:  # of a run that is cut short only the fall is sure to be ahead
            raise ConfigError(f"schedule.average is at most {_FALL} with schedule.patience, found {self.average}.")

    def factor(self, step: int, steps: int) -> float:
        """Of the rate at ``step`` of ``steps``."""
        return _DECAYS[self.decay](step / steps)

    def weight(self, step: int, steps: int) -> float:
        """What the iterate after ``step`` of ``steps`` weighs in the running mean: 0 outside it, 1 for its first."""
        first = steps - max(1, round(self.average * steps))
        return 1 / (step - first + 1) if step >= first else 0.0

    def end(self, losses: Sequence[float]) -> int | None:
        """When a run ends whose loss has stopped falling: at this step; None if it has not.

        Args:
            losses: Of every step so far.
        """
        if not self.patience or len(losses) < 2 * self.patience:
            return None
        before, recent = (sum(losses[-n:][: self.patience]) for n in (2 * self.patience, self.patience))
        return round(len(losses) / (1 - _FALL)) if recent > (1 - _PLATEAU) * before else None
