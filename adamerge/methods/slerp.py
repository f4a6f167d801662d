"""Spherical interpolation among sums of task vectors, by the inner products of those alone."""

import torch
from torch import Tensor


def unit_gram(gram: Tensor) -> Tensor:
    """Inner products (G, K, K) by group, over the largest square of each: lengths in common are of no account."""
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)  # (G,)
    return gram / torch.where(largest > 0, largest, 1)[:, None, None]


def angle(coefficients: Tensor, square: Tensor, gram: Tensor, *, parallel: float) -> tuple[Tensor, Tensor, Tensor]:
    """The angle α between V = Σ_{k<i} c_k τ_k and τ_i.

    Args:
        coefficients: c, (i, G).
        square: ‖V‖², (G,).
        gram: ⟨τ_j, τ_k⟩, (G, K, K).
        parallel: sin² α up to which the two count as parallel.

    Returns:
        Cosine and sine (G,), and where there is no angle to speak of, bool (G,): the vectors are parallel, or one is
        zero. There cosine and sine are those of a right angle, lest their gradients be infinite.
    """
    task = len(coefficients)
    size = square * gram[:, task, task]
    there = size > 0
    cosine = _product(coefficients, gram) / torch.where(there, size, 1).sqrt()
    linear = ~there | (1 - cosine.square() <= parallel)
    cosine = torch.where(linear, 0, cosine)
    return cosine, (1 - cosine.square()).sqrt(), linear


def join(
    coefficients: Tensor, square: Tensor, gram: Tensor, old: Tensor, new: Tensor, *, parallel: float
) -> tuple[Tensor, Tensor]:
    """[sin((1 - β)α) V + sin(βα) τ_i] / sin α, or (1 - β) V + β τ_i where there is no angle.

    Args:
        coefficients: V's, (i, G).
        square: ‖V‖², (G,).
        gram: ⟨τ_j, τ_k⟩, (G, K, K).
        old: 1 - β, (G,): given beside β, so that neither is lost where the other is almost 1.
        new: β, (G,).
        parallel: As ``angle`` takes it.

    Returns:
        The coefficients (i + 1, G) of the result, and its square (G,).
    """
    task = len(coefficients)
    cosine, sine, linear = angle(coefficients, square, gram, parallel=parallel)
    alpha = torch.atan2(sine, cosine)
    old = torch.where(linear, old, (old * alpha).sin() / alpha.sin())
    new = torch.where(linear, new, (new * alpha).sin() / alpha.sin())
    crossed = 2 * old * new * _product(coefficients, gram)
    square = old.square() * square + new.square() * gram[:, task, task] + crossed
    return torch.cat([old * coefficients, new[None]]), square.clamp(min=0)


def _product(coefficients: Tensor, gram: Tensor) -> Tensor:
    """⟨V, τ_i⟩, (G,)."""
    task = len(coefficients)
    return (coefficients * gram[:, :task, task].T).sum(0)
