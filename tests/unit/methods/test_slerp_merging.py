"""SLERP as a merge, against the same on flattened vectors; end points, norms and straight lines."""

from math import cos, pi, sin, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import slerp as reference
from torch import Tensor
from unit.zoo import Zoo, make_bank, make_zoo

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import SlerpMerging

LIMIT = 0.9995


def method(**options: Any) -> SlerpMerging:
    defaults = {
        "of": "task_vectors",
        "granularity": "task",
        "weights": None,
        "against": "mean",
        "parallel": LIMIT,
        "scaling": 1.0,
        "grid": (),
        "transform": None,
    }
    return SlerpMerging(**(defaults | options))


def bank_of(*task_vectors: Any, pretrained: Any = 0.0) -> ParameterBank:
    """One tensor, in float64."""
    vectors = torch.tensor(task_vectors, dtype=torch.float64)
    base = torch.zeros_like(vectors[0]) + torch.tensor(pretrained, dtype=torch.float64)
    return ParameterBank({"w": base}, {"w": vectors}, tuple("abcdefgh"[: len(vectors)]))


def flat(weights: dict[str, Tensor], keys: list[str]) -> np.ndarray:
    return torch.cat([weights[key].flatten() for key in keys]).numpy()


def parts_of(bank: ParameterBank, granularity: str) -> list[list[str]]:
    keys = list(bank.pretrained)
    if granularity == "task":
        return [keys]
    if granularity == "tensor":
        return [[key] for key in keys]
    blocks: dict[str, list[str]] = {}
    for key in keys:
        words = key.split(".resblocks.")
        blocks.setdefault(words[1].split(".")[0] if len(words) > 1 else "", []).append(key)
    before = [key for key in blocks[""] if "post" not in key and key != "visual.proj"]
    after = [key for key in blocks.pop("") if key not in before]
    return [before, *blocks.values(), after]


@pytest.fixture(scope="module")
def wide() -> Zoo:
    return make_zoo(torch.float64)


@pytest.mark.parametrize("against", ["mean", "sum"])
@pytest.mark.parametrize("of", ["task_vectors", "weights"])
@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_equals_the_slerp_of_flattened_vectors(wide: Zoo, granularity: str, of: str, against: str) -> None:
    weights = [0.2, 0.5, 0.3]
    options: dict[str, Any] = {"granularity": granularity, "of": of, "against": against, "weights": weights}
    found = method(scaling=0.7, **options)(wide.bank)
    base = wide.pretrained
    for keys in parts_of(wide.bank, granularity):
        start = flat(base, keys)
        experts = np.stack([flat(expert, keys) for expert in wide.experts])
        vectors = experts if of == "weights" else experts - start
        joined = reference.joined(vectors, np.array(weights), against=against, parallel=LIMIT)
        expected = start + 0.7 * (joined - start if of == "weights" else joined)
        np.testing.assert_allclose(flat(found, keys), expected, rtol=1e-9, atol=1e-12)


def test_two_by_hand() -> None:
    """Sixty degrees apart; a third of the way is twenty from the first."""
    bank = bank_of([1.0, 0.0], [0.5, sqrt(3) / 2], pretrained=[10.0, 20.0])
    found = method(weights=[2, 1])(bank)["w"]
    torch.testing.assert_close(found - bank.pretrained["w"], torch.tensor([cos(pi / 9), sin(pi / 9)]).double())


def test_experts_of_two_by_hand() -> None:
    """θ₁ = (1, 0), θ₂ = (0, 1): halfway between them, (1, 1)/√2, wherever θ₀ lies; halfway there with half the
    scaling."""
    bank = bank_of([0.7, -0.4], [-0.3, 0.6], pretrained=[0.3, 0.4])
    half = torch.full((2,), sqrt(0.5)).double()
    torch.testing.assert_close(method(of="weights")(bank)["w"], half)
    torch.testing.assert_close(method(of="weights", scaling=0.5)(bank)["w"], (half + bank.pretrained["w"]) / 2)


@pytest.mark.parametrize("of", ["task_vectors", "weights"])
@pytest.mark.parametrize("granularity", ["task", "tensor"])
def test_end_points(wide: Zoo, granularity: str, of: str) -> None:
    for task in range(3):
        weights = [float(index == task) for index in range(3)]
        found = method(of=of, granularity=granularity, weights=weights)(wide.bank)
        for key, tensor in wide.experts[task].items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-13, atol=1e-13)


@given(st.integers(0, 1000), st.floats(0, 1), st.integers(2, 6))
def test_unit_vectors_stay_so(seed: int, fraction: float, size: int) -> None:
    vectors = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors /= vectors.norm(dim=1, keepdim=True)
    bank = bank_of(*vectors.tolist())
    found = method(weights=[1 - fraction, fraction], parallel=1.0)(bank)["w"]
    assert float(found.norm()) == pytest.approx(1, abs=1e-9)
    angle = float((vectors[0] @ vectors[1]).acos())
    assert float(found @ vectors[0]) == pytest.approx(cos(fraction * angle), abs=1e-7)


@pytest.mark.parametrize("turn", [0.0, 0.01, 0.03, pi - 0.01, pi])
def test_almost_parallel_vectors_go_straight(turn: float) -> None:
    """cos 0.03 = 0.99955."""
    vectors = np.array([[1.0, 0.0], [2 * cos(turn), 2 * sin(turn)]])
    found = method(weights=[0.7, 0.3])(bank_of(*vectors.tolist()))["w"]
    np.testing.assert_allclose(found.numpy(), 0.7 * vectors[0] + 0.3 * vectors[1], rtol=1e-12, atol=1e-12)


def test_where_straight_lines_begin_is_an_option() -> None:
    vectors = np.array([[1.0, 0.0], [cos(0.5), sin(0.5)]])
    bank = bank_of(*vectors.tolist())
    straight = method(parallel=0.8)(bank)["w"]
    np.testing.assert_allclose(straight.numpy(), vectors.mean(0), rtol=1e-12)
    assert float(method(parallel=0.9)(bank)["w"].norm()) == pytest.approx(1)
    assert float(straight.norm()) == pytest.approx(cos(0.25))


def test_earlier_tasks_count_less_against_the_mean_and_the_same_against_the_sum() -> None:
    """Four right angles. Against the mean every step goes halfway, so that sin 45° is left of what came before; against
    the sum it goes 90°/i, and sin, cos of 30° and 22.5° are what new and old get."""
    bank = bank_of(*np.eye(4).tolist())
    half = sqrt(0.5)
    mean = method()(bank)["w"]
    torch.testing.assert_close(mean, torch.tensor([half**3, half**3, half**2, half], dtype=torch.float64))
    third, fourth = pi / 6, pi / 8
    first = half * cos(third) * cos(fourth)
    expected = [first, first, sin(third) * cos(fourth), sin(fourth)]
    torch.testing.assert_close(method(against="sum")(bank)["w"], torch.tensor(expected, dtype=torch.float64))
    parallel = bank_of([1.0], [2.0], [6.0])
    assert float(method(against="sum")(parallel)["w"]) == pytest.approx(3)  # equal shares of what goes straight
    assert float(method()(parallel)["w"]) == pytest.approx(1 / 4 + 2 / 4 + 6 / 2)


@pytest.mark.parametrize("of", ["task_vectors", "weights"])
@pytest.mark.parametrize("granularity", ["task", "tensor"])
def test_experts_that_have_not_moved(of: str, granularity: str) -> None:
    base = {"w": torch.randn(3, 5, generator=torch.Generator().manual_seed(2)), "b": torch.zeros(1)}
    still = make_bank(base, [base] * 4)
    for key, tensor in method(of=of, granularity=granularity)(still).items():
        assert torch.equal(tensor, base[key])


def test_a_zero_vector_makes_a_straight_line() -> None:
    found = method(weights=[1, 3])(bank_of([0.0, 0.0], [4.0, 8.0]))["w"]
    torch.testing.assert_close(found, torch.tensor([3.0, 6.0], dtype=torch.float64))
    found = method(weights=[1, 3])(bank_of([4.0, 8.0], [0.0, 0.0]))["w"]
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-25, 1e12])
def test_the_size_of_vectors_is_of_no_account(size: float) -> None:
    vectors = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [3.0, 0.0, 1.0]])
    bank = make_bank({"visual.w": torch.zeros(3)}, [{"visual.w": torch.tensor(size * row).float()} for row in vectors])
    found = method()(bank)["visual.w"].double().numpy()
    np.testing.assert_allclose(found / size, reference.joined(vectors, np.ones(3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "experts"}, r"method\.of is 'task_vectors' or 'weights', found 'experts'"),
        ({"against": "max"}, r"method\.against is 'mean' or 'sum', found 'max'"),
        ({"parallel": 1.1}, r"method\.parallel is a cosine in \[0, 1\], found 1\.1"),
        ({"granularity": "row"}, r"granularity 'row' divides tensors, which this rule takes whole"),
        ({"weights": [1]}, r"method\.weights has 1 weights for 2 tasks"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options)(bank_of([[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]))
