"""Run a learner: the Trainer, its checkpoints, and what is left when it ends."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from adamerge.errors import AdamergeError, TrainingError
from adamerge.files import atomic_file
from adamerge.learning.losses import TaskLosses
from adamerge.learning.module import CoefficientLearner
from adamerge.learning.schedule import Schedule
from adamerge.learning.selection import Selection
from adamerge.merging import Coefficients, MergedModel, Partition
from adamerge.tasks.datamodule import TaskImages

CHECKPOINT_EVERY = 10
"""Optimiser steps between two checkpoints, and between two looks at the losses unless the Trainer logs more often. On a
GPU, whose steps are short beside a checkpoint that it waits for, checkpoints are five times as rare."""

Module = TypeVar("Module", bound=CoefficientLearner)


class UserInterruptError(AdamergeError):
    """The user stopped the run."""


@dataclass(frozen=True)
class Learned:
    """What a learner leaves.

    Attributes:
        coefficients: λ, (K, G), on the CPU.
        partition: Its groups.
        tasks: Names of the tasks that were learned from.
        losses: Per step and such task, (S, T); NaN for steps that did not run.
        mean_coefficients: λ averaged over groups per step and task, (S, K).
        steps: Optimiser steps done.
        shares: As ``Learner.shares`` gives them, of the last stage; none: it was the first.
    """

    coefficients: Tensor
    partition: Partition
    tasks: Sequence[str]
    losses: Tensor
    mean_coefficients: Tensor
    steps: int
    shares: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def after(self, earlier: "Learned") -> "Learned":
        """The same with the history of what was learned before in front."""
        return replace(
            self,
            losses=torch.cat([earlier.losses, self.losses]),
            mean_coefficients=torch.cat([earlier.mean_coefficients, self.mean_coefficients]),
            steps=earlier.steps + self.steps,
        )


def learn(
    model: MergedModel,
    coefficients: Coefficients,
    losses: TaskLosses,
    data: TaskImages,
    *,
    run_dir: Path,
    stage: int = 0,
    make_trainer: Callable[..., pl.Trainer],
    optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer],
    schedule: Schedule,
    resume: bool,
    penalty: Callable[[Tensor, Tensor], Tensor | None] = lambda coefficients, raw: None,
    starts: Sequence[float] = (),
    selection: Selection | None = None,
    held_out_every: int | None = None,
    callbacks: Iterable[Callback] = (),
    logger: Any = False,
) -> Learned:
    """Learn coefficients; with ``resume`` continue from the stage's last checkpoint in ``run_dir``, if there is one.

    Raises:
        UserInterruptError: On Ctrl-C.
        TrainingError: If a loss is not finite or memory runs out.
    """
    if stage == 0 and not resume and rank_zero_only.rank == 0:
        for later in (run_dir / "checkpoints").glob("stage-*.ckpt"):  # of another run: this one has not got there
            later.unlink(missing_ok=True)
    learner, steps = train(
        partial(
            CoefficientLearner,
            model,
            coefficients,
            losses,
            penalty=penalty,
            optimizer=optimizer,
            schedule=schedule,
            starts=starts,
            selection=selection,
            held_out_every=held_out_every,
        ),
        data,
        run_dir=run_dir,
        name=f"stage-{stage}" if stage else "last",
        make_trainer=make_trainer,
        resume=resume,
        callbacks=callbacks,
        logger=logger,
    )
    final = learner.result().cpu()
    means = learner.mean_coefficients.cpu()
    return Learned(final, model.partition, tuple(losses.heads), learner.losses.cpu(), means, steps)


def train(
    build: Callable[..., Module],
    data: pl.LightningDataModule,
    *,
    run_dir: Path,
    name: str,
    make_trainer: Callable[..., pl.Trainer],
    resume: bool,
    callbacks: Iterable[Callback],
    logger: Any,
    save_every: int = CHECKPOINT_EVERY,
) -> tuple[Module, int]:
    """Run a module as far as its Trainer goes; with ``resume`` from its checkpoint in ``run_dir``, if there is one.

    Args:
        build: Makes the module, given ``max_steps`` and ``check_every``.
        data: Its batches.
        name: Of the checkpoint.
        save_every: Optimiser steps between two checkpoints on a CPU.

    Returns:
        The module and its optimiser steps.

    Raises:
        UserInterruptError: On Ctrl-C, when the step that runs has ended; at once if it is pressed again.
        TrainingError: If a loss is not finite or memory runs out.
    """
    interrupts = _Interrupts()
    checkpoint = run_dir / "checkpoints" / f"{name}.ckpt"
    trainer = make_trainer(
        callbacks=[*callbacks, _Checkpoints(checkpoint, save_every), interrupts],
        plugins=[_AtomicCheckpoints()],
        enable_checkpointing=False,  # Lightning's own callback; ours is in the list
        logger=logger,
        default_root_dir=run_dir,
    )
    looks = min(CHECKPOINT_EVERY, trainer.log_every_n_steps or CHECKPOINT_EVERY)  # type: ignore[attr-defined]
    learner = build(max_steps=trainer.max_steps, check_every=looks)
    if trainer.is_global_zero and not resume:
        checkpoint.unlink(missing_ok=True)  # of another run in the same folder
    if trainer.max_steps > 0:
        with interrupts.noticed():
            _fit(trainer, learner, data, str(checkpoint) if resume and checkpoint.exists() else None)
    return learner, trainer.global_step


def _fit(
    trainer: pl.Trainer, learner: CoefficientLearner, data: pl.LightningDataModule, resume_from: str | None
) -> None:
    try:
        trainer.fit(learner, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except SystemExit as error:  # how Lightning ends after Ctrl-C
        if not trainer.interrupted:
            raise
        raise UserInterruptError(f"stopped by the user at step {trainer.global_step}.") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory ran out while learning. Run the tasks one after another with data.fuse_tasks=false, lower "
            "data.images_per_batch, or halve the activations with trainer.precision=bf16-mixed."
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


class _Checkpoints(Callback):
    """One file, replaced every few optimiser steps. (Lightning's own callback means to save before manual steps.)"""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        every = self._every * (5 if trainer.strategy.root_device.type == "cuda" else 1)
        if trainer.global_step % every == 0 or trainer.global_step == trainer.max_steps or trainer.should_stop:
            trainer.save_checkpoint(self._path)


class _Interrupts(Callback):
    """Ctrl-C between two steps: raised wherever the program is, it would be lost in a finaliser."""

    def __init__(self) -> None:
        self._pressed = False

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Have what Python does by default replaced meanwhile, and what Lightning leaves behind afterwards."""
        usual = signal.getsignal(signal.SIGINT)
        if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._notice)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)

    def _notice(self, *_: Any) -> None:
        self._pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, *_: Any) -> None:
        if self._pressed:
            raise KeyboardInterrupt


class _AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or absent, written through a file beside the final one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_file(Path(path)) as temporary:
            torch.save(checkpoint, temporary)
