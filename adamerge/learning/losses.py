"""Losses of all tasks under the merged weights, and their backward pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.merging import MergedModel
from adamerge.models.hidden import HiddenStates
from adamerge.objectives import Objective, Outputs, Target
from adamerge.tasks.datamodule import Batch


class TaskLosses:
    """The objective on a batch of every task's images.

    Args:
        objective: What to minimise.
        heads: Zero-shot head by task, (C, d), logit scale included; these are the tasks that are learned from.
        task_weights: Factor of each task's loss, by task.
        fuse_tasks: All tasks in one forward pass, or one after another in the memory of one; "auto" is as ``passes``.

    Attributes:
        progress: Share of the run that is done, which some objectives depend on.
    """

    def __init__(
        self,
        objective: Objective,
        heads: Mapping[str, Tensor],
        task_weights: Mapping[str, float],
        fuse_tasks: bool | Literal["auto"],
    ) -> None:
        self.objective = objective
        self.heads = dict(heads)
        self._task_weights = task_weights
        self._fuse_tasks = fuse_tasks
        self.progress = 0.0

    def to(self, device: torch.device) -> None:
        """Move the heads."""
        self.heads = {task: head.to(device) for task, head in self.heads.items()}

    def passes(self, batch: Batch) -> list[list[str]]:
        """Which tasks go through the network together, in order."""
        images = {task: batch["images"][task] for task in self.heads}
        if self._fuse_tasks == "auto":
            return passes(images)
        return [list(images)] if self._fuse_tasks else [[task] for task in images]

    def backward(
        self, model: MergedModel, batch: Batch, scale: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> Tensor:
        """Back-propagate into the merged weights.

        Args:
            model: Its merged weights are up to date.
            batch: Of one step.
            scale: Applied to a loss first, for the narrow range of float16.

        Returns:
            Losses by task (T,), detached and not scaled.
        """
        hidden = HiddenStates(model.network, self.objective.layers)
        try:
            losses = []
            for tasks in self.passes(batch):
                found = self._losses(model, tasks, batch, hidden)
                scale(found.sum()).backward()
                losses.append(found.detach())
        finally:
            hidden.close()
        return torch.cat(losses)

    @torch.no_grad()
    def __call__(self, model: MergedModel, batch: Batch) -> Tensor:
        """Losses by task (T,), without a graph."""
        hidden = HiddenStates(model.network, self.objective.layers)
        try:
            return torch.cat([self._losses(model, tasks, batch, hidden) for tasks in self.passes(batch)])
        finally:
            hidden.close()

    def _losses(self, model: MergedModel, tasks: list[str], batch: Batch, hidden: HiddenStates) -> Tensor:
        parts = [batch["images"][task] for task in tasks]
        sizes = [len(part) for part in parts]
        features = model(torch.cat(parts)).split(sizes)
        states = [state.split(sizes) for state in hidden.take()]
        weak = self._weak(model, [batch["targets"][task] for task in tasks])
        return torch.stack(
            [
                self._loss(task, features[i], [state[i] for state in states], weak[i], batch)
                for i, task in enumerate(tasks)
            ]
        )

    @torch.no_grad()
    def _weak(self, model: MergedModel, known: list[Mapping[str, Any]]) -> Sequence[Tensor | None]:
        """Features of the images as they are, by task, where they are given. (After those that get a gradient, since
        autocast casts weights once.)"""
        parts = [of_task["weak"] for of_task in known if "weak" in of_task]
        found = iter(model(torch.cat(parts)).split([len(part) for part in parts])) if parts else iter(())
        return [next(found) if "weak" in of_task else None for of_task in known]

    def _loss(self, task: str, features: Tensor, hidden: list[Tensor], weak: Tensor | None, batch: Batch) -> Tensor:
        # Normalised in float32: half precision would cost the logits, which are 100 times a cosine, two digits.
        with torch.autocast(features.device.type, enabled=False):
            outputs = Outputs.of(features, self.heads[task], hidden)
            target = self._target(task, batch["targets"][task], weak)
            return self._task_weights[task] * (self.objective(outputs, target) * batch["weights"][task]).sum()

    def _target(self, task: str, known: Mapping[str, Any], weak: Tensor | None) -> Target:
        expert = None
        if "features" in known:
            states = [known[f"hidden/{position}"] for position in range(len(self.objective.layers))]
            expert = Outputs.of(known["features"], self.heads[task], states)
        seen = None if weak is None else Outputs.of(weak, self.heads[task])
        return Target(known.get("labels"), expert, seen, known.get("trusted"), self.progress)


def passes(images: Mapping[str, Tensor]) -> list[list[str]]:
    """Which tasks go through the network together, in order: all of them, but on the CPU no more than keep the
    activations in memory that is used again. (Beyond 32 MiB the C library returns every buffer to the system, and
    taking it back costs a fifth of a step. Units for bfloat16 want more images than others at a time: with AMX, three
    tasks of 16 images take a quarter less time than one by one.)

    Args:
        images: (B, 3, H, W) by task.
    """
    room = 1 << 24  # bytes of the widest activation, which in a ViT-B/32 has as many values as its input
    width = 2 if torch.is_autocast_enabled("cpu") else 4
    groups: list[list[str]] = []
    taken = 0
    for task, part in images.items():
        taken += width * part.numel()
        if not groups or (part.device.type == "cpu" and taken > room):
            groups.append([])
            taken = width * part.numel()
        groups[-1].append(task)
    return groups
