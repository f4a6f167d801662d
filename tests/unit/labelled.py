"""Labelled images for the toy zoo, and a supervised learner's run on them as the main job makes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from unit.zoo import Zoo

from adamerge.bank import ParameterBank
from adamerge.learning.clipping import ClippedAdamW
from adamerge.learning.fit import Learned, learn
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.learning.selection import Selection
from adamerge.learning.start import gradient_at_start
from adamerge.merging import Coefficients, MergedModel
from adamerge.methods import Learner
from adamerge.objectives import CrossEntropy
from adamerge.tasks.datamodule import TaskImages

make_trainer = partial(pl.Trainer, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False)
CONSTANT = Schedule(steps=100, decay="constant", average=0, patience=0)


class Pixels(nn.Module):
    """uint8 images (B, 3, 8, 8) → features of the toy tower, in its dtype."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.visual = network.visual

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images.to(self.visual.proj.dtype) / 64 - 2)


OPTIMIZER = partial(ClippedAdamW, lr=3e-2, weight_decay=0.1, max_norm=1.0)


@dataclass
class Labelled:
    """Some images of every task of a zoo and their classes, which are random.

    Attributes:
        zoo: Network, experts and heads.
        bank: Of the zoo, or another.
        count: Images of a task.
    """

    zoo: Zoo
    bank: ParameterBank
    count: int = 12

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        names, shape = self.bank.task_names, (self.count, 3, 8, 8)
        self.heads = dict(zip(names, self.zoo.heads, strict=True))
        self.images = {name: torch.randint(256, shape, generator=generator, dtype=torch.uint8) for name in names}
        self.labels = {name: torch.randint(len(self.heads[name]), (self.count,), generator=generator) for name in names}

    def data(self, tasks: tuple[str, ...] | None = None, **options: Any) -> TaskImages:
        chosen = tasks or self.bank.task_names
        indices = {task: torch.arange(self.count) for task in chosen}
        options = {"images_per_batch": self.count, "batches_per_step": 1, "seed": 0} | options
        data = TaskImages({task: self.images[task] for task in chosen}, indices, **options)
        data.targets = {task: {"labels": self.labels[task]} for task in chosen}
        return data

    def losses(self, method: Learner) -> TaskLosses:
        tasks = method.learns_from(self.bank.task_names)
        weights = {task: method.factor(task) for task in tasks}
        return TaskLosses(CrossEntropy(), {task: self.heads[task] for task in tasks}, weights, "auto")

    def run(
        self,
        method: Learner,
        run_dir: Path,
        steps: int,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = OPTIMIZER,
        schedule: Schedule = CONSTANT,
        selection: Selection | None = None,
        gradient_steps: int = 1,
    ) -> tuple[Learned, Coefficients]:
        """What ``steps`` steps leave, and the coefficients that learned."""
        losses, data = self.losses(method), self.data(tuple(method.learns_from(self.bank.task_names)))
        partition, coefficients = method.prepare(self.bank)
        model = MergedModel(Pixels(self.zoo.network), self.bank, partition)
        coefficients = method.restrict(
            coefficients,
            lambda: gradient_at_start(
                model,
                coefficients,
                losses,
                data,
                steps=gradient_steps,
                device=torch.device("cpu"),
                precision="32-true",
            ),
        )
        found = learn(
            model,
            coefficients,
            losses,
            data,
            run_dir=run_dir,
            make_trainer=partial(make_trainer, max_steps=steps, limit_train_batches=steps),
            optimizer=optimizer,
            schedule=schedule,
            penalty=method.penalty,
            selection=selection,
            resume=False,
        )
        return found, coefficients
