"""Accuracy is the fraction of nearest class embeddings that match, and is computed once per content."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamerge.errors import ConfigError, DataError, ShapeError
from adamerge.evaluation.accuracy import AccuracyCache, accuracy, code_version
from adamerge.tasks.datasets import ImageSet

CPU = torch.device("cpu")
CLASSES = 3


def image_set(count: int = 10, labels: bool = True) -> ImageSet:
    """Images whose first pixel's channel with the value 200 is the class that ``colours`` sees."""
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    seen = torch.arange(count) % CLASSES
    images[torch.arange(count), seen, 0, 0] = 200
    truth = seen.clone()
    truth[-3:] = (truth[-3:] + 1) % CLASSES  # the last three are labelled otherwise
    return ImageSet(images, truth if labels else None, ("r", "g", "b"), "key")


def colours(images: Tensor) -> Tensor:
    assert images.dtype == torch.uint8
    return images[:, :, 0, 0].float() * torch.linspace(0.1, 5, len(images))[:, None]  # lengths must not matter


def score(images: ImageSet, encode: Callable[[Tensor], Tensor] = colours, **changes) -> float | None:
    options = {"indices": None, "batch_size": 4, "device": CPU, "precision": "32-true", "head": torch.eye(3) * 50}
    return accuracy(encode, images, **(options | changes))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 99])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fraction(batch_size: int, precision: str) -> None:
    assert score(image_set(), batch_size=batch_size, precision=precision) == pytest.approx(0.7)


def test_subset() -> None:
    assert score(image_set(), indices=torch.tensor([9, 0, 8, 1])) == pytest.approx(0.5)
    assert score(image_set(), indices=torch.tensor([7])) == 0.0


def test_without_labels_nothing_is_computed() -> None:
    def never(images: Tensor) -> Tensor:
        raise AssertionError

    assert score(image_set(labels=False), never) is None


def test_mixed_precision_reaches_the_encoder_and_not_the_similarities() -> None:
    """Under bf16 the similarities of these two classes would be equal, and the first of them would win."""
    head = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])
    dtypes = []

    def encode(images: Tensor) -> Tensor:
        mixed = torch.nn.functional.linear(torch.ones(len(images), 2), torch.eye(2))
        dtypes.append(mixed.dtype)
        return mixed

    images = ImageSet(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.ones(2, dtype=torch.int64), ("a", "b"), "")
    assert score(images, encode, head=head, precision="bf16-mixed") == 1.0
    assert score(images, encode, head=head) == 1.0
    assert dtypes == [torch.bfloat16, torch.float32]


def test_leaves_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.eye(3))

    def encode(images: Tensor) -> Tensor:
        features = colours(images) @ weight
        assert not features.requires_grad
        return features

    score(image_set(), encode)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(precision: str) -> None:
    device = torch.device("cuda")

    def encode(images: Tensor) -> Tensor:
        assert images.device.type == "cuda"
        return images[:, :, 0, 0].float()

    assert score(image_set(), encode, device=device, precision=precision) == pytest.approx(0.7)


def test_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.precision: expected one of 32-true, bf16-mixed, 16-mixed, found '8'"
    ):
        score(image_set(), precision="8")
    with pytest.raises(ShapeError, match=r"expected a head of 3 classes, found one of shape \(4, 3\)"):
        score(image_set(), head=torch.ones(4, 3))
    with pytest.raises(DataError, match="no images to score"):
        score(image_set(), indices=torch.tensor([], dtype=torch.int64))


class TestCache:
    @pytest.mark.parametrize("value", [0.25, None])
    def test_computed_once(self, tmp_path: Path, value: float | None) -> None:
        calls = []

        def compute() -> float | None:
            calls.append(1)
            return value

        for _ in range(2):
            cache = AccuracyCache(tmp_path / "accuracy")
            assert cache.get_or_compute({"weights": "a", "head": "b"}, compute) == value
            assert cache.get_or_compute({"head": "b", "weights": "a"}, compute) == value
        assert len(calls) == 1

    def test_every_part_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = AccuracyCache(tmp_path)
        cache.get_or_compute({"weights": "a", "head": "b"}, lambda: 0.0)
        assert cache.get_or_compute({"weights": "b", "head": "a"}, lambda: 1.0) == 1.0
        assert cache.get_or_compute({"weights": "a", "head": "b", "kind": "c"}, lambda: 2.0) == 2.0
        monkeypatch.setattr("adamerge.evaluation.accuracy.code_version", lambda: "another")
        assert cache.get_or_compute({"weights": "a", "head": "b"}, lambda: 3.0) == 3.0

    def test_without_a_directory(self) -> None:
        cache = AccuracyCache(None)
        assert cache.get_or_compute({}, lambda: 0.0) == 0.0
        assert cache.get_or_compute({}, lambda: 1.0) == 1.0

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
    def test_damaged_files_are_made_again(self, tmp_path: Path, content: str) -> None:
        cache = AccuracyCache(tmp_path)
        cache.get_or_compute({}, lambda: 0.5)
        (file,) = tmp_path.glob("*.json")
        file.write_text(content)
        assert cache.get_or_compute({}, lambda: 0.75) == 0.75
        assert json.loads(file.read_text())["accuracy"] == 0.75

    def test_a_failure_is_not_kept(self, tmp_path: Path) -> None:
        def fail() -> float:
            raise DataError("x")

        cache = AccuracyCache(tmp_path)
        with pytest.raises(DataError):
            cache.get_or_compute({}, fail)
        assert cache.get_or_compute({}, lambda: 1.0) == 1.0

    def test_code_version_is_a_hash(self) -> None:
        assert len(code_version()) == 64
