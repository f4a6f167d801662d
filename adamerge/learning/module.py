"""The LightningModule that learns coefficients."""

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from adamerge.errors import TrainingError, shortlist
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.merging import Coefficients, MergedModel
from adamerge.tasks.datamodule import Batch


class CoefficientLearner(pl.LightningModule):
    """One optimiser step: merge once, run every task's images, contract the summed gradient with τ once, step.

    The backward pass ends in the merged weights, which are leaves outside the module's tree; λ's gradient is computed
    from theirs and, under several processes, summed over ranks in one collective. So DDP has nothing to do, and a
    checkpoint holds λ, the optimiser and the history, but no model weights.

    An optimiser may have ``observe(model)``, called before its step, which sees the gradients of the merged weights,
    and ``gap``, a scalar that is logged and ends the run where it falls below ``tolerance``.

    Args:
        model: Merged model; kept out of the module's tree.
        coefficients: Gives λ (K, G); its parameters are all that learns.
        losses: What to minimise, on which tasks' images.
        penalty: λ → a scalar that is added to the loss, or None.
        optimizer: Parameters → optimiser.
        schedule: Of its rate, and of the iterates that count.
        max_steps: Rows of the history.
        check_every: Steps between two looks at the device for a loss that is not finite.
    """

    def __init__(
        self,
        model: MergedModel,
        coefficients: Coefficients,
        losses: TaskLosses,
        *,
        penalty: Callable[[Tensor], Tensor | None] = lambda coefficients: None,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer],
        schedule: Schedule,
        max_steps: int,
        check_every: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.coefficients = coefficients
        self._outside = (model,)  # in a tuple, lest nn.Module registers what a MergedModel may become
        self._task_losses = losses
        self._penalty = penalty
        self._make_optimizer = optimizer
        self._schedule = schedule
        self._check_every = check_every
        self.losses: Tensor
        self.mean_coefficients: Tensor
        self.failed_step: Tensor
        self.register_buffer("losses", torch.full((max_steps, len(losses.heads)), torch.nan))
        self.register_buffer("mean_coefficients", torch.full((max_steps, model.bank.num_tasks), torch.nan))
        self.register_buffer("failed_step", torch.tensor(-1))
        self.average: Tensor
        self.register_buffer("average", torch.zeros_like(parameters_to_vector(coefficients.parameters()).detach()))

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
        self._task_losses.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule.factor(step, self.trainer.max_steps)
        coefficients = self.coefficients()
        observe = getattr(optimizer.optimizer, "observe", None)
        single = len(self._task_losses.passes(batch)) == 1 and observe is None
        self.model.update(coefficients, single_backward=single)
        losses = self._task_losses.backward(self.model, batch, self._scaled)
        gradient = self.model.coefficient_gradient()
        losses, gradient = self._sum_over_ranks(losses, gradient)
        outputs, slopes = [coefficients], [gradient]
        if (penalty := self._penalty(coefficients)) is not None:
            outputs.append(self._scaled(penalty))
            slopes.append(torch.ones_like(outputs[1]))
        parameters = list(self.coefficients.parameters())
        # autograd.grad rather than backward: DDP's hooks, which wait for gradients of their own, stay out of it.
        for parameter, value in zip(parameters, torch.autograd.grad(outputs, parameters, slopes), strict=True):
            parameter.grad = value
        if observe is not None:
            observe(self.model)
        self._guarded_step(optimizer, step, losses, gradient)
        self._average(step)
        self.losses[step] = losses
        self.mean_coefficients[step] = coefficients.detach().mean(dim=1)
        if (step + 1) % self._check_every == 0 or step + 1 == self.trainer.max_steps:
            self._report(step)

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
        parameters = list(self.coefficients.parameters())
        self.average.lerp_(parameters_to_vector(parameters), self._schedule.weight(step, steps))
        if step + 1 == steps:
            vector_to_parameters(self.average.clone(), parameters)

    def _report(self, step: int) -> None:
        """Every few steps the host looks: log, and stop if a loss was not finite."""
        losses = self.losses[step].tolist()
        by_task = zip(self._task_losses.heads, losses, strict=True)
        self.log_dict({"loss": sum(losses), **{f"loss/{task}": loss for task, loss in by_task}})
        self.log("total", sum(losses), prog_bar=True, logger=False)
        optimizer: Any = self.optimizers()
        if (gap := getattr(optimizer.optimizer, "gap", None)) is not None:
            self.log("gap", float(gap))
            self.trainer.should_stop = float(gap) <= optimizer.optimizer.tolerance
        failed = int(self.failed_step)
        if failed < 0:
            return
        finite = self.losses[failed].isfinite().tolist()
        tasks = [task for task, ok in zip(self._task_losses.heads, finite, strict=True) if not ok]
        what = f"the loss of task {shortlist(tasks)}" if tasks else "the gradient of the coefficients"
        raise TrainingError(
            f"{what} is not finite at step {failed}. Learning stopped; the coefficients of step {failed} are kept. "
            "Look at that task's images and expert, or lower optimizer.lr, or use trainer.precision=32-true."
        )
