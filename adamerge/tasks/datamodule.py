"""Which images a learner sees, and at which step."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import count
from math import ceil
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from adamerge.errors import ConfigError, DataError

Batch = dict[str, dict[str, Any]]
"""By task: ``images``, uint8 (n, 3, H, W); ``weights``, what each image's loss counts for (n,); ``targets``, what is
known about the images, by name (n, …)."""


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


class TaskImages(pl.LightningDataModule):
    """Batches of every task's images; those of a step depend on (seed, task, step) alone.

    Each step shuffles each task's images afresh and cuts ``batches_per_step`` batches of ``images_per_batch`` from the
    front (fewer or smaller ones if the images run out), as the official code does with its new loader a step. Under
    several processes every rank takes each batch's images rank, rank + world, …: disjoint, together the whole batch.

    Attributes:
        targets: What is known about the images of a task, by name, (N, …) each: nothing at first, and never a label
            for an unlabeled learner.

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
        self.targets: Mapping[str, Mapping[str, Tensor]] = {task: {} for task in images}
        self._images_per_batch, self._batches_per_step = images_per_batch, batches_per_step
        self._seed = seed

    def draw(self, task: str, step: int) -> Sequence[Tensor]:
        """Indices of one task's batches at one step, over all ranks: each (≤ images_per_batch,)."""
        usable = self._indices[task]
        order = torch.randperm(len(usable), generator=generator_for("step", self._seed, task, step))
        return usable[order[: self._images_per_batch * self._batches_per_step]].split(self._images_per_batch)

    def drawn(self, task: str, steps: int) -> Tensor:
        """Indices of all images of a task that the first ``steps`` steps see, ascending."""
        usable, seen = self._indices[task], torch.zeros(len(self._images[task]), dtype=torch.bool)
        for step in range(steps):
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
            images[task] = source[rows]
            weights[task] = torch.cat([torch.full((len(b[rank::world_size]),), 1 / len(b)) for b in batches])
            targets[task] = {name: known[rows] for name, known in self.targets[task].items()}
        return {"images": images, "weights": weights, "targets": targets}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Steps(self), batch_size=None)


class _Steps(IterableDataset):
    """All steps from the trainer's current one on, so that a resumed run continues where it stopped."""

    def __init__(self, module: TaskImages) -> None:
        self._module = module

    def __iter__(self) -> Iterator[Batch]:
        trainer = self._module.trainer
        if trainer is None:
            raise ConfigError("the batches of a step are drawn by a Trainer. Call TaskImages.batch(step) instead.")
        for step in count(trainer.global_step):
            yield self._module.batch(step, trainer.global_rank, trainer.world_size)
