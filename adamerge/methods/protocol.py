"""What a transform of task vectors and a static merge are; a learned method is a ``methods.learned.Learner``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform


class Statistic(Protocol):
    """Something about every expert that a method needs beside its weights; ``adamerge.statistics`` has them.

    Attributes:
        needs: The images that it is computed from: ``images`` without labels, ``labels`` (the labelled split), or
            ``nothing``.
        images_per_task: How many of them; None for all.
    """

    @property
    def needs(self) -> Literal["images", "labels", "nothing"]: ...

    @property
    def images_per_task(self) -> int | None: ...

    def __call__(self, expert: Any) -> dict[str, Tensor]:
        """Tensors by name, the same names for every expert; of an ``adamerge.statistics.Expert``."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Name and options: part of what a computed statistic is looked up by."""
        ...


@dataclass(frozen=True)
class Context:
    """What a transform or a static merge may use besides the bank.

    Attributes:
        statistics: Of its ``statistic``, by name: (K, …), tasks in the bank's order; read when asked for.
        recompute: The same statistics where some tensors of every expert are replaced by those given first, for the
            keys given second; for methods that walk through the network.
        track: Wraps the items of a loop that takes long, to show its progress.
    """

    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    recompute: Callable[[Mapping[str, Tensor], Iterable[str]], Mapping[str, Tensor]] | None = None
    track: Callable[[Iterable[str]], Iterable[str]] = iter


NOTHING = Context()
"""For methods whose bank is enough."""


class Transform(ABC):
    """Bank → bank, in two phases: statistics over all task vectors first, then tensor by tensor."""

    @property
    def statistic(self) -> Statistic | None:
        """What must be known about the experts; None where their weights are enough."""
        return None

    @abstractmethod
    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        """Gather statistics; return the map ``(key, (K, *shape)) → (K, *shape)``."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Name and options, for the record beside the coefficients."""


class StaticMethod(Protocol):
    """Merges without learning.

    Attributes:
        statistic: What must be known about the experts; None where their weights are enough.
    """

    @property
    def statistic(self) -> Statistic | None: ...

    def __call__(self, bank: ParameterBank, context: Context = ...) -> dict[str, Tensor]:
        """Merged tensors by key; the bank stays as it is."""
        ...

    def candidates(self, bank: ParameterBank, context: Context = ...) -> Iterator[tuple[Self, dict[str, Tensor]]]:
        """What to choose from on labelled images, each with what it makes of the bank; one where all is fixed."""
        ...

    def merit(
        self, merged: Mapping[str, float], pretrained: Mapping[str, float], experts: Mapping[str, float]
    ) -> float | None:
        """What a candidate is worth by accuracies on labelled images, by task; None where it will not do."""
        ...


def mean_normalized(merged: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """Mean over tasks of accuracy(merged) / accuracy(expert); tasks whose expert gets nothing right count as 0."""
    return sum(accuracy / experts[task] for task, accuracy in merged.items() if experts[task]) / len(merged)
