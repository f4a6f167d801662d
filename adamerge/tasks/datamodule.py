"""Which images a learner sees, and at which step."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from itertools import chain, count, zip_longest
from math import ceil
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from adamerge.errors import ConfigError, DataError
from adamerge.tasks.views import RandomView

Batch = dict[str, dict[str, Any]]
"""By task: ``images``, uint8 (n, 3, H, W); ``weights``, what each image's loss counts for (n,); ``targets``, what is
known about the images, by name (n, …)."""


_READER = ThreadPoolExecutor(1, "batches")

STARTS = range(-4, 0)
"""Draws that no step makes, to compare coefficients on that are not learned; of all images."""

HELD_OUT = range(-8, -4)
"""Draws to compare on what was learned: after ``hold_out`` of images that no step sees, else of all."""


def generator_for(*parts: object) -> torch.Generator:
    """A generator that depends on ``parts`` alone, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def split_indices(
    count: int,
    task: str,
    *,
    adapt: Literal["all", "half"],
    split_seed: int,
    fraction: float,
    images_per_task: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices to adapt on and to score, among ``count`` images of one split.

    ``all``: both are all images. ``half``: two halves drawn with ``split_seed``. ``fraction`` then keeps
    ⌈fraction · n⌉ of the images to adapt on, and ``images_per_task`` at most, drawn once.

    Returns:
        Ascending indices: (n,) to adapt on, (m,) to score.

    Raises:
        ConfigError: If an option is out of range.
        DataError: If a half would be empty.
    """
    if adapt not in ("all", "half"):
        raise ConfigError(f"data.adapt is 'all' or 'half', found '{adapt}'.")
    if not 0 < fraction <= 1:
        raise ConfigError(f"data.fraction lies in (0, 1], found {fraction}.")
    if images_per_task is not None and images_per_task < 1:
        raise ConfigError(f"data.images_per_task is null or at least 1, found {images_per_task}.")
    order = torch.randperm(count, generator=generator_for("split", split_seed, task))
    learn, score = (order, order) if adapt == "all" else (order[: ceil(count / 2)], order[ceil(count / 2) :])
    if len(score) == 0:
        raise DataError(f"task '{task}' has too few images ({count}) to halve. Use data.adapt=all.")
    learn = learn[: ceil(Fraction(str(fraction)) * len(learn))][:images_per_task]
    return learn.sort().values, score.sort().values


def draw_shots(labels: Tensor, shots: int, task: str, *, split_seed: int) -> Tensor:
    """Ascending indices of ``shots`` images of every class, or of all where there are fewer, drawn with ``split_seed``.

    Args:
        labels: int64 (N,).
        shots: k.
        task: Its name.
        split_seed: Of the draw; fewer shots are among those of more.

    Raises:
        ConfigError: If there would be no shot.
    """
    if shots < 1:
        raise ConfigError(f"data.shots is null or at least 1, found {shots}.")
    order = torch.randperm(len(labels), generator=generator_for("shots", split_seed, task))
    drawn = [order[labels[order] == label][:shots] for label in labels.unique()]
    return torch.cat(drawn).sort().values


class TaskImages(pl.LightningDataModule):
    """Batches of every task's images; those of a step depend on (seed, task, step) alone.

    Each step shuffles each task's images afresh and cuts ``batches_per_step`` batches of ``images_per_batch`` from the
    front (fewer or smaller ones if the images run out), as the official code does with its new loader a step. Under
    several processes every rank takes each batch's images rank, rank + world, …: disjoint, together the whole batch.

    Attributes:
        targets: What is known about the images of a task, by name, (N, …) each: nothing at first, and never a label
            for an unlabeled learner.
        on_device: Whether all images move to the device that learns, once, rather than each batch to it.
        view: Makes random views of the images; that of an image at a step depends on (seed, task, step, image) alone.
        trusted_share: Where given, this share of every batch is drawn from the images whose target ``trusted`` is 0 or
            more, the rest from the others (all of it, if there is one kind alone), and a batch also holds the images as
            they are, as the target ``weak``.
        renew: Called before each step with its number, if given; gives new ``targets``, or None to keep those there
            are.

    Args:
        images: uint8 (N, 3, H, W) by task.
        indices: Which of them may be used, by task.
        images_per_batch: Over all ranks.
        batches_per_step: Per task; their mean losses are summed.
        seed: Of the shuffles.

    Raises:
        ConfigError: If a count is below one.
    """

    def __init__(
        self,
        images: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        *,
        images_per_batch: int,
        batches_per_step: int,
        seed: int,
    ) -> None:
        super().__init__()
        if images_per_batch < 1 or batches_per_step < 1:
            raise ConfigError("data.images_per_batch and data.batches_per_step are at least 1.")
        self._images, self._indices = images, indices
        self._usable = self._held_out = indices
        self.targets: Mapping[str, Mapping[str, Tensor]] = {task: {} for task in images}
        self.on_device = False
        self.view: RandomView | None = None
        self.trusted_share: float | None = None
        self.renew: Callable[[int], Mapping[str, Mapping[str, Tensor]] | None] | None = None
        self._coming: tuple[tuple[int, int, int], Future[Batch]] | None = None
        self._images_per_batch, self._batches_per_step = images_per_batch, batches_per_step
        self._seed = seed

    def hold_out(self) -> None:
        """Keep half of each task's images for the draws ``HELD_OUT``, so that no step sees them."""
        held, left = {}, {}
        for task, usable in self._indices.items():
            order = torch.randperm(len(usable), generator=generator_for("hold out", self._seed, task))
            half = len(usable) // 2
            held[task], left[task] = usable[order[:half]] if half else usable, usable[order[half:]]
        self._held_out, self._indices = held, left

    @property
    def steps_per_pass(self) -> int:
        """In how many steps all images of every task could be seen once."""
        per_step = self._images_per_batch * self._batches_per_step
        return max(ceil(len(usable) / per_step) for usable in self._indices.values())

    def draw(self, task: str, step: int) -> Sequence[Tensor]:
        """Indices of one task's batches at one step, over all ranks: each (≤ images_per_batch,)."""
        usable = (self._held_out if step in HELD_OUT else self._usable if step in STARTS else self._indices)[task]
        order = torch.randperm(len(usable), generator=generator_for("step", self._seed, task, step))
        if self.trusted_share is None:
            return usable[order[: self._images_per_batch * self._batches_per_step]].split(self._images_per_batch)
        shuffled = usable[order]
        trusted = self.targets[task]["trusted"][shuffled] >= 0
        share = self.trusted_share if trusted.any() and not trusted.all() else float(trusted.all())
        per_batch = round(share * self._images_per_batch)
        parts = zip_longest(
            _batches(shuffled[trusted], per_batch, self._batches_per_step),
            _batches(shuffled[~trusted], self._images_per_batch - per_batch, self._batches_per_step),
            fillvalue=shuffled[:0],
        )
        return [torch.cat(part) for part in parts]

    def drawn(self, task: str, steps: int) -> Tensor:
        """Indices of all images of a task in the first ``steps`` draws and those that compare, ascending."""
        usable, seen = self._indices[task], torch.zeros(len(self._images[task]), dtype=torch.bool)
        for step in chain(STARTS, HELD_OUT, range(steps)):
            seen[torch.cat(list(self.draw(task, step)))] = True
            if step % 16 == 0 and bool(seen[usable].all()):
                break
        return seen.nonzero()[:, 0]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """What one rank sees at one step."""
        images, weights, targets = {}, {}, {}
        for task, source in self._images.items():
            batches = self.draw(task, step)
            rows = torch.cat([batch[rank::world_size] for batch in batches])
            taken = source[_placed(rows, source.device)]
            images[task] = self._views(taken, task, step, rows)
            weights[task] = torch.cat([torch.full((len(b[rank::world_size]),), 1 / len(b)) for b in batches])
            targets[task] = {name: known[rows] for name, known in self.targets[task].items()}
            if self.trusted_share is not None:
                targets[task]["weak"] = taken
        return {"images": images, "weights": weights, "targets": targets}

    def _views(self, images: Tensor, task: str, step: int, rows: Tensor) -> Tensor:
        if self.view is None:
            return images
        seeds = [generator_for("view", self._seed, task, step, row).initial_seed() for row in rows.tolist()]
        return self.view(images, seeds)

    def at(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """``batch`` of a step whose turn has come."""
        if self.renew is not None and (targets := self.renew(step)) is not None:
            self.targets = targets
        return self.batch(step, rank, world_size)

    def state_dict(self) -> dict[str, Any]:
        """The trusted classes, which a resumed run would find others for."""
        return {} if self.trusted_share is None else {"targets": self.targets}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.targets = state_dict["targets"]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Steps(self), batch_size=None)

    def on_before_batch_transfer(self, batch: int, dataloader_idx: int) -> Batch:
        """From the number of a step to its batch; only here, since Lightning fetches ahead of the steps."""
        trainer = self.trainer
        assert trainer is not None
        place = batch, trainer.global_rank, trainer.world_size
        if self.on_device:
            self._images = {task: part.to(trainer.strategy.root_device) for task, part in self._images.items()}
        if self.renew is not None or trainer.strategy.root_device.type != "cuda":
            return self.at(*place)
        return self._ahead(*place)

    def _ahead(self, step: int, rank: int, world_size: int) -> Batch:
        """``batch`` on the GPU or in page-locked memory, put together while the GPU was busy with the step before."""
        place = step, rank, world_size
        batch = self._coming[1] if self._coming and self._coming[0] == place else _READER.submit(self._pinned, *place)
        following = step + 1, rank, world_size
        self._coming = following, _READER.submit(self._pinned, *following)
        return batch.result()

    def _pinned(self, step: int, rank: int, world_size: int) -> Batch:
        batch = self.batch(step, rank, world_size)
        locked = {kind: {task: _locked(part) for task, part in batch[kind].items()} for kind in ("images", "weights")}
        targets = batch["targets"].items()
        return {**locked, "targets": {task: {name: _locked(part) for name, part in of.items()} for task, of in targets}}


def _locked(part: Tensor) -> Tensor:
    """In page-locked memory, unless it is on a device."""
    return part.pin_memory() if part.device.type == "cpu" else part


def _placed(rows: Tensor, device: torch.device) -> Tensor:
    """``rows`` of the CPU on ``device``, without waiting for it."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def _batches(images: Tensor, size: int, count: int) -> Sequence[Tensor]:
    """Up to ``count`` batches of ``size``, the last smaller if the images run out."""
    return images[: size * count].split(size) if size and len(images) else []


class _Steps(IterableDataset):
    """All steps from the trainer's current one on, so that a resumed run continues where it stopped."""

    def __init__(self, module: TaskImages) -> None:
        self._module = module

    def __iter__(self) -> Iterator[int]:
        trainer = self._module.trainer
        if trainer is None:
            raise ConfigError("the batches of a step are drawn by a Trainer. Call TaskImages.batch(step) instead.")
        yield from count(trainer.global_step)
