"""AdaMerging written down a second time, as plainly as torch allows, to compare the package with.

Nothing of adamerge is imported or looked up here. λ is a (K, G) leaf, the merged weights are the Python expression
θ₀ + λ₀ τ₀ + λ₁ τ₁ + …, autograd does the rest. Every loss gets a backward pass of its own through that expression.

Rule (SPECS A1): θ(λ) = θ₀ + Σ_k c(λ_k) τ_k with c the clip to [0, 1] (or another constraint), loss = Σ_tasks Σ_batches
mean_images H(softmax(W_k f̂_θ(x))), one Adam step on λ. The task's head W_k carries CLIP's logit scale already.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

Weights = Mapping[str, Tensor]
Batches = Sequence[Sequence[Tensor]]
"""``batches[task]``: the image batches of one step, whose mean entropies are summed."""

CONSTRAINTS = {
    "identity": lambda raw: raw,
    # Slope 1 on [0, 1], ends included, and 0 outside. (The slope of torch.clip at the ends depends on torch's version.)
    "clamp": lambda raw: torch.where((raw >= 0) & (raw <= 1), raw, (raw > 1).to(raw.dtype)),
    "sigmoid": lambda raw: 1 / (1 + torch.exp(-raw)),
    "softmax": lambda raw: torch.exp(raw) / torch.exp(raw).sum(0, keepdim=True),
}


def groups_of(theta0: Weights, granularity: str) -> tuple[list[str], dict[str, list[tuple[int, int]]]]:
    """Names of the groups, and per key the lengths and groups of consecutive pieces of the flattened tensor."""
    if granularity == "task":
        return ["all"], {key: [(tensor.numel(), 0)] for key, tensor in theta0.items()}
    if granularity == "tensor":
        return list(theta0), {key: [(tensor.numel(), group)] for group, (key, tensor) in enumerate(theta0.items())}
    if granularity == "block":
        depth = {key: _depth(key, theta0) for key in theta0}
        levels = sorted(set(depth.values()))
        return [str(level) for level in levels], {
            key: [(tensor.numel(), levels.index(depth[key]))] for key, tensor in theta0.items()
        }
    names: list[str] = []
    pieces: dict[str, list[tuple[int, int]]] = {}
    if granularity.startswith("random"):
        for key, tensor in theta0.items():
            count = min(int(granularity.removeprefix("random(").removesuffix(")")), tensor.numel())
            pieces[key] = [(1, len(names) + _draw(key, entry, count)) for entry in range(tensor.numel())]
            names += [f"{key}[{i}]" for i in range(count)]
        return names, pieces
    for key, tensor in theta0.items():
        size = tensor.numel()
        if granularity == "row":
            count = len(tensor) if tensor.dim() > 1 else 1
        else:
            count = int(granularity.removeprefix("chunk(").removesuffix(")"))
        cuts = sorted({size * i // count for i in range(count + 1)})  # a set: short tensors have fewer chunks
        pieces[key] = []
        for start, stop in pairwise(cuts):
            pieces[key].append((stop - start, len(names)))
            names.append(f"{key}[{len(pieces[key]) - 1}]")
    return names, pieces


@cache
def _draw(key: str, entry: int, count: int) -> int:
    """SplitMix64's number ``entry`` of the stream that SHA-256 of seed 0 and the key starts, modulo ``count``."""
    z = (entry * 0x9E3779B97F4A7C15 + int.from_bytes(hashlib.sha256(f"0/{key}".encode()).digest()[:7], "big")) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return ((z ^ z >> 31) >> 32) % count


def _depth(key: str, theta0: Weights) -> int:
    """0 for what comes before the first transformer block, then 1 + block, then one more for the output side."""
    words = key.split(".")
    if "resblocks" in words:
        return 1 + int(words[words.index("resblocks") + 1])
    if "ln_post" in words or "proj" in words:
        return 1000
    return 0


def merged_weights(theta0: Weights, experts: Sequence[Weights], coefficients: Tensor, granularity: str) -> Weights:
    """θ₀ + Σ_k λ_k τ_k, with autograd's own graph in λ (K, G)."""
    _, pieces = groups_of(theta0, granularity)
    merged = {}
    for key, base in theta0.items():
        total = base
        for task, expert in enumerate(experts):
            task_vector = (expert[key] - base).flatten()
            scaled, start = [], 0
            for length, group in pieces[key]:
                scaled.append(coefficients[task, group] * task_vector[start : start + length])
                start += length
            total = total + torch.cat(scaled).view_as(base)
        merged[key] = total
    return merged


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean over images of −Σ_c p_c log p_c, in nats."""
    log_p = torch.log_softmax(logits, dim=1)
    return (-(log_p.exp() * log_p).sum(1)).mean()


def losses(
    network: nn.Module,
    theta0: Weights,
    experts: Sequence[Weights],
    heads: Sequence[Tensor],
    batches: Batches,
    coefficients: Tensor,
    granularity: str = "tensor",
) -> list[Tensor]:
    """One entropy loss per task: the sum over its batches."""
    weights = merged_weights(theta0, experts, coefficients, granularity)
    found = []
    for head, images_of_task in zip(heads, batches, strict=True):
        total = 0.0
        for images in images_of_task:
            features = functional_call(network, dict(weights), (images,))
            features = features / features.norm(dim=1, keepdim=True)
            total = total + mean_entropy(features @ head.T)
        found.append(total)
    return found


def gradient(
    network: nn.Module,
    theta0: Weights,
    experts: Sequence[Weights],
    heads: Sequence[Tensor],
    batches: Batches,
    raw: Tensor,
    *,
    constraint: str = "clamp",
    granularity: str = "tensor",
) -> Tensor:
    """∂loss/∂raw, (K, G), at the raw parameter ``raw`` (λ = constraint(raw)): one backward pass per task."""
    raw = raw.detach().clone().requires_grad_()
    per_task = losses(network, theta0, experts, heads, batches, CONSTRAINTS[constraint](raw), granularity)
    for loss in per_task:
        loss.backward(retain_graph=True)
    return raw.grad


def learn(
    network: nn.Module,
    theta0: Weights,
    experts: Sequence[Weights],
    heads: Sequence[Tensor],
    batches: Sequence[Batches],
    steps: int,
    lr: float = 1e-3,
    init: float = 0.3,
    *,
    constraint: str = "clamp",
    granularity: str = "tensor",
) -> Tensor:
    """The raw coefficients (K, G) after ``steps`` steps of Adam.

    Args:
        network: Any module that maps images (B, …) to features (B, d).
        theta0: Pretrained weights, by names of the network's parameters.
        experts: One such mapping per task.
        heads: Per task (C, d), times the logit scale.
        batches: ``batches[step][task]`` is a list of image batches.
        steps: How many of them to use.
        lr: Learning rate.
        init: Value of every raw coefficient at the start.
        constraint: Raw coefficient to λ.
        granularity: ``task``, ``tensor``, ``block`` or ``chunk(n)``.
    """
    some = next(iter(theta0.values()))
    names, _ = groups_of(theta0, granularity)
    raw = torch.full((len(experts), len(names)), init, dtype=some.dtype, requires_grad=True)
    first, second = torch.zeros_like(raw), torch.zeros_like(raw)
    for step in range(steps):
        slope = gradient(
            network, theta0, experts, heads, batches[step], raw, constraint=constraint, granularity=granularity
        )
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        raw = raw.detach() - lr * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return raw
