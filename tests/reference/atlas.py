"""aTLAS written down a second time, as plainly as possible; nothing of adamerge is imported or looked up here.

Rules (SPECS A2, arXiv:2407.02880): θ = θ₀ + Σ_k λ_k τ_k with λ from zero, Σ_tasks mean_images CE plus half the mean
over groups of the p-norm across tasks; for a budget of b vectors per group those of the largest |∂L/∂λ| at zero.
Without labels: every class takes the images it is likeliest for, min(N / C, 100) of them; on those -log p'(class), on
the others -1[max σ > ω] Σ_c σ_c log p'_c with σ_c = p_c^a / Σ p^a of the plain view p and the strong view p'.
"""

from collections.abc import Mapping, Sequence
from math import exp, log

import torch
from reference import layerwise
from torch import Tensor, nn
from torch.func import functional_call

Weights = Mapping[str, Tensor]


def cross_entropies(
    network: nn.Module,
    theta0: Weights,
    experts: Sequence[Weights],
    heads: Sequence[Tensor],
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    coefficients: Tensor,
    granularity: str = "tensor",
) -> list[Tensor]:
    """Mean -log p(label) by task, with autograd's own graph in λ (K, G)."""
    weights = layerwise.merged_weights(theta0, experts, coefficients, granularity)
    found = []
    for head, of_task, truth in zip(heads, images, labels, strict=True):
        features = functional_call(network, dict(weights), (of_task,))
        logits = features / features.norm(dim=1, keepdim=True) @ head.T
        found.append((logits.logsumexp(1) - logits[torch.arange(len(truth)), truth]).mean())
    return found


def regulariser(coefficients: Sequence[Sequence[float]], norm: int) -> float:
    """Of λ[k][g]: half the mean over g of (Σ_k |λ|^p)^(1/p)."""
    groups = list(zip(*coefficients, strict=True))
    return 0.5 * sum(sum(abs(value) ** norm for value in group) ** (1 / norm) for group in groups) / len(groups)


def best(gradient: Sequence[Sequence[float]], budget: int) -> list[set[int]]:
    """By group, the tasks of the largest |gradient[k][g]|."""
    groups = zip(*gradient, strict=True)
    return [set(sorted(range(len(group)), key=lambda k: -abs(group[k]))[:budget]) for group in groups]


def probabilities(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    parts = [exp(value - top) for value in logits]
    return [part / sum(parts) for part in parts]


def trusted(logits: Sequence[Sequence[float]], per_class: int) -> list[int]:
    """The class that each image is trusted to be of, or -1; of several classes that take it the likeliest."""
    p = [probabilities(row) for row in logits]
    count, classes = len(p), len(p[0])
    most = max(1, min(count // classes, per_class))
    takers: list[list[int]] = [[] for _ in p]
    for c in range(classes):
        for image in sorted(range(count), key=lambda i: -p[i][c])[:most]:
            takers[image].append(c)
    return [max(of_image, key=lambda c: p[i][c]) if of_image else -1 for i, of_image in enumerate(takers)]


def fixmatch(
    strong: Sequence[float], weak: Sequence[float], trusted_class: int, exponent: float, threshold: float
) -> float:
    """The loss of one image."""
    seen = probabilities(strong)
    if trusted_class >= 0:
        return -log(seen[trusted_class])
    powers = [p**exponent for p in probabilities(weak)]
    soft = [power / sum(powers) for power in powers]
    return -sum(s * log(p) for s, p in zip(soft, seen, strict=True)) if max(soft) > threshold else 0.0
