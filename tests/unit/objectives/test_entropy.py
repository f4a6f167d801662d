"""Entropy of predictions."""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import literals

from adamerge.errors import ShapeError
from adamerge.objectives import Entropy, Outputs, Target, softmax_entropy


@pytest.mark.parametrize(("logits", "expected"), literals.ENTROPIES)
def test_values_by_hand(logits: tuple[float, ...], expected: float) -> None:
    entropy = softmax_entropy(torch.tensor([logits, logits], dtype=torch.float64))
    torch.testing.assert_close(entropy, torch.full((2,), expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_slope_by_hand() -> None:
    logits, slope = literals.ENTROPY_SLOPE
    at = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    softmax_entropy(at).sum().backward()
    torch.testing.assert_close(at.grad, torch.tensor([slope], dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_certain_prediction_has_entropy_and_slope_exactly_zero() -> None:
    logits = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    entropy = softmax_entropy(logits)
    entropy.sum().backward()
    assert entropy.item() == 0
    assert logits.grad.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("classes", [1, 2, 10, 397])
def test_uniform_logits_give_log_of_the_number_of_classes(classes: int) -> None:
    torch.testing.assert_close(softmax_entropy(torch.full((3, classes), 7.0)), torch.full((3,), log(classes)))


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
def test_lies_between_zero_and_log_of_the_number_of_classes(rows: list[list[float]]) -> None:
    entropy = softmax_entropy(torch.tensor(rows))
    assert entropy.shape == (len(rows),)
    assert (entropy >= 0).all()
    assert (entropy <= log(4) + 1e-6).all()


def test_does_not_see_a_shift_of_the_logits() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(softmax_entropy(logits + 50), softmax_entropy(logits), rtol=1e-12, atol=0)


def test_gradcheck() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softmax_entropy, (logits,))


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_is_computed_in_float32_or_wider(dtype: torch.dtype, computed: torch.dtype) -> None:
    logits = (3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).to(dtype)
    entropy = softmax_entropy(logits)
    assert entropy.dtype == computed
    torch.testing.assert_close(entropy, softmax_entropy(logits.to(computed)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\(B, C\)"):
        softmax_entropy(torch.zeros(shape))


def test_the_objective_is_per_image() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    outputs = Outputs(logits, torch.empty(4, 0))
    assert torch.equal(Entropy()(outputs, Target()), softmax_entropy(logits))
