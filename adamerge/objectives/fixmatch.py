"""FixMatch on two views of images without labels, and which of them a model is to be trusted on."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adamerge.errors import ConfigError, DataError
from adamerge.objectives.protocol import Outputs, Target


@dataclass(frozen=True)
class FixMatch:
    """Cross-entropy of the strong view with the trusted class, or with what the weak view says where it is sure.

    Trusted images: -log p'(trusted class). The others: -1[max σ > ω] Σ_c σ_c log p'_c with σ_c = p_c^a / Σ p^a, where p
    is predicted from the weak view, without a gradient, and p' from the strong view. ω rises linearly over the run.

    Args:
        exponent: a.
        first_threshold: ω at the first step.
        last_threshold: ω that would be reached after the last.
        trusted_per_class: Most images that are trusted of a class, as ``trusted_classes`` takes it.
        trusted_share: Of a batch that is drawn from the trusted images.
        epochs: How often in a run, at equal distances, the trusted images are chosen anew.

    Raises:
        ConfigError: If an option is out of range.

    Differs: from the released code, in which ω is 0.99 throughout, the multiplication by a and renormalisation that
    stand for the power change nothing, images are trusted once and for all, ten times fewer of a class, and a mask
    that is indexed by the ranking of the last class marks every image as trusted, so that the objective is
    cross-entropy with the first zero-shot predictions; its best epoch is chosen by labels. Here all is as in the paper.

    Source: aTLAS, arXiv:2407.02880; FixMatch, arXiv:2001.07685.
    """

    exponent: float
    first_threshold: float
    last_threshold: float
    trusted_per_class: int
    trusted_share: float
    epochs: int
    needs: Literal["views"] = "views"
    layers = ()

    def __post_init__(self) -> None:
        if self.exponent <= 0:
            raise ConfigError(f"objective.exponent is above 0, found {self.exponent}.")
        if not 0 <= self.trusted_share <= 1:
            raise ConfigError(f"objective.trusted_share lies in [0, 1], found {self.trusted_share}.")
        if self.trusted_per_class < 1 or self.epochs < 1:
            raise ConfigError("objective.trusted_per_class and objective.epochs are at least 1.")

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        if target.weak is None or target.trusted is None:
            raise DataError("FixMatch needs weak views and trusted classes, and these images have none.")
        trusted = cross_entropy(outputs.logits, target.trusted.clamp(min=0), reduction="none")
        soft = (self.exponent * target.weak.logits.detach()).softmax(-1)
        sure = soft.amax(-1) > self.threshold(target.progress)
        other = -(soft * outputs.logits.log_softmax(-1)).sum(-1) * sure
        return torch.where(target.trusted >= 0, trusted, other)

    def threshold(self, progress: float) -> float:
        """ω after a share of the run."""
        return self.first_threshold + progress * (self.last_threshold - self.first_threshold)


def trusted_classes(logits: Tensor, per_class: int) -> Tensor:
    """The class that each image is trusted to be of.

    A class picks the images that it is most probable for, N / C of them or ``per_class``, whichever is less, but
    at least one. An image that several pick goes to the most probable of those.

    Args:
        logits: Zero-shot logits of a task's images, (N, C).
        per_class: Most images of a class.

    Returns:
        int64 (N,); -1 for images that no class picks.
    """
    probabilities = logits.float().softmax(-1)
    count, classes = probabilities.shape
    most = max(1, min(count // classes, per_class))
    ranking = probabilities.argsort(dim=0, descending=True, stable=True)[:most]  # (most, C)
    picked = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(0, ranking, True)
    best = probabilities.masked_fill(~picked, -1).argmax(-1)
    return torch.where(picked.any(-1), best, -1)
