"""WIDEN: every expert's columns weigh by how far their magnitude and direction have moved."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class Widen(Scaled):
    """θ₀ + scaling · Σ_k s_k ∘ τ_k, with a score s_k for every column of a matrix (one for each input).

    A column has a magnitude, its norm, and a direction. By how much an expert's differ from θ₀'s, |m_k - m_0| and
    1 - cos(d_k, d_0), ranks its columns from 0 to n - 1; over n, ranks become scores by a softmax over the experts,
    but those above ``ratio`` times their mean become ``calibration``. s is the mean of both scores. What has one
    dimension has |τ| in place of ranks.

    Scores may add up to K ``calibration``, so that a scaling below 1 may be called for where there are many tasks.
    A column that is zero in both models has not moved; one that is zero in one of them has a cosine of 0.

    Args:
        ratio: Of the mean rank, above which a column is important.
        calibration: The score of important columns.

    Differs: the reference code has linear layers and token embeddings alone, the latter transposed, so that a column
    belongs to a token. Here CLIP's ``proj`` and positional embedding are taken transposed likewise, and convolutions
    with a column per input and place in the kernel. The paper has no scaling: it is 1.

    Raises:
        ConfigError: If an option is out of range.

    Source: WIDEN, arXiv:2408.03092.
    """

    ratio: float
    calibration: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ratio >= 0 and self.calibration >= 0):
            raise ConfigError(
                f"method.ratio and method.calibration are at least 0, found {self.ratio:g} and {self.calibration:g}."
            )

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return lambda key, task_vectors: self._merge(key, bank.pretrained[key], task_vectors)

    def _merge(self, key: str, pretrained: Tensor, task_vectors: Tensor) -> Tensor:
        num_tasks, shape = len(task_vectors), task_vectors.shape[1:]
        if len(shape) < 2:
            scores = self._scores(task_vectors.abs().reshape(num_tasks, -1).to(_wide(task_vectors)))
            return (scores.reshape_as(task_vectors).to(task_vectors) * task_vectors).sum(0)
        turned = key.endswith(_INPUTS_FIRST) and len(shape) == 2
        base, columns = (_columns(tensor, turned) for tensor in (pretrained[None], task_vectors))
        magnitudes, directions = _movements(base[0], columns)
        size = columns.shape[2]
        scores = (self._scores(_ranks(magnitudes), size) + self._scores(_ranks(directions), size)) / 2
        merged = (scores.to(columns)[:, None] * columns).sum(0)
        return merged.T.contiguous() if turned else merged.reshape(shape)

    def _scores(self, significance: Tensor, unit: int = 1) -> Tensor:
        """(K, n) → (K, n); ``unit`` is divided by only after the comparison with the mean, which it might round."""
        important = significance > self.ratio * significance.mean(1, keepdim=True)
        return (significance / unit).softmax(0).masked_fill(important, self.calibration)


_INPUTS_FIRST = (".proj", "positional_embedding")
"""Matrices with a row per input: what multiplies from the right, and embeddings."""


def _columns(tensors: Tensor, turned: bool) -> Tensor:
    """Matrices (…, outputs, inputs) of tensors (K, *shape)."""
    return tensors.mT if turned else tensors.flatten(2)


def _movements(base: Tensor, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
    """By how much magnitudes and directions of columns differ: θ₀ (m, n), τ (K, m, n) → two of (K, n)."""
    wide = _wide(base)
    base = base.to(wide)
    old = base.norm(dim=0)
    old_directions = base / torch.where(old > 0, old, 1)
    magnitudes, directions = [], []
    for task_vector in task_vectors:
        expert = base + task_vector.to(wide)
        new = expert.norm(dim=0)
        # 1 - cos of unit vectors is half the square of their distance, which does not cancel.
        apart = (expert / torch.where(new > 0, new, 1) - old_directions).square().sum(0) / 2
        magnitudes.append((new - old).abs())
        directions.append(torch.where((old > 0) != (new > 0), 1, apart))
    return torch.stack(magnitudes), torch.stack(directions)


def _ranks(movements: Tensor) -> Tensor:
    """From 0 for the smallest of a row to n - 1; of equals the first has the smaller one, (K, n) → (K, n)."""
    return movements.argsort(dim=1, stable=True).argsort(dim=1).to(movements)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
