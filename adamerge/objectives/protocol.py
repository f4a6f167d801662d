"""What an objective is given and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Outputs:
    """What a network says about B images of one task, in float32 or wider.

    Attributes:
        logits: Cosine similarities times the logit scale, (B, C).
        features: Of unit length, (B, d).
        hidden: Outputs of the blocks that the objective asks for, (B, L, w) each, the class token first.
    """

    logits: Tensor
    features: Tensor
    hidden: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, features: Tensor, head: Tensor, hidden: Sequence[Tensor] = ()) -> "Outputs":
        """From features (B, d) of any length and a zero-shot head (C, d)."""
        features = features if features.dtype.itemsize >= 4 else features.float()
        unit = normalize(features, dim=-1)
        return cls(unit @ head.T, unit, tuple(h if h.dtype.itemsize >= 4 else h.float() for h in hidden))


@dataclass(frozen=True)
class Target:
    """What is known about the same images.

    Attributes:
        labels: Row numbers of the head (B,), of a supervised learner.
        expert: What the task's own expert says, of a learner that imitates.
        weak: What the merged model says of the images as they are, where the outputs are of augmented ones.
        trusted: The class that an image is trusted to be of (B,), by the model's own predictions; -1 for none.
        progress: Share of the run that is done.
    """

    labels: Tensor | None = None
    expert: Outputs | None = None
    weak: Outputs | None = None
    trusted: Tensor | None = None
    progress: float = 0.0


class Objective(Protocol):
    """What a learner minimises."""

    @property
    def needs(self) -> Literal["images", "labels", "experts", "views"]:
        """Beyond images: nothing, labels (of the labelled split), the experts' outputs, or two views of each image."""
        ...

    @property
    def layers(self) -> Sequence[int]:
        """Blocks whose outputs it compares, counted from 0, or from the end below 0."""
        ...

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        """Losses, (B,)."""
        ...
