"""The LightningModule that learns a mask, and its batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from adamerge.learning.losses import TaskLosses
from adamerge.learning.module import CoefficientLearner
from adamerge.learning.narrow import Narrow
from adamerge.learning.schedule import Schedule
from adamerge.merging import Coefficients
from adamerge.merging.concrete_mask import ConcreteMask
from adamerge.merging.masked_model import MaskedModel
from adamerge.methods.learned import Concrete
from adamerge.tasks.datamodule import Batch, TaskImages


class MaskLearner(CoefficientLearner):
    """One step: draw a mask; from the initial λ step λ within it, on one draw of images; step the mask's logits on
    another, under the λ found. Without an inner optimiser λ stays as it is.

    λ's gradient treats the mask as a constant, and the logits' gradient λ: nothing is differentiated twice. The mask of
    a step depends on (seed, step, key) alone.

    Args:
        model: Merged model; kept out of the module's tree.
        coefficients: Give λ (K, G), at its initial value.
        losses: What to minimise, on which tasks' images.
        mask: What learns.
        options: How; ``learning/narrow.py`` says how logits in bfloat16 are stepped.
        optimizer: Logits → optimiser.
        schedule: Of its rate; which iterates count is a matter of λ alone.
        seed: Of the rounding to bfloat16.
        max_steps: Rows of the history, which holds the outer losses and the λ that they were taken at.
        check_every: Steps between two looks at the device for a loss that is not finite.
    """

    learns = "mask"

    def __init__(
        self,
        model: MaskedModel,
        coefficients: Coefficients,
        losses: TaskLosses,
        mask: ConcreteMask,
        *,
        options: Concrete,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Schedule,
        seed: int,
        max_steps: int,
        check_every: int,
    ) -> None:
        if options.mask_dtype != "float32":
            optimizer = partial(Narrow, make=optimizer, seed=seed)
        super().__init__(
            model,
            coefficients,
            losses,
            optimizer=optimizer,
            schedule=schedule,
            max_steps=max_steps,
            check_every=check_every,
        )
        self.mask = mask
        self._masked = (model,)
        self._redraw, self._inner_at = options.redraw, options.inner_at
        make_inner = options.inner_optimizer
        self._inner = None if make_inner is None else make_inner(coefficients.parameters())
        self._inner_state: dict[str, Any] | None = None
        self.start: Tensor
        self.register_buffer("start", parameters_to_vector(coefficients.parameters()).detach().clone(), False)

    @property
    def learned(self) -> nn.Module:
        return self.mask

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._inner is not None and self._inner_state is not None:  # now that λ is on the device
            self._inner.load_state_dict(self._inner_state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._inner is not None:
            checkpoint["inner_optimizer"] = self._inner.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._inner_state = checkpoint.get("inner_optimizer")

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> None:
        (model,) = self._masked
        step = self.trainer.global_step
        optimizer: Any = self.optimizers()
        self._task_losses.progress = step / self.trainer.max_steps
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule.factor(step, self._end)
        drawn = self.mask.draw(f"step {step}")
        model.mask = drawn.mask
        found = None if self._inner is None else self._inner_step(self._inner, batch["inner"])
        if self._redraw and found is not None:
            drawn = self.mask.draw(f"step {step}, outer")
            model.mask = drawn.mask
        coefficients = self.coefficients().detach()
        model.update(coefficients)
        losses = self._summed(self._task_losses.backward(model, batch["outer"], self._scaled))
        if found is not None:
            losses = torch.where(found.isfinite(), losses, found)  # lest it go unseen
        sums = []
        for key, parameter in self.mask.items():
            slope = self.mask.slope(key, drawn, self._summed(model.mask_gradient(key)))
            sums.append(slope.sum())
            parameter.grad = slope.to(parameter.dtype)
        self._guarded_step(optimizer, step, losses, torch.stack(sums))
        self.losses[step] = losses
        self.mean_coefficients[step] = coefficients.mean(dim=1)
        if (step + 1) % self._check_every == 0 or step + 1 == self._end:
            self._report(step)

    def _inner_step(self, optimizer: Optimizer, batch: Batch) -> Tensor:
        """Step λ from its initial value; its losses by task (T,)."""
        parameters = list(self.coefficients.parameters())
        if self._inner_at == "initial":
            vector_to_parameters(self.start.clone(), parameters)
        coefficients = self.coefficients()
        self.model.update(coefficients, single_backward=len(self._task_losses.passes(batch)) == 1)
        losses = self._task_losses.backward(self.model, batch, self._scaled)
        losses, gradient = self._sum_over_ranks(losses, self.model.coefficient_gradient())
        gradient = gradient / self._scaled(torch.ones_like(gradient[:1, :1]))
        # What overflows in float16 does not move λ.
        gradient = gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        slopes = torch.autograd.grad(coefficients, parameters, gradient)
        vector_to_parameters(self.start.clone(), parameters)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        optimizer.step()
        return losses

    def _summed(self, values: Tensor) -> Tensor:
        """Over ranks, in place."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


class MaskImages(pl.LightningDataModule):
    """``outer`` batches of a step, and with an inner step ``inner`` ones, which are other draws of the same images.

    Args:
        data: Where they are drawn.
        inner: Whether there is an inner step.
    """

    def __init__(self, data: TaskImages, *, inner: bool) -> None:
        super().__init__()
        self._data, self._inner = data, inner

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Steps(self), batch_size=None)

    def on_before_batch_transfer(self, batch: int, dataloader_idx: int) -> dict[str, Batch]:
        """From the number of a step to its batches."""
        trainer = self.trainer
        assert trainer is not None
        names = ("inner", "outer") if self._inner else ("outer",)
        draw = partial(self._data.at, rank=trainer.global_rank, world_size=trainer.world_size)
        return {name: draw(batch * len(names) + number) for number, name in enumerate(names)}


class _Steps(IterableDataset):
    """All steps from the trainer's current one on."""

    def __init__(self, module: MaskImages) -> None:
        self._module = module

    def __iter__(self) -> Iterator[int]:
        trainer = self._module.trainer
        assert trainer is not None
        yield from count(trainer.global_step)
