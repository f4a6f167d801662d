"""PCB-Merging: parameters compete for their coordinate, and the weak drop out."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError
from adamerge.methods.coordinates import blocks, total
from adamerge.methods.protocol import NOTHING, Context, Transform
from adamerge.methods.transforms.quantiles import kth_smallest


@dataclass(frozen=True)
class Pcb(Transform):
    """ŝ_k τ̄_k / Σ_j ŝ_j: each task's share in a mean that is weighted by scores, which are mostly zero.

    τ̄_k is τ_k with magnitudes clamped to two quantiles of its own, n_k those magnitudes brought to [0, 1]. Of the score
    b_k = exp(K·n_k²) · tanh(inter_k), importance within the task times agreement among tasks, only what exceeds its
    (1 - density) quantile counts: ŝ_k is max(b_k, quantile) brought to [0, 1]. All quantiles, minima and maxima are
    each task's, over all mergeable tensors together. Only coordinates that a task keeps move; one that a single task
    keeps gets its whole τ̄. Task Arithmetic on these vectors is PCB-Merging.

    Args:
        density: Fraction of each task's entries whose scores count, in (0, 1]; the paper's mask ratio r.
        clip: Fraction of magnitudes clamped at either end, in [0, 0.5).
        agreement: inter_k: ``normalized`` (τ_k · Σ_j sign(τ_j) n_j), ``raw`` (τ_k · Σ_j τ_j), or ``pairwise``, which
            puts Σ_j tanh(sign(τ_k) n_k · sign(τ_j) n_j) in place of its tanh.
        structural_zeros: Zeros that the quantiles count besides, those of tensors that are not merged.

    Differs: this is the original repository's script for vision. Its stand-alone version is ``density=0.1
    clip=0.0001 agreement=raw``; its evolutionary version ``agreement=pairwise``, with a searched scaling per task,
    which is not offered. The paper has a softmax for our exp, which differs by a factor that ŝ does not see, of the
    square itself brought to [0, 1]. The repository counts the text tower's zeros too (``structural_zeros=25599489`` for
    ViT-B/32), and divides by zero where all magnitudes or all scores are equal, for which n or ŝ is 0 here.

    Raises:
        ConfigError: If an option is out of range.

    Source: PCB-Merging, arXiv:2410.02396.
    """

    density: float
    clip: float
    agreement: Literal["normalized", "raw", "pairwise"]
    structural_zeros: int

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is the fraction of entries that count, in (0, 1]; found {self.density}.")
        if not 0 <= self.clip < 0.5:
            raise ConfigError(
                f"clip is the fraction of magnitudes clamped at either end, in [0, 0.5); found {self.clip}."
            )
        if self.agreement not in ("normalized", "raw", "pairwise"):
            raise ConfigError(f"unknown agreement '{self.agreement}'. Choose normalized, raw or pairwise.")
        if self.structural_zeros < 0:
            raise ConfigError(f"structural_zeros is a count, 0 or more; found {self.structural_zeros}.")

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        size = sum(tensor.numel() for tensor in bank.pretrained.values()) + self.structural_zeros
        first = int(size * self.clip)  # both counted from zero, rounded as the original does
        last = max(first, int(size * (1 - self.clip) - 1))

        def read(values: Callable[[Tensor], Tensor]) -> Callable[[], Iterator[Tensor]]:
            return lambda: (values(_wide(bank.task_vectors[key])) for key in context.track(list(bank.pretrained)))

        bounds = kth_smallest(read(torch.abs), [first + 1, last + 1], zeros=self.structural_zeros)

        def scores(task_vectors: Tensor) -> Tensor:
            return torch.cat([self._scores(part, bounds) for part in blocks(task_vectors)], dim=1)

        kept = int(size * (1 - self.density)) + 1
        threshold, largest = kth_smallest(read(scores), [kept, size], zeros=self.structural_zeros)

        def apply(key: str, task_vectors: Tensor) -> Tensor:
            shares = []
            for part in blocks(_wide(task_vectors)):
                weights = _unit(self._scores(part, bounds), threshold, largest)
                share = weights / total(weights).clamp(min=1e-12)
                shares.append((share * _clamped(part, bounds)).to(task_vectors.dtype))
            return torch.cat(shares, dim=1).view(task_vectors.shape)

        return apply

    def to_json(self) -> dict[str, Any]:
        return {"name": "pcb", **asdict(self)}

    def _scores(self, task_vectors: Tensor, bounds: Tensor) -> Tensor:
        """b over exp(K), which ŝ does not see and no number of tasks makes overflow: (K, n), float32."""
        signs = task_vectors.sign()
        unit = _unit(task_vectors.abs(), *bounds)
        intra = (len(task_vectors) * (unit.square() - 1)).exp()
        signed = signs * unit
        if self.agreement == "pairwise":
            inter = torch.stack([total((one * signed).tanh()) for one in signed])
        else:
            shared = total(signed if self.agreement == "normalized" else task_vectors)
            inter = (task_vectors * shared.to(task_vectors.dtype)).tanh()
        return (intra * inter).float()


def _wide(task_vectors: Tensor) -> Tensor:
    return task_vectors.float() if task_vectors.dtype.itemsize < 4 else task_vectors


def _clamped(task_vectors: Tensor, bounds: Tensor) -> Tensor:
    """(K, n) with magnitudes between the bounds (2, K), signs as they are."""
    low, high = bounds[:, :, None]
    return task_vectors.abs().clamp(low, high) * task_vectors.sign()


def _unit(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(K, n) clamped to [low, high], (K,) each, and brought to [0, 1]; 0 where the two are equal."""
    low, high = low[:, None], high[:, None]
    span = high - low
    return (values.clamp(low, high) - low) / torch.where(span > 0, span, 1)
