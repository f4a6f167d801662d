"""Images of a task: decoded once into a memory-mapped uint8 cache, keyed by content."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adamerge.errors import DataError, OutputError, shortlist
from adamerge.files import atomic_file, write_text
from adamerge.models.protocol import ClipModel
from adamerge.tasks.corruptions import Corruption
from adamerge.tasks.sources import LAYOUT, Source, open_folder, open_hub


@dataclass(frozen=True)
class ImageSet:
    """The images of one split in the size of the model.

    Attributes:
        images: uint8 (N, 3, H, W), memory-mapped, private on write.
        labels: int64 (N,); None where they are missing or were not asked for.
        class_names: By label; None where neither the data set nor the caller names them.
        key: Identifies the images: content, split and preprocessing.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    key: str


def load_image_set(
    data: str,
    split: str,
    clip: ClipModel,
    cache_dir: Path,
    *,
    class_names: Sequence[str] | None = None,
    labels: bool = True,
    corruption: Corruption | None = None,
) -> ImageSet:
    """The images of ``split``, decoded and resized at the first call and memory-mapped from then on.

    A folder may hold images as SPLIT/CLASS/FILE, as SPLIT/FILE (without labels), or as CLASS/FILE or FILE (the same
    images for every split); or anything that Hugging Face ``datasets`` reads, such as parquet files named by split.
    Everything else is a data set of the hub. Of tables, the image column is ``image`` or the only image feature; the
    label column is ``label``, the only ClassLabel, or ``cls``, and may be missing.

    Args:
        data: A folder, or ``OWNER/NAME`` or ``OWNER/NAME:CONFIG`` on the hub.
        split: Name of the split.
        clip: Whose ``resize`` makes the images.
        cache_dir: Images go to ``cache_dir/images``, Hugging Face's own files to ``cache_dir/datasets``.
        class_names: Replace the data set's names, label by label.
        labels: False leaves the label column unread.
        corruption: Applied to every image after resizing.

    Raises:
        DataError: If the data set or split is missing or empty, an image cannot be decoded (named by row), or labels
            are not integers from 0 to the number of class names.
    """
    folder = Path(data)
    source = open_folder(folder, split, cache_dir) if folder.is_dir() else open_hub(data, split, cache_dir)
    identity = ["images-1", source.content, split, clip.preprocess_hash]
    identity += [] if corruption is None else ["corrupted-2", corruption.name, str(corruption.severity)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    files = _CacheFiles(cache_dir / "images", key)
    images, info = files.read() or _decode(source, clip, files, corruption)
    names = _class_names(info["class_names"], class_names, source.where)
    values = None
    if labels and info["labelled"]:
        values = files.read_labels(len(images))
        if values is None:
            values = _integers(source.open().labels(), source.where)
            if len(values) != len(images):
                raise DataError(
                    f"{source.where}: {len(images)} images but {len(values)} labels. Was it changed just now?"
                )
            files.write_labels(values)
        _check_range(values, names, source.where)
    return ImageSet(images, values, names, key)


# --- The cache --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CacheFiles:
    """KEY.npy, KEY.labels.npy and, written last, KEY.json; two processes that write them write the same."""

    directory: Path
    key: str

    def path(self, suffix: str) -> Path:
        return self.directory / f"{self.key}{suffix}"

    def read(self) -> tuple[Tensor, dict[str, Any]] | None:
        try:
            info = json.loads(self.path(".json").read_text(encoding="utf-8"))
            array = np.load(self.path(".npy"), mmap_mode="c")
            complete = list(array.shape) == info["shape"] and array.dtype == np.uint8
        except (OSError, ValueError, KeyError, EOFError):
            return None
        return (torch.from_numpy(array), info) if complete else None

    def read_labels(self, count: int) -> Tensor | None:
        try:
            array = np.load(self.path(".labels.npy"))
        except (OSError, ValueError, EOFError):
            return None
        return torch.from_numpy(array) if array.shape == (count,) and array.dtype == np.int64 else None

    def write_labels(self, labels: Tensor) -> None:
        with atomic_file(self.path(".labels.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, labels.numpy())


def _decode(
    source: "Source", clip: ClipModel, files: _CacheFiles, corruption: Corruption | None
) -> tuple[Tensor, dict[str, Any]]:
    """Write the cache of ``source``, one image at a time."""
    table = source.open()
    shape: tuple[int, ...] = ()
    count = 0
    with atomic_file(files.path(".npy")) as temporary, _Writer(temporary, files.directory) as writer:
        for row, (origin, content) in enumerate(table.images()):
            try:
                image = clip.resize(_picture(content))
            except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error
                raise DataError(
                    f"{source.where}: row {row} ({origin}) is not a readable image ({_reason(error)}). Repair or "
                    "remove it."
                ) from error
            if count and tuple(image.shape) != shape:
                raise DataError(f"{source.where}: row {row} ({origin}) has shape {tuple(image.shape)}, not {shape}.")
            shape, count = tuple(image.shape), count + 1
            writer.append(image if corruption is None else corruption(image, row))
        if count == 0:
            raise DataError(f"{source.where}: the split holds no images. {LAYOUT}")
        writer.finish((count, *shape))
    info = {"shape": [count, *shape], "class_names": table.class_names, "labelled": table.labelled}
    write_text(files.path(".json"), json.dumps(info))
    stored = files.read()
    if stored is None:
        raise DataError(
            f"{files.path('.npy')}: the cache just written cannot be read. Check the disk, or paths.cache_dir."
        )
    return stored


class _Writer:
    """A version 1 .npy file of uint8 that grows; its head has 128 bytes at any length, so it can be corrected last."""

    def __init__(self, path: Path, shown: Path) -> None:
        self._path, self._shown = path, shown

    def __enter__(self) -> "_Writer":
        self._file = self._path.open("wb")
        self._file.write(bytes(128))
        return self

    def append(self, image: Tensor) -> None:
        self._file.write(image.contiguous().numpy().data)

    def finish(self, shape: tuple[int, ...]) -> None:
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._file.close()
        except OSError as failure:
            error = failure
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot write {self._shown}: {error.strerror}. Free some room or choose paths.cache_dir=DIR."
            ) from error


def _picture(content: bytes | Path) -> Any:
    """A Pillow image, upright as its EXIF tag says (as Hugging Face decodes)."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


# --- Labels -----------------------------------------------------------------------------------------------------------


def _integers(values: Iterable[object], where: str) -> Tensor:
    labels = list(values)
    for row, value in enumerate(labels):
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(
                f"{where}: the label of row {row} is {value!r}, expected an integer. Store labels as ClassLabel or as "
                "integers from 0, or leave the column out."
            )
    return torch.tensor(labels, dtype=torch.int64)


def _class_names(found: list[str] | None, given: Sequence[str] | None, where: str) -> tuple[str, ...] | None:
    if given is None or found is None:
        names = given if found is None else found
        return None if names is None else tuple(names)
    if len(given) != len(found):
        raise DataError(
            f"{where}: {len(given)} class names are given, but the data set has {len(found)} classes "
            f"({shortlist(found)}). Give one name for each, or none."
        )
    if list(given) != list(found) and set(given) == set(found):
        raise DataError(
            f"{where}: the class names given are the data set's in another order. Labels follow the data set's order "
            f"({', '.join(found[:5])}{', …' if len(found) > 5 else ''}); leave `classes` out."
        )
    return tuple(given)


def _check_range(labels: Tensor, names: tuple[str, ...] | None, where: str) -> None:
    wrong = (labels < 0) | (labels >= (len(names) if names else torch.iinfo(torch.int64).max))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        have = f"{len(names)} class names (labels 0 to {len(names) - 1})" if names else "labels from 0"
        raise DataError(
            f"{where}: row {row} has label {int(labels[row])}, expected {have}; {int(wrong.sum())} such rows. Correct "
            "`classes` or the labels, or leave the label column out if the images have none."
        )
