"""Agreement with each task's own expert, on images without labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import ConfigError, DataError
from adamerge.objectives.protocol import Outputs, Target


@dataclass(frozen=True)
class Alignment:
    """The distance between what the merged model and the task's expert say about an image; 0 where they agree.

    logit_weight · t² · KL(softmax(z_expert / t) ‖ softmax(z / t)) + hidden_weight · d(h, h_expert), with d the squared
    difference of block outputs: summed over blocks and width for ``sum`` (the paper's), averaged over both for ``mean``
    (the reference code's); averaged over tokens in either.

    Args:
        temperature: t.
        logit_weight: Of the predictions' part.
        hidden_weight: Of the hidden states' part.
        layers: Blocks that are compared; none leaves that part out.
        tokens: ``class`` compares the class token alone, ``all`` every token.
        reduction: ``sum`` or ``mean``.

    Raises:
        ConfigError: If an option is out of range, or nothing is left to compare.

    Differs: the reference code takes cross-entropy in place of KL: the same gradient, but not 0 at agreement.

    Source: Expert Merging, arXiv:2509.25712; the predictions' part is distillation, arXiv:1503.02531.
    """

    temperature: float
    logit_weight: float
    hidden_weight: float
    layers: Sequence[int]
    tokens: Literal["class", "all"]
    reduction: Literal["sum", "mean"]
    needs: Literal["experts"] = "experts"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"objective.temperature is above 0, found {self.temperature}.")
        if self.logit_weight < 0 or self.hidden_weight < 0:
            raise ConfigError("objective.logit_weight and objective.hidden_weight are at least 0.")
        if self.tokens not in ("class", "all") or self.reduction not in ("sum", "mean"):
            raise ConfigError("objective.tokens is 'class' or 'all', objective.reduction 'sum' or 'mean'.")
        if self.logit_weight == 0 and (self.hidden_weight == 0 or not self.layers):
            raise ConfigError(
                "nothing is aligned: objective.logit_weight is 0 and no hidden states are compared. Give one a weight."
            )

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        expert = target.expert
        if expert is None:
            raise DataError("alignment needs the outputs of the task's expert, and there are none.")
        loss = torch.zeros_like(outputs.logits[:, 0])
        if self.logit_weight:
            loss = loss + self.logit_weight * self._divergence(outputs.logits, expert.logits)
        if self.hidden_weight and self.layers:
            distances = [
                self._distance(found, wanted) for found, wanted in zip(outputs.hidden, expert.hidden, strict=True)
            ]
            total = torch.stack(distances).sum(0)
            loss = loss + self.hidden_weight * (total / len(distances) if self.reduction == "mean" else total)
        return loss

    def _divergence(self, logits: Tensor, expert: Tensor) -> Tensor:
        """t² · KL, (B,)."""
        wanted = (expert / self.temperature).log_softmax(-1)
        found = (logits / self.temperature).log_softmax(-1)
        return self.temperature**2 * (wanted.exp() * (wanted - found)).sum(-1)

    def _distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        """(B, L, w) twice → (B,)."""
        if self.tokens == "class":
            found, wanted = found[:, :1], wanted[:, :1]
        squared = (found - wanted).square().mean(1)
        return squared.mean(-1) if self.reduction == "mean" else squared.sum(-1)
