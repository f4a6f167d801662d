"""Which of a run's iterates is its result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adamerge.merging import MergedModel


@dataclass(frozen=True)
class Selection:
    """The best of the start and of every n-th iterate, by accuracies on labelled images.

    Attributes:
        every: Steps between two candidates.
        score: Merged model → accuracy by task.
        merit: Accuracies → what a candidate is worth, or None to end the run without it.
    """

    every: int
    score: Callable[[MergedModel], Mapping[str, float]]
    merit: Callable[[Mapping[str, float]], float | None]

    def __call__(self, model: MergedModel) -> float | None:
        return self.merit(self.score(model))
