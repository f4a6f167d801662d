"""Entropy of predictions: the objective that needs no labels."""

from typing import Literal

from torch import Tensor

from adamerge.errors import ShapeError
from adamerge.objectives.protocol import Outputs, Target


def softmax_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the predicted class distribution, per image.

    H = -Σ_c p_c log p_c, computed in float32 or wider through log-softmax, so that p = 0 is exact.

    Args:
        logits: Already multiplied by CLIP's logit scale, (B, C).

    Returns:
        Entropy in nats, (B,), between 0 and log C.

    Raises:
        ShapeError: If ``logits`` is not two-dimensional.

    Source: AdaMerging, arXiv:2310.02575.
    """
    if logits.dim() != 2:
        raise ShapeError(f"logits must be (B, C), found {tuple(logits.shape)}. Flatten the batch dimensions first.")
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


class Entropy:
    """``softmax_entropy`` as an objective."""

    needs: Literal["images"] = "images"
    layers = ()

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        return softmax_entropy(outputs.logits)
