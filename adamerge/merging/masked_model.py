"""A frozen network called with weights that are merged within a mask."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge.merging.merge import Contraction
from adamerge.merging.merged_model import MergedModel


class MaskedModel(MergedModel):
    """``MergedModel`` with θ = θ₀ + m̃ ∘ v, v = Σ_k λ_k τ_k being the merged direction.

    One pass over τ gives v. With g = ∂L/∂θ, one pass over τ gives ∂L/∂λ = contract(g ∘ m̃), and ∂L/∂m̃ = g ∘ v is
    elementwise: no graph per task, whatever the number of tasks.

    Attributes:
        mask: m̃ by key, where the weights are; what the next ``update`` and the gradients after it go by.
    """

    mask: Mapping[str, Tensor]
    _direction: Mapping[str, Tensor]

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, coefficients: Tensor, *, single_backward: bool = False) -> None:
        if not self._leaves:
            self._direction = {key: torch.empty_like(base) for key, base in self.bank.pretrained.items()}
        super().update(coefficients, single_backward=single_backward)
        for key, weights in self.weights().items():
            base, direction = self.bank.pretrained[key], self._direction[key]
            torch.sub(weights, base, out=direction)  # within one rounding of θ₀, as the merged weights themselves are
            torch.addcmul(base, direction, self.mask[key], out=weights)

    def coefficient_gradient(self) -> Tensor:
        if self._contraction is not None:
            return super().coefficient_gradient()
        contraction = Contraction(self.bank, self.partition)
        for key, leaf in self._leaves.items():
            if leaf.grad is not None:
                contraction.add(key, leaf.grad * self.mask[key])
        return contraction.result()

    def mask_gradient(self, key: str) -> Tensor:
        """∂L/∂m̃ of one tensor, of all losses that were back-propagated since the last ``update``."""
        gradient = self._leaves[key].grad
        return torch.zeros_like(self._direction[key]) if gradient is None else gradient * self._direction[key]

    def _arrived(self, key: str, leaf: Tensor) -> None:
        if self._contraction is not None and leaf.grad is not None:
            leaf.grad.mul_(self.mask[key])
        super()._arrived(key, leaf)
