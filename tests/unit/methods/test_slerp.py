"""Coefficients of an iterated SLERP, against the same on the vectors themselves."""

from collections.abc import Iterator
from math import pi, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import slerp as reference
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.merging import Coefficients
from adamerge.methods.learned.slerp import Slerp


@pytest.fixture(autouse=True, scope="module")
def _wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drawn(num_tasks: int, num_groups: int = 1, seed: int = 0, size: int = 6) -> Tensor:
    """Task vectors (G, K, n) of unequal lengths that lean the same way, as fine-tuned models do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_groups, 1, size, generator=generator)
    own = torch.randn(num_groups, num_tasks, size, generator=generator)
    return (common + 2 * own) * (0.1 + torch.rand(num_groups, num_tasks, 1, generator=generator))


def slerp_of(vectors: Tensor) -> Slerp:
    return Slerp(vectors @ vectors.mT)


def raw_of(weights: Tensor, norm: float | Tensor = 1.0) -> Tensor:
    """a (K, G) or (K,), and s → the raw parameter."""
    weights = weights[:, None] if weights.dim() == 1 else weights
    return torch.cat([weights.log(), torch.as_tensor(norm).expand(1, weights.shape[1])])


def sums(vectors: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_k c_k τ_k per group, (G, n)."""
    return torch.einsum("kg,gkn->gn", coefficients, vectors)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20])
def test_equal_the_slerp_of_the_vectors_themselves(num_tasks: int) -> None:
    vectors = drawn(num_tasks, num_groups=3, size=40)
    weights = torch.rand(num_tasks, 3, generator=torch.Generator().manual_seed(1)) + 0.05
    norm = torch.tensor([0.5, 1.0, -0.3])
    found = sums(vectors, slerp_of(vectors)(raw_of(weights, norm)))
    for group in range(3):
        expected = reference.joined(vectors[group].numpy(), weights[:, group].numpy(), float(norm[group]))
        np.testing.assert_allclose(found[group].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_two_vectors_by_hand() -> None:
    """Sixty degrees apart; equal weights stand in the middle: sin 30° / sin 60° = 1/√3 of each."""
    vectors = torch.tensor([[[1.0, 0.0], [0.5, sqrt(3) / 2]]])
    found = slerp_of(vectors)(raw_of(torch.ones(2)))
    torch.testing.assert_close(found, torch.full((2, 1), 1 / sqrt(3)))
    third = slerp_of(vectors)(raw_of(torch.tensor([2.0, 1.0])))  # β = 1/3: 20° from the first
    angle = torch.atan2(*sums(vectors, third)[0].flip(0))
    assert float(angle) == pytest.approx(pi / 9)


def test_the_mean_of_the_weights_before_counts() -> None:
    """Orthonormal vectors, equal weights: every step halves the angle, sin 45° of what was there and of what comes."""
    found = slerp_of(torch.eye(4)[None])(raw_of(torch.full((4,), 3.0)))
    half = sqrt(0.5)
    torch.testing.assert_close(found[:, 0], torch.tensor([half**3, half**3, half**2, half]))


@pytest.mark.parametrize("task", range(4))
def test_all_the_weight_on_one_gives_that_one(task: int) -> None:
    vectors = drawn(4)
    weights = torch.full((4,), 1e-30)
    weights[task] = 1.0
    expected = torch.zeros(4, 1).index_fill_(0, torch.tensor([task]), 1.0)
    torch.testing.assert_close(slerp_of(vectors)(raw_of(weights)), expected, rtol=0, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 8))
def test_unit_vectors_give_a_vector_of_the_norm(seed: int, num_tasks: int) -> None:
    vectors = drawn(num_tasks, seed=seed)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    weights = torch.rand(num_tasks, generator=torch.Generator().manual_seed(seed)) + 1e-3
    merged = sums(vectors, slerp_of(vectors)(raw_of(weights, 0.7)))
    assert float(merged.norm()) == pytest.approx(0.7, rel=1e-6)


def test_a_common_factor_of_the_weights_or_of_the_vectors_changes_nothing() -> None:
    vectors, weights = drawn(4), torch.tensor([1.0, 0.2, 3.0, 0.5])
    expected = slerp_of(vectors)(raw_of(weights))
    torch.testing.assert_close(slerp_of(vectors)(raw_of(100 * weights)), expected)
    torch.testing.assert_close(slerp_of(1e-25 * vectors)(raw_of(weights)), expected)


def test_depends_on_the_order() -> None:
    vectors, weights = drawn(3), raw_of(torch.ones(3))
    order = [2, 0, 1]
    expected = sums(vectors, slerp_of(vectors)(weights))
    found = sums(vectors[:, order], slerp_of(vectors[:, order])(weights))
    assert (found - expected).abs().max() > 0.1 * expected.abs().max()


# Where there is no angle


@pytest.mark.parametrize("length", [1.0, 2.5, -1.0, 0.0], ids=["equal", "parallel", "opposite", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_is_linear_and_so_is_its_slope(length: float, dtype: torch.dtype) -> None:
    first = drawn(1)
    vectors = torch.cat([first, length * first], dim=1)
    slerp = slerp_of(vectors).to(dtype)
    raw = raw_of(torch.tensor([1.0, 3.0]), 2.0).to(dtype).requires_grad_()
    found = slerp(raw)
    torch.testing.assert_close(found.detach(), torch.tensor([[0.5], [1.5]], dtype=dtype))
    (slope,) = torch.autograd.grad(found[1].sum(), raw)
    torch.testing.assert_close(slope, torch.tensor([[-0.375], [0.375], [0.75]], dtype=dtype))  # s β (1 - β); β


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_parallel_vectors_meet_the_linear_step(dtype: torch.dtype) -> None:
    """No jump on either side of where the angle is taken for 0, and slopes stay finite."""
    for angle in torch.logspace(-9, -1, 33).tolist():
        vectors = torch.tensor([[[1.0, 0.0], [np.cos(angle), np.sin(angle)]]])
        raw = raw_of(torch.tensor([1.0, 3.0])).to(dtype).requires_grad_()
        found = slerp_of(vectors).to(dtype)(raw)
        (slope,) = torch.autograd.grad(found.square().sum(), raw)
        assert slope.isfinite().all()
        expected = torch.tensor([[np.sin(0.25 * angle)], [np.sin(0.75 * angle)]]) / np.sin(angle)
        torch.testing.assert_close(found.detach(), expected.to(dtype), rtol=0, atol=3e-5)


def test_a_vector_of_zeros_leaves_the_others_a_direction() -> None:
    vectors = drawn(3)
    vectors[:, 0] = 0
    weights = torch.tensor([1.0, 1.0, 2.0])
    found = sums(vectors, slerp_of(vectors)(raw_of(weights)))[0]
    np.testing.assert_allclose(found.numpy(), reference.joined(vectors[0].numpy(), weights.numpy(), 1.0), rtol=1e-9)
    nothing = slerp_of(torch.zeros(2, 3, 4))
    assert nothing(nothing.inverse(torch.full((3, 2), 0.3))).isfinite().all()


# Slopes


def test_gradcheck_from_weights_and_inner_products_to_coefficients() -> None:
    vectors = drawn(4, num_groups=2, size=12)
    raw = raw_of(torch.rand(4, 2, generator=torch.Generator().manual_seed(2)) + 0.2, torch.tensor([0.5, 1.2]))
    assert torch.autograd.gradcheck(slerp_of(vectors), (raw.requires_grad_(),))

    def of_vectors(of: Tensor) -> Tensor:
        return slerp_of(of)(raw.detach())

    assert torch.autograd.gradcheck(of_vectors, (vectors.requires_grad_(),))


# From λ to the raw parameter


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_the_inverse_reaches_any_coefficients(seed: int, num_tasks: int) -> None:
    vectors = drawn(num_tasks, num_groups=2, seed=seed, size=30)
    wanted = torch.rand(num_tasks, 2, generator=torch.Generator().manual_seed(seed)) + 1e-3
    slerp = slerp_of(vectors)
    torch.testing.assert_close(slerp(slerp.inverse(wanted)), wanted, rtol=1e-9, atol=0)


def test_the_inverse_of_what_weights_give_is_those_weights() -> None:
    slerp = slerp_of(drawn(4))
    weights = torch.tensor([1.0, 0.3, 2.0, 0.7])
    torch.testing.assert_close(slerp.inverse(slerp(raw_of(weights, 0.9))), raw_of(weights, 0.9))


@pytest.mark.parametrize("length", [1.0, 2.5, -1.0, 0.0])
def test_the_inverse_where_there_is_no_angle(length: float) -> None:
    first = drawn(1)
    slerp = slerp_of(torch.cat([first, length * first], dim=1))
    wanted = torch.tensor([[0.2], [0.5]])
    torch.testing.assert_close(slerp(slerp.inverse(wanted)), wanted)


@pytest.mark.parametrize(
    "wanted", [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.3, 0.0, 0.2), (0.0, 0.0, 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_reaches_zeros_by_finite_numbers(wanted: tuple[float, ...], dtype: torch.dtype) -> None:
    slerp = slerp_of(drawn(3)).to(dtype)
    coefficients = torch.tensor(wanted, dtype=dtype)[:, None]
    raw = slerp.inverse(coefficients)
    assert raw.isfinite().all()
    torch.testing.assert_close(slerp(raw), coefficients, rtol=1e-6, atol=1e-30)


# As a constraint of coefficients


def test_coefficients_start_at_init_and_learn_by_one_more_number_per_group() -> None:
    coefficients = Coefficients(3, 2, init=[0.1, 0.2, 0.3], constraint=slerp_of(drawn(3, num_groups=2)))
    assert {name: tuple(raw.shape) for name, raw in coefficients.named_parameters()} == {"raw": (4, 2)}
    assert list(coefficients.state_dict()) == ["raw"]
    torch.testing.assert_close(coefficients(), torch.tensor([[0.1], [0.2], [0.3]]).expand(3, 2).clone())
    coefficients.set(0.4)
    torch.testing.assert_close(coefficients(), torch.full((3, 2), 0.4))
    coefficients.set(torch.arange(6.0).view(3, 2))
    torch.testing.assert_close(coefficients(), torch.arange(6.0).view(3, 2))


def test_inner_products_go_where_the_coefficients_go() -> None:
    coefficients = Coefficients(3, 2, init=0.3, constraint=slerp_of(drawn(3, num_groups=2))).to("meta")
    assert coefficients().device.type == "meta"


def test_negative_coefficients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"constraint 'slerp'.*at least 0, found -0\.1.*method\.init"):
        Coefficients(2, 1, init=[0.3, -0.1], constraint=slerp_of(drawn(2)))
