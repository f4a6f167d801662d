"""Raw parameter to λ and back."""

from math import log

import pytest
import torch
from reference import layerwise

from adamerge.errors import ConfigError
from adamerge.merging import CONSTRAINTS
from adamerge.merging.constraints import constraint_named

RAW = torch.tensor([[-2.0, -0.1, 0.3, 0.999], [0.5, 1.1, 7.0, 0.001]], dtype=torch.float64)
INSIDE = torch.tensor([[0.3, 0.01, 0.99], [0.3, 0.5, 0.2]], dtype=torch.float64)


def test_the_names_are_the_documented_ones() -> None:
    assert set(CONSTRAINTS) == {"identity", "clamp", "sigmoid", "softmax"}


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_values_and_slopes_equal_the_reference(name: str) -> None:
    weights = torch.linspace(-1, 2, RAW.numel(), dtype=torch.float64).view_as(RAW)
    values, slopes = [], []
    for function in (CONSTRAINTS[name].forward, layerwise.CONSTRAINTS[name]):
        raw = RAW.clone().requires_grad_()
        value = function(raw)
        (value * weights).sum().backward()
        values.append(value.detach())
        slopes.append(raw.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["identity", "clamp", "sigmoid"])
def test_inverse_reaches_the_initial_value(name: str) -> None:
    constraint = CONSTRAINTS[name]
    assert constraint.admits(INSIDE)
    torch.testing.assert_close(constraint.forward(constraint.inverse(INSIDE)), INSIDE, rtol=1e-14, atol=0)


def test_softmax_reaches_the_initial_value_up_to_its_sum() -> None:
    softmax = CONSTRAINTS["softmax"]
    torch.testing.assert_close(softmax.forward(softmax.inverse(INSIDE)), INSIDE / INSIDE.sum(0), rtol=1e-14, atol=0)


def test_sigmoid_and_softmax_by_hand() -> None:
    raw = torch.tensor([[0.0, log(3)], [log(3), 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1 / 2, 3 / 4], [3 / 4, 1 / 2]], dtype=torch.float64)
    torch.testing.assert_close(CONSTRAINTS["sigmoid"].forward(raw), expected)
    expected = torch.tensor([[1 / 4, 3 / 4], [3 / 4, 1 / 4]], dtype=torch.float64)
    torch.testing.assert_close(CONSTRAINTS["softmax"].forward(raw), expected)


def test_clamp_has_slope_one_on_the_closed_interval_and_zero_outside() -> None:
    # At the ends as well, whatever torch's own clamp does there: otherwise init=0 or init=1 would never learn.
    raw = torch.tensor([[-0.5, 0.0, 0.5, 1.0, 1.5]], requires_grad=True)
    value = CONSTRAINTS["clamp"].forward(raw)
    value.sum().backward()
    assert value.tolist() == [[0, 0, 0.5, 1, 1]]
    assert raw.grad.tolist() == [[0, 1, 1, 1, 0]]


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_lambda_is_not_the_parameter_itself(name: str) -> None:
    raw = torch.full((2, 3), 0.3)
    assert CONSTRAINTS[name].forward(raw).data_ptr() != raw.data_ptr()
    assert CONSTRAINTS[name].inverse(raw).data_ptr() != raw.data_ptr()


@pytest.mark.parametrize(
    ("name", "init"), [("sigmoid", 0.0), ("sigmoid", 1.0), ("sigmoid", -0.1), ("softmax", 0.0), ("softmax", -1.0)]
)
def test_unreachable_values_are_not_admitted(name: str, init: float) -> None:
    assert not CONSTRAINTS[name].admits(torch.tensor([[0.3], [init]]))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'relu'.*clamp, identity, sigmoid, softmax"):
        constraint_named("relu")
