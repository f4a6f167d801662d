"""Top-1 accuracy of an encoder and a zero-shot head, and a cache of such accuracies."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import adamerge
from adamerge.errors import ConfigError, DataError, ShapeError
from adamerge.files import write_text
from adamerge.tasks.datasets import ImageSet

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def accuracy(
    encode: Callable[[Tensor], Tensor],
    images: ImageSet,
    head: Tensor,
    *,
    indices: Tensor | None,
    batch_size: int,
    device: torch.device,
    precision: str,
) -> float | None:
    """The fraction of images whose most similar class is their label.

    Args:
        encode: uint8 images (B, 3, H, W) on ``device`` to features (B, d), not normalised.
        images: The split to score.
        head: (C, d), as ``zero_shot_heads`` makes it.
        indices: The images to score, (n,); None scores all.
        batch_size: Images per call of ``encode``.
        device: Where ``encode`` computes.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``, as Lightning's Trainer takes it. Similarities are always
            computed in float32.

    Returns:
        A fraction; None where the images have no labels.

    Raises:
        ConfigError: If the precision is another.
        DataError: If no images are to be scored.
        ShapeError: If the head has another number of classes than the images.
    """
    if precision not in _AUTOCAST:
        raise ConfigError(f"trainer.precision: expected one of {', '.join(_AUTOCAST)}, found '{precision}'.")
    if images.labels is None:
        return None
    if images.class_names is not None and len(images.class_names) != len(head):
        raise ShapeError(
            f"expected a head of {len(images.class_names)} classes, found one of shape {tuple(head.shape)}."
        )
    total = len(images.images) if indices is None else len(indices)
    if total == 0:
        raise DataError("there are no images to score. Use data.adapt=all, or more images.")
    classes = head.to(device, torch.float32).T  # (d, C)
    labels = (images.labels if indices is None else images.labels[indices]).to(device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode(), _autocast(device, precision):
        for start in range(0, total, batch_size):
            rows = slice(start, start + batch_size)
            batch = images.images[rows if indices is None else indices[rows]]
            batch = batch.pin_memory() if device.type == "cuda" else batch
            features = encode(batch.to(device, non_blocking=True))
            with torch.autocast(device.type, enabled=False):
                logits = torch.nn.functional.normalize(features.float(), dim=-1) @ classes  # (B, C)
            correct += (logits.argmax(dim=-1) == labels[rows]).sum()
    return correct.item() / total


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    dtype = _AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


class AccuracyCache:
    """Accuracies that were computed before, one small JSON file each."""

    def __init__(self, directory: Path | None) -> None:
        """Keep accuracies in ``directory``; None computes every time."""
        self._directory = directory

    def get_or_compute(self, parts: Mapping[str, str], compute: Callable[[], float | None]) -> float | None:
        """The accuracy that belongs to ``parts`` (whatever it depends on, by name) and this version of the code."""
        if self._directory is None:
            return compute()
        described = {**parts, "code": code_version()}
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        file = self._directory / f"{key}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))["accuracy"]
        except (OSError, ValueError, KeyError, TypeError):  # never computed, or damaged
            result = compute()
        write_text(file, json.dumps({"accuracy": result, **described}, indent=1))
        return result


@cache
def code_version() -> str:
    """SHA-256 over the sources that an accuracy depends on: models, evaluation and the reading of images."""
    root = Path(adamerge.__file__).parent
    files = [*root.glob("models/*.py"), *root.glob("evaluation/*.py")]
    files += [root / "tasks" / name for name in ("datasets.py", "sources.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()
