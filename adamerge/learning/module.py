"""The LightningModule that learns coefficients."""

from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from adamerge.errors import TrainingError, shortlist
from adamerge.learning.losses import TaskLosses
from adamerge.learning.recorded import Recorded
from adamerge.learning.schedule import Schedule
from adamerge.learning.selection import Selection
from adamerge.merging import Coefficients, MergedModel
from adamerge.tasks.datamodule import HELD_OUT, STARTS, Batch


class CoefficientLearner(pl.LightningModule):
    """One optimiser step: merge once, run every task's images, contract the summed gradient with τ once, step.

    The backward pass ends in the merged weights, which are leaves outside the module's tree; λ's gradient is computed
    from theirs and, under several processes, summed over ranks in one collective. So DDP has nothing to do, and a
    checkpoint holds λ, the optimiser and the history, but no model weights.

    An optimiser may have ``observe(model)``, called before its step, which sees the gradients of the merged weights,
    and ``gap``, a scalar that is logged and ends the run where a look finds it not above ``tolerance``.

    Args:
        model: Merged model; kept out of the module's tree.
        coefficients: Gives λ (K, G); its parameters are all that learns.
        losses: What to minimise, on which tasks' images.
        penalty: λ and the raw parameter → a scalar that is added to the loss, or None.
        optimizer: Parameters → optimiser.
        schedule: Of its rate, of the iterates that count, and of an early end.
        starts: Constant λ to compare on the draws ``STARTS``: learning starts from the one of least loss, and the
            last iterate is that one again if learning has only raised the loss. None: learning starts as it is.
        selection: Chooses the result among the iterates; without one it is the last.
        held_out_every: Without a selection the result is the iterate, of the start and of every so many steps, of least
            loss on the draws ``HELD_OUT``; None: it is the last.
        max_steps: Rows of the history.
        check_every: Steps between two looks at the device for a loss that is not finite.
    """

    learns = "coefficients"

    def __init__(
        self,
        model: MergedModel,
        coefficients: Coefficients,
        losses: TaskLosses,
        *,
        penalty: Callable[[Tensor, Tensor], Tensor | None] = lambda coefficients, raw: None,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer],
        schedule: Schedule,
        starts: Sequence[float] = (),
        selection: Selection | None = None,
        held_out_every: int | None = None,
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
        self._starts = starts
        self._selection = selection
        self._candidates_every = selection.every if selection is not None else held_out_every
        self._check_every = check_every
        self._compute: Callable[[Tensor, Batch], tuple[Tensor, ...]] = self._losses_and_gradient
        self.losses: Tensor
        self.mean_coefficients: Tensor
        self.failed_step: Tensor
        self.register_buffer("losses", torch.full((max_steps, len(losses.heads)), torch.nan))
        self.register_buffer("mean_coefficients", torch.full((max_steps, model.bank.num_tasks), torch.nan))
        self.register_buffer("failed_step", torch.tensor(-1))
        self.average: Tensor
        self.register_buffer("average", torch.zeros_like(parameters_to_vector(coefficients.parameters()).detach()))
        self.end: Tensor
        self.register_buffer("end", torch.tensor(max_steps))
        self._end = max_steps  # the same, where it can be read without waiting for the device
        if self._candidates_every is not None:
            self.best: Tensor
            self.best_merit: Tensor
            self.register_buffer("best", parameters_to_vector(coefficients.parameters()).detach().clone())
            self.register_buffer("best_merit", torch.tensor(-torch.inf))

    @property
    def model(self) -> MergedModel:
        return self._outside[0]

    @property
    def learned(self) -> torch.nn.Module:
        """What the optimiser steps."""
        return self.coefficients

    def configure_optimizers(self) -> Optimizer:
        optimizer = self._make_optimizer(self.learned.parameters())
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def on_fit_start(self) -> None:
        self.model.to(self.device)
        self._task_losses.to(self.device)
        if self.device.type == "cuda" and self._recordable:
            self._compute = Recorded(self._losses_and_gradient, self.device)

    def on_train_start(self) -> None:
        self._end = int(self.end)
        if self.trainer.global_step >= self._end:  # a run that had ended early
            self.trainer.should_stop = True
        if self.trainer.global_step == 0:
            if self._starts:
                self.coefficients.set(self._best_start()[1])
            self._select(0)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        optimizer: Any = self.optimizers()
        self._task_losses.progress = step / self.trainer.max_steps
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule.factor(step, self._end)
        coefficients = self.coefficients()
        losses, gradient = self._sum_over_ranks(*self._compute(coefficients.detach(), batch))
        outputs, slopes = [coefficients], [gradient]
        if (penalty := self._penalty(coefficients, self.coefficients.raw)) is not None:
            outputs.append(self._scaled(penalty))
            slopes.append(torch.ones_like(outputs[1]))
        parameters = list(self.coefficients.parameters())
        # autograd.grad rather than backward: DDP's hooks, which wait for gradients of their own, stay out of it.
        for parameter, value in zip(parameters, torch.autograd.grad(outputs, parameters, slopes), strict=True):
            parameter.grad = value
        if self._observed:
            optimizer.optimizer.observe(self.model)
        self._guarded_step(optimizer, step, losses, gradient)
        self._average(step)
        self.losses[step] = losses
        self.mean_coefficients[step] = coefficients.detach().mean(dim=1)
        if (step + 1) % self._check_every == 0 or step + 1 == self._end:
            self._report(step)
        self._select(step + 1)
        if step + 1 == self._end:
            self._return_to_start()

    def _losses_and_gradient(self, coefficients: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses by task (T,) and ∂L/∂λ (K, G) on one rank's images."""
        single = len(self._task_losses.passes(batch)) == 1 and not self._observed
        self.model.update(coefficients, single_backward=single)
        losses = self._task_losses.backward(self.model, batch, self._scaled)
        return losses, self.model.coefficient_gradient()

    @property
    def _observed(self) -> bool:
        """Whether the optimiser looks at the gradients of the merged weights."""
        optimizer: Any = self.optimizers()
        return hasattr(optimizer.optimizer, "observe")

    @property
    def _recordable(self) -> bool:
        """Whether the gradient is the same work at every step."""
        changing = self._task_losses.objective.needs == "views" or self._scaler is not None or self._observed
        return self.model.recordable and not changing

    def _return_to_start(self) -> None:
        """At the end, before the last checkpoint, which a resumed run takes the result from."""
        if self._starts and self.failed_step < 0:
            loss, start = self._best_start()
            if self._loss_on(STARTS) > loss:
                self.coefficients.set(start)

    @torch.no_grad()
    def _best_start(self) -> tuple[float, float]:
        """The least loss on the draws ``STARTS``, and the constant λ that gives it."""
        losses = []
        parameters = list(self.coefficients.parameters())
        present = parameters_to_vector(parameters).clone()
        for start in self._starts:
            self.coefficients.set(start)
            losses.append((self._loss_on(STARTS), start))
        vector_to_parameters(present, parameters)
        return min(losses, key=lambda found: found if isfinite(found[0]) else (inf, found[1]))

    @torch.no_grad()
    def _loss_on(self, draws: Iterable[int]) -> float:
        """Of the present coefficients, over all tasks."""
        trainer: Any = self.trainer
        self.model.update(self.coefficients())
        total = 0.0
        for draw in draws:
            batch = trainer.strategy.batch_to_device(trainer.datamodule.batch(draw), self.device)
            with trainer.precision_plugin.forward_context():
                total += float(self._task_losses(self.model, batch).sum())
        return total

    @torch.no_grad()
    def _select(self, steps: int) -> None:
        """After some steps keep the coefficients if they are the best candidate so far; stop if they are unfit."""
        every = self._candidates_every
        if every is None or (steps % every and steps != self._end):
            return
        self.model.update(self.coefficients())
        merit = self._selection(self.model) if self._selection is not None else -self._loss_on(HELD_OUT)
        if merit is None:
            self._stop(steps)
        elif (worth := torch.tensor(merit)) > self.best_merit.cpu():
            self.best.copy_(parameters_to_vector(self.coefficients.parameters()))
            self.best_merit.copy_(worth)

    @torch.no_grad()
    def result(self) -> Tensor:
        """λ (K, G) of the selected iterate, or of the last one."""
        if self._candidates_every is not None:
            vector_to_parameters(self.best.clone(), self.coefficients.parameters())
        return self.coefficients()

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
        """Step, unless a loss has not been finite: then the last good values stay. Never waits for the device."""
        good = losses.isfinite().all() & (self.failed_step < 0)
        if self._scaler is None:  # the scaler itself skips steps whose scaled gradient overflows
            good &= gradient.isfinite().all()
        before = [parameter.detach().clone() for parameter in self.learned.parameters()]
        optimizer.step()
        with torch.no_grad():
            for parameter, old in zip(self.learned.parameters(), before, strict=True):
                parameter.copy_(torch.where(good, parameter, old))
        self.failed_step.copy_(torch.where(good | (self.failed_step >= 0), self.failed_step, step))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Keep the mean of the iterates that count; it is the result of the last step."""
        parameters = list(self.coefficients.parameters())
        self.average.lerp_(parameters_to_vector(parameters), self._schedule.weight(step, self._end))
        if step + 1 == self._end:
            vector_to_parameters(self.average.clone(), parameters)

    def _end_early(self, steps: int) -> None:
        """Shorten the run once its loss has stopped falling, and stop it where it ends."""
        if self._end == self.trainer.max_steps and (end := self._schedule.end(self.losses[:steps].sum(1).tolist())):
            self._end = min(self._end, -(-end // self._check_every) * self._check_every)
            self.end.fill_(self._end)
        if steps == self._end < self.trainer.max_steps:
            self._stop(steps)

    def _stop(self, steps: int) -> None:
        """Let the run end after so many steps, which are done, also where it is resumed."""
        self._end = steps
        self.end.fill_(steps)
        self.trainer.should_stop = True

    def _report(self, step: int) -> None:
        """Every few steps the host looks: log, and stop if a loss was not finite.

        What is logged is on the CPU, since Lightning reads it again at every step.
        """
        losses = self.losses[step].cpu()
        total = losses.sum()
        if self.trainer.loggers:
            by_task = zip(self._task_losses.heads, losses, strict=True)
            self.log_dict({"loss": total, **{f"loss/{task}": loss for task, loss in by_task}})
        self.log("total", total, prog_bar=True, logger=False)
        optimizer: Any = self.optimizers()
        if (gap := getattr(optimizer.optimizer, "gap", None)) is not None:
            gap = gap.cpu()
            self.log("gap", gap)
            if gap <= optimizer.optimizer.tolerance:
                self._stop(step + 1)
        failed = int(self.failed_step)
        if failed < 0:
            self._end_early(step + 1)
            return
        finite = self.losses[failed].isfinite().tolist()
        tasks = [task for task, ok in zip(self._task_losses.heads, finite, strict=True) if not ok]
        what = f"the loss of task {shortlist(tasks)}" if tasks else f"the gradient of the {self.learns}"
        raise TrainingError(
            f"{what} is not finite at step {failed}. Learning stopped; the {self.learns} of step {failed} are kept. "
            "Look at that task's images and expert, or lower optimizer.lr, or use trainer.precision=32-true."
        )
