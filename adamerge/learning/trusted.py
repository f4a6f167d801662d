"""Which images without labels a model is trusted on, chosen anew as it learns."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from adamerge.learning.experts import autocast
from adamerge.merging import Coefficients, MergedModel
from adamerge.objectives import FixMatch, Outputs, trusted_classes


@dataclass(frozen=True)
class TrustedImages:
    """Chooses the trusted images at the start of every epoch by what the merged model then says of all of them.

    Attributes:
        model: Merged model.
        coefficients: λ, which learns.
        images: uint8 (N, 3, H, W) by task.
        indices: Which of them may be used, by task.
        heads: Zero-shot head by task, (C, d), logit scale included.
        objective: Says how many of a class, and how often.
        steps: Of the run.
        batch_size: Images per forward pass.
        precision: As Lightning's Trainer takes it.
    """

    model: MergedModel
    coefficients: Coefficients
    images: Mapping[str, Tensor]
    indices: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    objective: FixMatch
    steps: int
    batch_size: int
    precision: str

    @torch.no_grad()
    def __call__(self, step: int) -> Mapping[str, Mapping[str, Tensor]] | None:
        """``trusted`` by task, int64 (N,) on the CPU; None within an epoch."""
        if step % max(1, ceil(self.steps / self.objective.epochs)):
            return None
        self.model.update(self.coefficients())
        return {task: {"trusted": self._trusted(task)} for task in self.images}

    def _trusted(self, task: str) -> Tensor:
        images, rows = self.images[task], self.indices[task]
        device = next(self.model.network.parameters()).device
        head, logits = self.heads[task].to(device), []
        for some in rows.split(self.batch_size):
            with autocast(device, self.precision):
                features = self.model(images[some].to(device, non_blocking=True))
            logits.append(Outputs.of(features, head).logits)
        found = torch.full((len(images),), -1)
        found[rows] = trusted_classes(torch.cat(logits), self.objective.trusted_per_class).cpu()
        return found
