"""Everything a merge needs, loaded and checked before any work starts."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from adamerge.bank import ParameterBank, select_keys
from adamerge.bank.storage import StoredTaskVectors, dtype_named
from adamerge.errors import ConfigError, DataError
from adamerge.files import scratch_file
from adamerge.models.heads import zero_shot_heads
from adamerge.models.open_clip import load_clip
from adamerge.models.protocol import ClipModel
from adamerge.tasks.corruptions import Corruption
from adamerge.tasks.datamodule import split_indices
from adamerge.tasks.datasets import ImageSet, load_image_set
from adamerge.tasks.specs import SuiteSpec, TaskSpec


@dataclass(frozen=True)
class Problem:
    """One pretrained CLIP, its experts and their images.

    Attributes:
        suite: Where all came from.
        clip: The pretrained model.
        bank: θ₀ and τ.
        heads: Zero-shot head by task, (C, d), logit scale included.
        class_names: By task.
        unlabeled: Images to adapt on, without labels, by task.
        scored: Images to score, with labels where the data has them, by task.
        adapt_indices: Which of ``unlabeled`` may be used, by task.
        score_indices: Which of ``scored`` count, by task.
        cache_dir: Where to keep what is worth keeping.
    """

    suite: SuiteSpec
    clip: ClipModel
    bank: ParameterBank
    heads: dict[str, Tensor]
    class_names: dict[str, tuple[str, ...]]
    unlabeled: dict[str, ImageSet]
    scored: dict[str, ImageSet]
    adapt_indices: dict[str, Tensor]
    score_indices: dict[str, Tensor]
    cache_dir: Path

    def labelled(self, tasks: Collection[str] | None = None) -> dict[str, ImageSet]:
        """The labelled split of some tasks, all by default, for searches and supervised learners.

        Raises:
            DataError: If a task has no labels there.
        """
        images = {
            task.name: _load(task, task.splits.labelled, self.clip, self.cache_dir, labels=True)
            for task in self.suite.tasks
            if tasks is None or task.name in tasks
        }
        for task, split in images.items():
            if split.labels is None:
                raise DataError(
                    f"the labelled split of task '{task}' has no label column. Use a method that needs no labels "
                    "(a number for method.scaling), or add labels."
                )
        return images


def load_problem(
    suite: SuiteSpec,
    *,
    cache_dir: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    strict_dtype: bool,
    dtype: str,
    device: str,
    adapt: Literal["all", "half"],
    split_seed: int,
    fraction: float,
    images_per_task: int | None,
    corruption: Corruption | None,
    corrupt: Literal["all", "scored"],
) -> Problem:
    """Read the model, the experts and the images of a suite.

    Args:
        suite: What to load.
        cache_dir: For decoded images and heads.
        include: Shell patterns of keys to merge; all mergeable keys when empty.
        exclude: Shell patterns of keys not to merge.
        strict_dtype: As ``ParameterBank.from_experts`` takes it.
        dtype: Of τ at rest, as ``dtype_named`` takes it.
        device: ``auto``: τ goes where learning runs; ``host``: it stays in page-locked memory and is streamed there;
            ``disk``: likewise in a file that is mapped into memory. Without CUDA, ``host`` is ``auto``.
        adapt: As ``split_indices`` takes it; halves are drawn where a task adapts on the split that is scored.
        split_seed: Of the halves and the fraction.
        fraction: Of the images to adapt on.
        images_per_task: At most so many of them.
        corruption: Of the images.
        corrupt: Which: ``all``, or only those ``scored``.

    Raises:
        AdamergeError: A child of it for everything that is wrong with the files, in one message each.
    """
    stored = dtype_named(dtype)
    if device not in ("auto", "host", "disk"):
        raise ConfigError(f"bank.device is 'auto', 'host' or 'disk', found '{device}'.")
    if corrupt not in ("all", "scored"):
        raise ConfigError(f"data.corrupt is 'all' or 'scored', found '{corrupt}'.")
    clip = load_clip(suite.model, root=suite.root)
    keys = select_keys(clip.merge_keys, include=include, exclude=exclude)
    with scratch_file(cache_dir / "bank") if device == "disk" else nullcontext() as file:
        bank = ParameterBank.from_experts(
            clip.state_dict,
            {task.name: Path(task.expert) for task in suite.tasks},
            keys,
            strict_dtype=strict_dtype,
            stored=stored,
            file=file,
        )
    if device == "host" and isinstance(bank.task_vectors, StoredTaskVectors):
        bank.task_vectors.pin()
    unlabeled, scored, adapt_indices, score_indices, class_names = {}, {}, {}, {}, {}
    for task in suite.tasks:
        name = task.name
        adapted = corruption if corrupt == "all" else None
        unlabeled[name] = _load(task, task.splits.adapt, clip, cache_dir, labels=False, corruption=adapted)
        scored[name] = _load(task, task.splits.evaluate, clip, cache_dir, labels=True, corruption=corruption)
        names = task.classes or scored[name].class_names
        if names is None:
            raise DataError(f"the data of task '{name}' names no classes. Add `classes: [...]` to it in suite.yaml.")
        class_names[name] = tuple(names)
        options = {"split_seed": split_seed, "fraction": fraction}
        total = len(unlabeled[name].images)
        adapt_indices[name], score_indices[name] = split_indices(
            total, name, adapt=adapt, images_per_task=images_per_task, **options
        )
        if task.splits.adapt != task.splits.evaluate:
            _, score_indices[name] = split_indices(len(scored[name].images), name, adapt="all", **options)
    prompts = {task.name: (class_names[task.name], task.templates) for task in suite.tasks}
    heads = zero_shot_heads(clip, prompts, cache_dir)
    return Problem(suite, clip, bank, heads, class_names, unlabeled, scored, adapt_indices, score_indices, cache_dir)


def suite_named(name: str, root: str | None, tasks: Sequence[str] | None, cache_dir: Path) -> SuiteSpec:
    """The embedded suite ``mini``, or the folder ``root`` for every other name.

    Raises:
        ConfigError: If a folder suite has no root.
    """
    from adamerge.tasks.specs import load_suite

    if name == "mini":
        from adamerge.tasks import mini

        return load_suite(mini.ROOT, tasks=tasks, data_root=mini.materialize(cache_dir))
    if root is None:
        raise ConfigError(f"suite '{name}' needs suite.root=DIR, the folder that holds suite.yaml.")
    return load_suite(Path(root), tasks=tasks)


def _load(
    task: TaskSpec,
    split: str,
    clip: ClipModel,
    cache_dir: Path,
    *,
    labels: bool,
    corruption: Corruption | None = None,
) -> ImageSet:
    options = {"class_names": task.classes, "labels": labels, "corruption": corruption}
    try:
        return load_image_set(task.data, split, clip, cache_dir, **options)
    except DataError as error:
        raise DataError(f"task '{task.name}': {error}") from error
