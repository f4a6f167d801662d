"""One scaling of a merged vector, given or searched for: what static merges have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import NOTHING, Context, Statistic, Transform, mean_normalized

MergeVectors = Callable[[str, Tensor], Tensor]
"""``(key, task vectors (K, *shape)) → merged vector (*shape)``, in float32 or wider."""


@dataclass(frozen=True, kw_only=True)
class Scaled(ABC):
    """θ₀ + scaling · merged vector, tensor by tensor.

    Args:
        scaling: The factor, or ``search``: the best of ``grid`` by mean normalised accuracy on the labelled split.
        grid: Factors to search.
        transform: Applied to the task vectors first.

    Raises:
        ConfigError: If ``scaling`` is another word, a search has no grid, or the transform needs another statistic.
    """

    scaling: float | Literal["search"]
    grid: Sequence[float]
    transform: Transform | None

    def __post_init__(self) -> None:
        if isinstance(self.scaling, str) and self.scaling != "search":
            raise ConfigError(f"scaling is a number or 'search', found '{self.scaling}'.")
        if self.scaling == "search" and not self.grid:
            raise ConfigError("scaling=search needs at least one factor in method.grid.")
        if self.transform and self.transform.statistic not in (None, self.statistic):
            raise ConfigError(
                "the method and its transform need to know different things about the experts, and a run gathers one. "
                "Give both the same statistic or leave out method.transform."
            )

    @property
    def statistic(self) -> Statistic | None:
        return self.transform.statistic if self.transform else None

    @abstractmethod
    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        """Gather what is needed over the whole bank; return how one tensor's task vectors become one vector.

        Args:
            bank: Its task vectors are transformed already, and each is computed or read when asked for: ask once.
            context: Statistics and progress.
        """

    @torch.no_grad()
    def vector(self, bank: ParameterBank, context: Context) -> dict[str, Tensor]:
        """The merged vector by key, before scaling, in the dtypes of θ₀."""
        seen = bank.transformed(self.transform.fit(bank, context)) if self.transform else bank
        merge = self.fit(seen, context)
        found = {}
        for key in context.track(list(bank.pretrained)):
            task_vectors, dtype = seen.task_vectors[key], bank.pretrained[key].dtype
            wide = task_vectors.float() if task_vectors.dtype.itemsize < 4 else task_vectors
            found[key] = merge(key, wide).to(dtype)
        return found

    def __call__(self, bank: ParameterBank, context: Context = NOTHING) -> dict[str, Tensor]:
        if isinstance(self.scaling, str):
            raise ConfigError("the scaling has not been searched for yet. Choose one of candidates() first.")
        return _add(bank, self.vector(bank, context), self.scaling)

    def candidates(self, bank: ParameterBank, context: Context = NOTHING) -> Iterator[tuple[Self, dict[str, Tensor]]]:
        if self.scaling != "search":
            yield self, self(bank, context)
            return
        vector = self.vector(bank, context)
        for factor in self.grid:
            yield replace(self, scaling=factor), _add(bank, vector, factor)

    def merit(
        self, merged: Mapping[str, float], pretrained: Mapping[str, float], experts: Mapping[str, float]
    ) -> float | None:
        return mean_normalized(merged, experts)


def _add(bank: ParameterBank, vector: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    return {key: base.add(vector[key], alpha=scaling) for key, base in bank.pretrained.items()}
