"""LiNeS: what another method merged, scaled by depth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.coordinates import total
from adamerge.methods.protocol import NOTHING, Context, Statistic
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.transforms.lines import depths


@dataclass(frozen=True, kw_only=True)
class LinesMerging(Scaled):
    """θ₀ + (α + scaling · depth) · merged vector, depth going from 0 in the first block to 1 in the last.

    ``scaling`` is the paper's β. The merged vector is what another method makes before its own scaling, which takes no
    part. Unless it is given, α = ‖Σ_k τ_k‖₁ / (K ‖merged vector‖₁) over all mergeable tensors: 1/K for Task Arithmetic,
    and for other methods what makes the first block as large.

    Args:
        merging: The method whose merged vector is scaled; a transform of task vectors is either's.
        alpha: α; by norms where it is None.
        embedding_depth: Depth of tensors before the blocks; published: 0.
        output_depth: Depth of tensors after the blocks; published: 0 (learned coefficients tend to be larger there).

    Raises:
        ConfigError: When merging, if no merged tensor belongs to a block.

    Source: LiNeS, arXiv:2410.17146.
    """

    merging: Scaled
    alpha: float | None
    embedding_depth: float
    output_depth: float

    @property
    def statistic(self) -> Statistic | None:
        return self.merging.statistic or super().statistic

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        transform = self.merging.transform
        if transform is None:
            return self.merging.fit(bank, context)
        apply = transform.fit(bank, context)
        merge = self.merging.fit(bank.transformed(apply), context)
        return lambda key, task_vectors: merge(key, apply(key, task_vectors))

    def __call__(self, bank: ParameterBank, context: Context = NOTHING) -> dict[str, Tensor]:
        if isinstance(self.scaling, str):
            raise ConfigError("the scaling has not been searched for yet. Choose one of candidates() first.")
        return next(self.candidates(bank, context))[1]

    @torch.no_grad()
    def candidates(self, bank: ParameterBank, context: Context = NOTHING) -> Iterator[tuple[Self, dict[str, Tensor]]]:
        depth = depths(bank.pretrained, self.embedding_depth, self.output_depth)
        vector = self.vector(bank, context)
        alpha = _alpha(bank, vector) if self.alpha is None else self.alpha
        for beta in self.grid if isinstance(self.scaling, str) else [self.scaling]:
            yield (
                replace(self, scaling=beta),
                {key: base.add(vector[key], alpha=alpha + beta * depth[key]) for key, base in bank.pretrained.items()},
            )


def _alpha(bank: ParameterBank, vector: Mapping[str, Tensor]) -> float:
    """‖Σ_k τ_k‖₁ / (K ‖merged vector‖₁); 1/K where nothing was merged."""
    before = sum(float(total(task_vectors).abs().sum()) for task_vectors in bank.task_vectors.values())
    after = sum(float(total(tensor[None]).abs().sum()) for tensor in vector.values())
    return (before / after if after else 1.0) / bank.num_tasks
