"""Cross-entropy with labels."""

from math import log

import pytest
import torch
from torch import Tensor

from adamerge.errors import DataError
from adamerge.objectives import CrossEntropy, Outputs, Target


def outputs(logits: Tensor) -> Outputs:
    return Outputs(logits, logits.new_empty(len(logits), 0))


def test_values_by_hand_one_per_image() -> None:
    logits = torch.tensor([[1.0, 3.0], [1.0, 3.0], [5.0, 5.0]], dtype=torch.float64).log()
    found = CrossEntropy()(outputs(logits), Target(labels=torch.tensor([0, 1, 1])))
    torch.testing.assert_close(found, torch.tensor([log(4), log(4 / 3), log(2)], dtype=torch.float64))


def test_slope_is_the_probability_less_the_label() -> None:
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log().requires_grad_()
    CrossEntropy()(outputs(logits), Target(labels=torch.tensor([0]))).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.75, 0.75]], dtype=torch.float64))


def test_gradcheck() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    target = Target(labels=torch.tensor([4, 0, 2]))
    assert torch.autograd.gradcheck(lambda at: CrossEntropy()(outputs(at), target), (logits,))


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"needs labels, and these images have none\. Use a labelled split"):
        CrossEntropy()(outputs(torch.zeros(2, 3)), Target())
