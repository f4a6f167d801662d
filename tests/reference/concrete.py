"""Concrete subspace learning written down a second time, as plainly as torch allows, to compare the package with.

Nothing of adamerge is imported. The mask, its division by the mean, and the merged weights are Python expressions in
the logits x and the coefficients λ, and autograd does the rest; the numbers u are handed in, so that both sides use the
same.

Rule (SPECS A5): m = σ((log u − log(1−u) + x)/t), m̃ = m / mean(m) per tensor, θ = θ₀ + Σ_k λ_k m̃∘τ_k. One step of
Concrete Task Arithmetic: Adam on x of the sum of the tasks' mean entropies. One of Concrete AdaMerging: first one step
of Adam or gradient descent at rate 1 on λ, from its initial value and with m̃ as a constant, on a batch of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from reference.layerwise import Batches, Weights, groups_of, mean_entropy
from torch import Tensor, nn
from torch.func import functional_call


def mask(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """m̃ of one tensor."""
    kept = 1 / (1 + torch.exp(-(torch.log(noise) - torch.log(1 - noise) + logits) / temperature))
    return kept / (kept.sum() / kept.numel())


@dataclass
class Adam:
    """Of one tensor, with torch's default betas and ε."""

    lr: float
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0
    steps: int = 0

    def step(self, value: Tensor, slope: Tensor) -> Tensor:
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.999 * self.second + 0.001 * slope**2
        corrected = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        return value - self.lr * corrected[0] / (corrected[1].sqrt() + 1e-8)


@dataclass
class Descent:
    """Gradient descent."""

    lr: float

    def step(self, value: Tensor, slope: Tensor) -> Tensor:
        return value - self.lr * slope


@dataclass
class Problem:
    """A merge, and how its mask is drawn.

    Attributes:
        network: Any module that maps images (B, …) to features (B, d).
        theta0: Pretrained weights, by names of the network's parameters.
        experts: One such mapping per task.
        heads: Per task (C, d), times the logit scale.
        temperature: t.
        granularity: Of λ.
    """

    network: nn.Module
    theta0: Weights
    experts: Sequence[Weights]
    heads: Sequence[Tensor]
    temperature: float = 0.5
    granularity: str = "tensor"
    pieces: dict[str, list[tuple[int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        _, self.pieces = groups_of(self.theta0, self.granularity)

    def weights(self, logits: Weights, noise: Weights, coefficients: Tensor) -> Weights:
        merged = {}
        for key, base in self.theta0.items():
            total = base
            for task, expert in enumerate(self.experts):
                lengths, groups = zip(*self.pieces[key], strict=True)
                of_entry = torch.cat(
                    [coefficients[task, group].expand(length) for length, group in zip(lengths, groups, strict=True)]
                )
                masked = mask(logits[key], noise[key], self.temperature) * (expert[key] - base)
                total = total + of_entry.view_as(base) * masked
            merged[key] = total
        return merged

    def loss(self, logits: Weights, noise: Weights, coefficients: Tensor, batches: Batches) -> Tensor:
        """Σ_tasks Σ_batches mean entropy."""
        weights = self.weights(logits, noise, coefficients)
        total = torch.zeros((), dtype=coefficients.dtype)
        for head, images_of_task in zip(self.heads, batches, strict=True):
            for images in images_of_task:
                features = functional_call(self.network, dict(weights), (images,))
                total = total + mean_entropy(features / features.norm(dim=1, keepdim=True) @ head.T)
        return total

    def mask_gradient(
        self, logits: Weights, noise: Weights, coefficients: Tensor, batches: Batches
    ) -> Mapping[str, Tensor]:
        leaves = {key: value.detach().clone().requires_grad_() for key, value in logits.items()}
        self.loss(leaves, noise, coefficients.detach(), batches).backward()
        return {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}

    def coefficient_gradient(self, logits: Weights, noise: Weights, coefficients: Tensor, batches: Batches) -> Tensor:
        leaf = coefficients.detach().clone().requires_grad_()
        self.loss({key: value.detach() for key, value in logits.items()}, noise, leaf, batches).backward()
        assert leaf.grad is not None
        return leaf.grad

    def learn(
        self,
        noise: Sequence[Weights],
        outer: Sequence[Batches],
        *,
        lr: float,
        start: Tensor,
        inner: Sequence[Batches] | None = None,
        outer_noise: Sequence[Weights] | None = None,
        inner_optimizer: Adam | Descent | None = None,
        inner_at: str = "initial",
    ) -> tuple[Weights, Tensor]:
        """Logits and λ after a step for each of ``noise`` and ``outer``.

        Args:
            noise: u of each step, by key.
            outer: Batches of each step.
            lr: Adam's, of the logits, which start at 0.
            start: Initial λ (K, G).
            inner: Batches of λ's steps.
            outer_noise: u of the outer merge, where it is another.
            inner_optimizer: Of λ, whose state goes on; None: λ stays.
            inner_at: Where λ's gradient is taken.
        """
        logits = {key: torch.zeros_like(base) for key, base in self.theta0.items()}
        optimizers = {key: Adam(lr) for key in logits}
        coefficients = start.clone()
        for step, drawn in enumerate(noise):
            if inner_optimizer is not None and inner is not None:
                at = start if inner_at == "initial" else coefficients
                slope = self.coefficient_gradient(logits, drawn, at, inner[step])
                coefficients = inner_optimizer.step(start, slope)
            used = drawn if outer_noise is None else outer_noise[step]
            slopes = self.mask_gradient(logits, used, coefficients, outer[step])
            logits = {key: optimizers[key].step(logits[key], slopes[key]) for key in logits}
        return logits, coefficients
