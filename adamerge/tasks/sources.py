"""Where images come from: folders of images, tables that Hugging Face datasets reads, data sets of the hub."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamerge.errors import DataError, OutputError, shortlist
from adamerge.files import sha256_file, write_text

_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TABLE_SUFFIXES = {".arrow", ".parquet", ".tar", ".zip"}
_TABLE_NAMES = {"metadata.csv", "metadata.jsonl"}  # Hugging Face's companions of an image folder
_SPLIT_NAMES = {"train", "training", "test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}
LAYOUT = "Put parquet files (test.parquet, train.parquet) or images (SPLIT/CLASS/*.png or CLASS/*.png) there."
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_UNSETTLED_SECONDS = 2.0  # a file younger than this may change again within one tick of its time stamps


@dataclass(frozen=True)
class Table:
    """One split: encoded images with where each comes from, and labels, each read when asked for."""

    images: Callable[[], Iterator[tuple[str, bytes | Path]]]
    labels: Callable[[], Iterable[object]]
    class_names: list[str] | None
    labelled: bool


@dataclass(frozen=True)
class Source:
    """A split that is identified but not read."""

    where: str
    content: str
    open: Callable[[], Table]


def open_folder(folder: Path, split: str, cache_dir: Path) -> Source:
    """A split of a local folder: images in folders, or whatever Hugging Face datasets reads.

    Raises:
        DataError: If the folder holds no images, or no such split.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )
    where = f"split '{split}' of {folder}"
    if any(path.suffix.lower() in _TABLE_SUFFIXES or path.name in _TABLE_NAMES for path in files):
        content = _content_hash(folder, files, cache_dir)
        return Source(where, content, lambda: _folder_table(folder, split, cache_dir, where))
    images = [path for path in files if path.suffix.lower() in _IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"{folder}: the data folder holds no images. {LAYOUT}")
    base, chosen = _images_of_split(folder, split, images)
    return Source(where, _content_hash(base, chosen, cache_dir), lambda: _image_table(base, chosen, where))


def _images_of_split(folder: Path, split: str, images: list[Path]) -> tuple[Path, list[Path]]:
    """The folder above the class folders and the images below it."""
    parts = [path.relative_to(folder).parts for path in images]
    tops = {part[0] for part in parts if len(part) > 1}
    by_split = all(len(part) > 2 for part in parts) or (all(len(part) > 1 for part in parts) and tops <= _SPLIT_NAMES)
    if not by_split:
        return folder, images
    if split not in tops:
        raise DataError(
            f"{folder}: no split '{split}', there are {', '.join(sorted(tops))}. Choose one with `splits:` in "
            "suite.yaml."
        )
    return folder / split, [path for path, part in zip(images, parts, strict=True) if part[0] == split]


def _image_table(base: Path, images: list[Path], where: str) -> Table:
    parts = [path.relative_to(base).parts for path in images]
    nested = {len(part) > 1 for part in parts}
    if len(nested) > 1:
        loose = [part[0] for part in parts if len(part) == 1]
        raise DataError(f"{where}: images beside class folders ({shortlist(loose)}). Move or remove them.")
    labelled = nested == {True}
    names = sorted({part[0] for part in parts}) if labelled else None
    numbers = {name: number for number, name in enumerate(names or ())}
    return Table(
        images=lambda: ((str(path), path) for path in images),
        labels=lambda: (numbers[part[0]] for part in parts),
        class_names=names,
        labelled=labelled,
    )


def _folder_table(folder: Path, split: str, cache_dir: Path, where: str) -> Table:
    """What Hugging Face datasets makes of a folder; parquet files are then read column by column, without a copy."""
    import datasets

    with _quiet():
        try:
            builder = datasets.load_dataset_builder(str(folder), cache_dir=str(_made(cache_dir / "datasets")))
            splits: Any = builder.as_streaming_dataset()
        except OutputError:
            raise
        except Exception as error:
            raise DataError(
                f"{folder}: Hugging Face datasets cannot read it ({_first_line(error)}). {LAYOUT}"
            ) from error
    if split not in splits:
        raise DataError(
            f"{folder}: no split '{split}', there are {', '.join(map(str, splits))}. Choose one with `splits:` in "
            "suite.yaml."
        )
    files = [Path(file) for file in (builder.config.data_files or {}).get(split, ())]
    if files and all(file.suffix == ".parquet" and file.is_file() for file in files):
        return _table(splits[split], where, lambda column: _parquet_column(files, column))
    return _table(splits[split], where)


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {directory}: {error.strerror}. Choose another place with paths.cache_dir=DIR."
        ) from error
    return directory


def open_hub(data: str, split: str, cache_dir: Path) -> Source:
    """A split of a hub data set, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, downloaded below ``cache_dir``.

    Raises:
        DataError: If the name is no hub name, or the split cannot be loaded.
    """
    name, _, config = data.partition(":")
    where = f"split '{split}' of {data}"
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"{data}: no such data folder. {LAYOUT}")
    import datasets

    with _quiet():
        try:
            dataset: Any = datasets.load_dataset(
                name, config or None, split=split, cache_dir=str(_made(cache_dir / "datasets"))
            )
        except Exception as error:
            raise DataError(
                f"{data}: no such folder, and Hugging Face datasets cannot load split '{split}' of it from the hub "
                f"({_first_line(error)}). Correct the path, or check the name, the split and the network."
            ) from error
    return Source(where, f"hub:{dataset._fingerprint}", lambda: _table(dataset, where))


# Rows of one column, each with the place it comes from: "" where the row number says enough.
_Column = Callable[[str], Iterator[tuple[str, Any]]]


def _table(dataset: Any, where: str, read: _Column | None = None) -> Table:
    """A Hugging Face data set, streamed or not, read column by column and without its own decoding."""
    import datasets

    features = dataset.features
    if features is None:
        dataset = dataset._resolve_features()
        features = dataset.features or {}
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image = "image" if "image" in features else pictures[0] if len(pictures) == 1 else None
    if image is None:
        raise DataError(
            f"{where}: no column 'image', there are {', '.join(features) or 'none'}. Rename the image column."
        )
    only = classes[0] if len(classes) == 1 else None
    label = "label" if "label" in features else only or ("cls" if "cls" in features else None)

    def read_column(column: str) -> Iterator[tuple[str, Any]]:
        chosen = dataset.select_columns([column])
        chosen = chosen.cast_column(column, datasets.Image(decode=False)) if column == image else chosen
        return (("", row[column]) for row in chosen)

    read = read or read_column
    return Table(
        images=lambda: _encoded_images(_checked(read(image), where), where),
        labels=lambda: (value for _, value in _checked(read(label), where)) if label else (),
        class_names=list(features[label].names) if label in classes else None,
        labelled=label is not None,
    )


def _parquet_column(files: list[Path], column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file) as content:
            rows = (
                value for batch in content.iter_batches(64, columns=[column]) for value in batch[column].to_pylist()
            )
            for row, value in enumerate(rows):
                yield f"row {row} of {file.name}", value


def _encoded_images(rows: Iterable[tuple[str, Any]], where: str) -> Iterator[tuple[str, bytes | Path]]:
    for row, (place, value) in enumerate(rows):
        found = value if isinstance(value, dict) else {"bytes": value}
        content, path = found.get("bytes"), found.get("path")
        place = ", ".join(part for part in (place, path) if part) or "no file name"
        if isinstance(content, bytes):
            yield place, content
        elif path:
            yield place, Path(path)
        else:
            raise DataError(f"{where}: row {row} ({place}) has no image. Repair or remove it.")


def _checked(rows: Iterator[Any], where: str) -> Iterator[Any]:
    """``rows``, with a library's error while reading turned into one that names the place."""
    count = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"{where}: cannot be read after row {count} ({_first_line(error)}). It is truncated or corrupt: copy "
                "or download it again."
            ) from error
        count += 1
        yield row


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no log lines beside the error that is raised or about a README without a data card."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub.repocard")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- What a folder holds ----------------------------------------------------------------------------------------------


def _content_hash(base: Path, files: list[Path], cache_dir: Path) -> str:
    """SHA-256 over names and contents; a file's own hash is remembered as long as its inode and times do not change."""
    memo_file = cache_dir / "images" / f"{hashlib.sha256(str(base.absolute()).encode()).hexdigest()[:32]}.hashes.json"
    try:
        memo = json.loads(memo_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memo = {}
    settled = time.time() - _UNSETTLED_SECONDS
    digest, current = hashlib.sha256(), {}
    for path in files:
        name = path.relative_to(base).as_posix()
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = memo.get(name)
        value = known[1] if isinstance(known, list) and known[0] == state else sha256_file(path)
        if max(stat.st_mtime, stat.st_ctime) < settled:
            current[name] = [state, value]
        digest.update(f"{name}\0{value}\0".encode())
    if current != memo:
        write_text(memo_file, json.dumps(current))
    return digest.hexdigest()
