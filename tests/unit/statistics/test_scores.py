"""Accuracy and loss, by hand and image by image."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import nn
from unit.zoo import make_zoo

from adamerge.errors import DataError
from adamerge.statistics import Expert, Scores


def make_expert(dtype: torch.dtype = torch.float32) -> Expert:
    """Eight images of task 1, four classes."""
    zoo = make_zoo(dtype)
    zoo.network.load_state_dict(zoo.experts[1])
    images, keys = torch.cat(zoo.batches[0][1]), tuple(zoo.pretrained)
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    device = torch.device("cpu")
    return Expert("task1", zoo.network, zoo.heads[1], images, labels, keys, device, "32-true", 3)


def test_by_hand() -> None:
    # Features of length 1 give logits (2, -2), (-2, 2), the same, and (0, 0).
    images = torch.tensor([[5.0, 0], [0, 3], [0, 1], [1, 1]])
    head = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    labels = torch.tensor([0, 1, 0, 0])
    expert = Expert("task", nn.Identity(), head, images, labels, (), torch.device("cpu"), "32-true", 3)
    found = Scores(None)(expert)
    right, wrong, even = log(1 + exp(-4)), log(1 + exp(4)), log(2)
    assert found["accuracy"].item() == 3 / 4  # of equal logits the first class counts
    assert found["loss"].item() == pytest.approx((2 * right + wrong + even) / 4, rel=1e-6)
    assert {value.dtype for value in found.values()} == {torch.float64}
    assert {value.shape for value in found.values()} == {torch.Size([])}


def test_image_by_image() -> None:
    expert = make_expert()
    right, losses = 0, []
    for image, label in zip(expert.images, expert.labels, strict=True):
        features = expert.network(image[None])[0].double()
        logits = expert.head.double() @ (features / features.norm())
        losses.append(logits.exp().sum().log() - logits[label])
        right += int(logits.argmax() == label)
    found = Scores(None)(expert)
    assert 0 < right < 8
    assert found["accuracy"].item() == right / 8
    assert found["loss"].item() == pytest.approx(float(sum(losses)) / 8, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    expert = make_expert()
    torch.testing.assert_close(
        Scores(None)(replace(expert, batch_size=batch_size)), Scores(None)(expert), rtol=1e-5, atol=0
    )


def test_in_half_precision_are_near() -> None:
    expert = make_expert()
    found, exact = Scores(None)(replace(expert, precision="bf16-mixed"))["loss"], Scores(None)(expert)["loss"]
    assert 0 < abs(found - exact) < 0.1 * exact


def test_need_labels_and_build_no_graph() -> None:
    assert Scores(64).needs == "labels"
    assert Scores(64).to_json() == {"name": "scores", "images_per_task": 64}
    expert = make_expert()
    expert.network.requires_grad_(True)
    assert not any(value.requires_grad for value in Scores(None)(expert).values())


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    expert = make_expert()
    labels = expert.labels.clone()
    labels[3] = label
    with pytest.raises(DataError, match=rf"task 'task1': labels are numbers of its 4 classes, from 0; found {label}\."):
        Scores(None)(replace(expert, labels=labels))
