"""Puts the rendered tasks on disk as parquet files, once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from adamerge.files import atomic_file
from adamerge.tasks.mini.registry import TASKS, TEST_SEED, TRAIN_SEED, MiniTask, render_task

RENDERING = "1"  # raise it whenever any picture changes
SPLITS = {"train": (TRAIN_SEED, 1000), "test": (TEST_SEED, 500)}  # name: (seed, images)


def materialize(cache_dir: Path, *, splits: Sequence[str] = ("train", "test")) -> Path:
    """Render what is missing under ``cache_dir`` and return the folder that holds one folder a task.

    The files are ``<task>/<split>.parquet`` in the image layout of Hugging Face ``datasets``: ``image``
    and ``label``, a ClassLabel. A file is either complete or absent, so several processes may do this at once.

    Raises:
        KeyError: If a split is neither ``train`` nor ``test``.
        OutputError: If ``cache_dir`` cannot be written.
    """
    root = Path(cache_dir) / f"mini-{rendering_hash()}"
    for task in TASKS.values():
        for split in splits:
            target = root / task.name / f"{split}.parquet"
            seed, count = SPLITS[split]
            if not target.exists():
                write_parquet(task, seed, count, target)
    return root


def rendering_hash() -> str:
    """Twelve hex digits that change with the pictures: their version, the tasks and the fonts' package."""
    from hashlib import sha256
    from importlib.metadata import version

    parts = [RENDERING, repr(SPLITS), version("matplotlib"), version("pillow")]
    parts += [f"{task.name}|{task.classes}|{task.field}" for task in TASKS.values()]
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


def write_parquet(task: MiniTask, seed: int, count: int, target: Path) -> None:
    """Render ``count`` images of a task and write them, whole or not at all."""
    import pyarrow.parquet
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    images, labels = render_task(task.name, seed, count)
    rows = []
    for image in images:
        buffer = io.BytesIO()
        Picture.fromarray(image).save(buffer, "PNG", compress_level=1)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=list(task.classes))})
    dataset = Dataset.from_dict({"image": rows, "label": labels.tolist()}, features=features)
    with atomic_file(target) as temporary:
        pyarrow.parquet.write_table(dataset.data.table, temporary)  # Dataset.to_parquet draws a progress bar
