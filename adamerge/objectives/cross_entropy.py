"""Cross-entropy with labels: the objective of supervised learners."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from adamerge.errors import DataError
from adamerge.objectives.protocol import Outputs, Target


class CrossEntropy:
    """-log p(label), in nats, per image."""

    needs: Literal["labels"] = "labels"
    layers = ()

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        if target.labels is None:
            raise DataError("cross-entropy needs labels, and these images have none. Use a labelled split.")
        return cross_entropy(outputs.logits, target.labels, reduction="none")
