"""Coefficients of task vectors that are joined one after another along great circles."""

from math import log

import torch
from torch import Tensor, nn

from adamerge.methods.slerp import angle, join, unit_gram


class Slerp(nn.Module):
    """A constraint: weights a_1, …, a_K > 0 and a norm s → λ = s · c(a), where Σ_k c_k τ_k = V_K and

    V_1 = τ_1,  V_i = [sin((1 - β)α) V_{i-1} + sin(βα) τ_i] / sin α,  β = a_i / (a_i + mean(a_1 … a_{i-1})),

    with α the angle between V_{i-1} and τ_i. Each V is a sum of task vectors, so that inner products of those are all
    that it takes. Where the sine all but vanishes, or a vector does, the step is linear: (1 - β) V_{i-1} + β τ_i.

    The raw parameter is (K + 1, G): log a, of which a constant may be taken without effect, and then s. The result
    depends on the order of the tasks; that it may be any λ ≥ 0, ``inverse`` shows.

    Args:
        gram: ⟨τ_j, τ_k⟩ over each group's entries, (G, K, K).

    Source: Self Positioning; SLERP is Shoemake's, SIGGRAPH 1985.
    """

    range = "at least 0"

    def __init__(self, gram: Tensor) -> None:
        super().__init__()
        self.gram: Tensor
        self.register_buffer("gram", unit_gram(gram).to(torch.get_default_dtype()), persistent=False)

    def __str__(self) -> str:
        return "slerp"

    def forward(self, raw: Tensor) -> Tensor:
        """λ, (K, G)."""
        weights, norm = raw[:-1], raw[-1]
        coefficients, square = self._first(weights)
        for task in range(1, len(weights)):
            odds = weights[task] - _log_mean(weights[:task])
            coefficients, square = self._join(coefficients, square, odds)
        return norm * coefficients

    def inverse(self, coefficients: Tensor) -> Tensor:
        """(log a, s) of λ ≥ 0; a λ of 0 is reached up to what the dtype resolves."""
        smallest = torch.finfo(coefficients.dtype).tiny
        weights, norm = torch.zeros_like(coefficients[:1]), coefficients[0]
        joined, square = self._first(coefficients)
        for task in range(1, len(coefficients)):
            # βα and (1 - β)α are the angles between τ_i's direction, V_{i-1}'s, and that of their sum.
            cosine, sine, linear = angle(joined, square, self.gram, parallel=_parallel(square))
            added = coefficients[task]
            new = torch.where(linear, added, torch.atan2(added * sine, norm + added * cosine))
            old = torch.where(linear, norm, torch.atan2(norm * sine, added + norm * cosine))
            odds = new.clamp(min=smallest).log() - old.clamp(min=smallest).log()
            length = (norm.square() + added.square() + 2 * norm * added * cosine).clamp(min=0).sqrt()
            norm = torch.where(linear, norm + added, length)
            weights = torch.cat([weights, (odds + _log_mean(weights))[None]])
            joined, square = self._join(joined, square, odds)
        return torch.cat([weights, norm[None]])

    def admits(self, coefficients: Tensor) -> bool:
        return bool((coefficients >= 0).all())

    def _first(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """V_1's coefficients (1, G) and ‖V_1‖² (G,)."""
        return torch.ones_like(like[:1]), self.gram[:, 0, 0]

    def _join(self, coefficients: Tensor, square: Tensor, odds: Tensor) -> tuple[Tensor, Tensor]:
        """V_i's coefficients (i, G) and ‖V_i‖² (G,) from V_{i-1}'s and log(β / (1 - β)), (G,)."""
        return join(coefficients, square, self.gram, (-odds).sigmoid(), odds.sigmoid(), parallel=_parallel(square))


def _parallel(like: Tensor) -> float:
    """sin² of an angle that the dtype no longer tells from none."""
    return torch.finfo(like.dtype).eps ** 0.5


def _log_mean(logarithms: Tensor) -> Tensor:
    """Logarithm of the mean of what (i, G) are logarithms of, (G,)."""
    return logarithms.logsumexp(0) - log(len(logarithms))
