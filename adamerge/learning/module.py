"""The LightningModule that learns coefficients."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from adamerge.errors import TrainingError, shortlist
from adamerge.learning.schedule import Schedule
from adamerge.merging import Coefficients, MergedModel
from adamerge.tasks.datamodule import Batch

Objective = Callable[[Tensor], Tensor]
"""Logits (B, C) → losses (B,)."""


class CoefficientLearner(pl.LightningModule):
    """One optimiser step: merge once, run every task's images, contract the summed gradient with τ once, step.

    The backward pass ends in the merged weights, which are leaves outside the module's tree; λ's gradient is computed
    from theirs and, under several processes, summed over ranks in one collective. So DDP has nothing to do, and a
    checkpoint holds λ, the optimiser and the history, but no model weights.

    Args:
        model: Merged model; kept out of the module's tree.
        coefficients: λ (K, G): all that learns.
        objective: What to minimise.
        heads: Zero-shot head by task, (C, d), logit scale included.
        task_weights: Factor of each task's loss, by task.
        optimizer: Parameters → optimiser.
        schedule: Of its rate, and of the iterates that count.
        max_steps: Rows of the history.
        fuse_tasks: All tasks in one forward pass, or one after another in the memory of one; "auto" is as ``passes``.
        check_every: Steps between two looks at the device for a loss that is not finite.
    """

    def __init__(
        self,
        model: MergedModel,
        coefficients: Coefficients,
        objective: Objective,
        heads: Mapping[str, Tensor],
        *,
        task_weights: Mapping[str, float],
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer],
        schedule: Schedule,
        max_steps: int,
        fuse_tasks: bool | Literal["auto"],
        check_every: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.coefficients = coefficients
        self._outside = (model,)  # in a tuple, lest nn.Module registers what a MergedModel may become
        self._objective = objective
        self._heads = dict(heads)
        self._task_weights = task_weights
        self._make_optimizer = optimizer
        self._schedule = schedule
        self._fuse_tasks = fuse_tasks
        self._check_every = check_every
        self.losses: Tensor
        self.mean_coefficients: Tensor
        self.failed_step: Tensor
        self.register_buffer("losses", torch.full((max_steps, len(heads)), torch.nan))
        self.register_buffer("mean_coefficients", torch.full((max_steps, len(heads)), torch.nan))
        self.register_buffer("failed_step", torch.tensor(-1))
        self.average: Tensor
        self.register_buffer("average", torch.zeros_like(coefficients.raw))

    @property
    def model(self) -> MergedModel:
        return self._outside[0]

    def configure_optimizers(self) -> Optimizer:
        optimizer = self._make_optimizer(self.coefficients.parameters())
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def on_fit_start(self) -> None:
        self.model.to(self.device)
        self._heads = {task: head.to(self.device) for task, head in self._heads.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule.factor(step, self.trainer.max_steps)
        coefficients = self.coefficients()
        groups = self._passes(batch)
        self.model.update(coefficients, single_backward=len(groups) == 1)
        losses = torch.cat([self._backward(group, batch) for group in groups])
        gradient = self.model.coefficient_gradient()
        losses, gradient = self._sum_over_ranks(losses, gradient)
        parameters = list(self.coefficients.parameters())
        # autograd.grad rather than backward: DDP's hooks, which wait for gradients of their own, stay out of it.
        for parameter, value in zip(parameters, torch.autograd.grad(coefficients, parameters, gradient), strict=True):
            parameter.grad = value
        self._guarded_step(optimizer, step, losses, gradient)
        self._average(step)
        self.losses[step] = losses
        self.mean_coefficients[step] = coefficients.detach().mean(dim=1)
        if (step + 1) % self._check_every == 0 or step + 1 == self.trainer.max_steps:
            self._report(step)

    def _passes(self, batch: Batch) -> list[list[str]]:
        images = {task: batch["images"][task] for task in self._heads}
        if self._fuse_tasks == "auto":
            return passes(images)
        return [list(images)] if self._fuse_tasks else [[task] for task in images]

    def _backward(self, tasks: list[str], batch: Batch) -> Tensor:
        """Back-propagate some tasks' losses into the merged weights; return the losses, detached."""
        parts = [batch["images"][task] for task in tasks]
        features = self.model(torch.cat(parts)).split([len(part) for part in parts])
        losses = torch.stack([self._loss(task, part, batch) for task, part in zip(tasks, features, strict=True)])
        self._scaled(losses.sum()).backward()
        return losses.detach()

    def _loss(self, task: str, features: Tensor, batch: Batch) -> Tensor:
        # Normalised in float32: half precision would cost the logits, which are 100 times a cosine, two digits.
        with torch.autocast(features.device.type, enabled=False):
            logits = normalize(features.float(), dim=-1) @ self._heads[task].T
            return self._task_weights[task] * (self._objective(logits) * batch["weights"][task]).sum()

    def _scaled(self, loss: Tensor) -> Tensor:
        """Multiplied for float16's narrow range; the precision plugin divides again when the optimiser steps."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _sum_over_ranks(self, losses: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if self.trainer.world_size == 1:
            return losses, gradient
        flat = torch.cat([losses.to(gradient.dtype), gradient.flatten()])
        torch.distributed.all_reduce(flat)
        return flat[: len(losses)], flat[len(losses) :].view_as(gradient)

    def _guarded_step(self, optimizer: Any, step: int, losses: Tensor, gradient: Tensor) -> None:
        """Step, unless a loss has not been finite: then λ stays at its last good value. Never waits for the device."""
        good = losses.isfinite().all() & (self.failed_step < 0)
        if self._scaler is None:  # the scaler itself skips steps whose scaled gradient overflows
            good &= gradient.isfinite().all()
        before = [parameter.detach().clone() for parameter in self.coefficients.parameters()]
        optimizer.step()
        with torch.no_grad():
            for parameter, old in zip(self.coefficients.parameters(), before, strict=True):
                parameter.copy_(torch.where(good, parameter, old))
        self.failed_step.copy_(torch.where(good | (self.failed_step >= 0), self.failed_step, step))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Keep the mean of the iterates that count; it is the result of the last step."""
        steps = self.trainer.max_steps
        self.average.lerp_(self.coefficients.raw, self._schedule.weight(step, steps))
        if step + 1 == steps:
            self.coefficients.raw.copy_(self.average)

    def _report(self, step: int) -> None:
        """Every few steps the host looks: log, and stop if a loss was not finite."""
        losses = self.losses[step].tolist()
        self.log_dict(
            {"loss": sum(losses), **{f"loss/{task}": loss for task, loss in zip(self._heads, losses, strict=True)}}
        )
        self.log("total", sum(losses), prog_bar=True, logger=False)
        failed = int(self.failed_step)
        if failed < 0:
            return
        tasks = [t for t, ok in zip(self._heads, self.losses[failed].isfinite().tolist(), strict=True) if not ok]
        what = f"the loss of task {shortlist(tasks)}" if tasks else "the gradient of the coefficients"
        raise TrainingError(
            f"{what} is not finite at step {failed}. Learning stopped; the coefficients of step {failed} are kept. "
            "Look at that task's images and expert, or lower optimizer.lr, or use trainer.precision=32-true."
        )


def passes(images: Mapping[str, Tensor]) -> list[list[str]]:
    """Which tasks go through the network together, in order: all of them, but on the CPU no more than keep the
    activations in memory that is used again. (Beyond 32 MiB the C library returns every buffer to the system, and
    taking it back costs a fifth of a step.)

    Args:
        images: (B, 3, H, W) by task.
    """
    room = 1 << 22  # values: 16 MiB of float32; the widest activation of a ViT-B/32 is as large as its input
    groups: list[list[str]] = []
    taken = 0
    for task, part in images.items():
        taken += part.numel()
        if not groups or (part.device.type == "cpu" and taken > room):
            groups.append([])
            taken = part.numel()
        groups[-1].append(task)
    return groups
