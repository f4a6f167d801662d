"""The module that learns."""

import pytest
import torch

from adamerge.errors import ConfigError, ShapeError
from adamerge.merging import Coefficients


@pytest.mark.parametrize("constraint", ["identity", "clamp", "sigmoid"])
@pytest.mark.parametrize(
    "init",
    [
        0.3,
        [0.1, 0.2],
        torch.tensor([0.1, 0.2], dtype=torch.float64),
        [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
    ],
    ids=["number", "per task", "float64 per task", "all"],
)
def test_starts_at_init(constraint: str, init: object) -> None:
    coefficients = Coefficients(2, 3, init=init, constraint=constraint)
    expected = torch.as_tensor(init, dtype=torch.float32)
    expected = expected[:, None] if expected.dim() == 1 else expected
    torch.testing.assert_close(coefficients(), expected.expand(2, 3).clone(), check_dtype=True)


def test_equal_values_under_softmax_are_one_over_the_number_of_tasks() -> None:
    torch.testing.assert_close(Coefficients(4, 2, init=0.3, constraint="softmax")(), torch.full((4, 2), 0.25))


def test_one_parameter_learns() -> None:
    coefficients = Coefficients(2, 3, init=0.3, constraint="clamp")
    parameters = dict(coefficients.named_parameters())
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == {"raw": (2, 3)}
    assert parameters["raw"].is_contiguous()
    optimizer = torch.optim.SGD(coefficients.parameters(), lr=0.1)
    coefficients().sum().backward()
    optimizer.step()
    torch.testing.assert_close(coefficients(), torch.full((2, 3), 0.2))


def test_entries_of_the_parameter_are_independent() -> None:
    coefficients = Coefficients(2, 3, init=0.3, constraint="identity")
    with torch.no_grad():
        coefficients.raw[0, 0] = 5
    assert coefficients().tolist()[1] == pytest.approx([0.3] * 3)
    assert coefficients().tolist()[0] == pytest.approx([5, 0.3, 0.3])


def test_does_not_share_memory_with_init() -> None:
    init = torch.full((2, 3), 0.3)
    coefficients = Coefficients(2, 3, init=init, constraint="identity")
    init.zero_()
    assert coefficients().min() > 0.29


@pytest.mark.parametrize("init", [0.0, 1.0])
def test_learns_from_the_ends_of_the_clamp(init: float) -> None:
    coefficients = Coefficients(2, 1, init=init, constraint="clamp")
    coefficients().sum().backward()
    assert coefficients.raw.grad.tolist() == [[1], [1]]


def test_state_dict_round_trip() -> None:
    source = Coefficients(2, 3, init=[0.1, 0.2], constraint="sigmoid")
    target = Coefficients(2, 3, init=0.3, constraint="sigmoid")
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(), target())


@pytest.mark.parametrize("init", [[0.1, 0.2, 0.3, 0.4], [[0.1], [0.2], [0.3]], [[[0.1]]], torch.zeros(3, 2)])
def test_other_shapes_are_refused(init: object) -> None:
    with pytest.raises(ShapeError, match=r"one number, one per task \(2\), or all of them \(2, 3\)"):
        Coefficients(2, 3, init=init, constraint="identity")


@pytest.mark.parametrize(
    ("constraint", "init"),
    [("identity", float("nan")), ("clamp", float("inf")), ("sigmoid", 1.0), ("sigmoid", [0.3, 0.0]), ("softmax", 0.0)],
)
def test_values_that_cannot_be_reached_are_refused(constraint: str, init: object) -> None:
    with pytest.raises(ConfigError, match=rf"constraint '{constraint}'.*method\.init"):
        Coefficients(2, 3, init=init, constraint=constraint)


def test_unknown_constraint_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown constraint"):
        Coefficients(2, 3, init=0.3, constraint="relu")
