"""Delta-guided fusion, against loops and numbers worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import delta_guided_fusion as reference
from unit.zoo import make_bank

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import DeltaGuidedFusion

GRANULARITIES = ["entry", "tensor"]


def method(**options: Any) -> DeltaGuidedFusion:
    defaults = {"granularity": "entry", "exponent": 1.0, "scaling": 1.0, "grid": (), "transform": None}
    return DeltaGuidedFusion(**(defaults | options))


def merge(task_vectors: Any, **options: Any) -> np.ndarray:
    """The merged vector of one tensor, in float64."""
    vectors = torch.as_tensor(np.asarray(task_vectors, dtype=np.float64))
    bank = ParameterBank({"w": torch.zeros_like(vectors[0])}, {"w": vectors}, tuple("abcdefgh"[: len(vectors)]))
    return method(**options)(bank)["w"].numpy()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_worked_example(granularity: str) -> None:
    found = merge(reference.WORKED_TASK_VECTORS, granularity=granularity)
    np.testing.assert_allclose(found, reference.WORKED_MERGED[granularity], rtol=1e-14)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 2, 3, 1)], ids=str)
def test_equals_the_loops(shape: tuple[int, ...], exponent: float, granularity: str) -> None:
    vectors = np.random.default_rng(len(shape)).standard_normal((3, *shape))
    vectors[0] = np.where(np.abs(vectors[0]) < 0.5, 0, vectors[0])
    found = merge(vectors, exponent=exponent, granularity=granularity)
    np.testing.assert_allclose(found, reference.merged(vectors, exponent, granularity), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_exponent_of_zero_gives_the_mean_and_a_great_one_the_farthest(granularity: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((4, 3, 5))
    np.testing.assert_allclose(merge(vectors, exponent=0.0, granularity=granularity), vectors.mean(0), rtol=1e-12)
    found = merge(vectors, exponent=1e6, granularity=granularity)
    if granularity == "tensor":
        expected = vectors[np.linalg.norm(vectors.reshape(4, -1), axis=1).argmax()]
    else:
        expected = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(st.integers(0, 1000), st.floats(0, 8), st.sampled_from(GRANULARITIES))
def test_stays_among_the_experts_entry_by_entry(seed: int, exponent: float, granularity: str) -> None:
    vectors = np.random.default_rng(seed).standard_normal((3, 4))
    found = merge(vectors, exponent=exponent, granularity=granularity)
    assert (found >= vectors.min(0) - 1e-12).all()
    assert (found <= vectors.max(0) + 1e-12).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_sizes_whose_squares_no_float_holds(size: float, granularity: str) -> None:
    vectors = np.array(reference.WORKED_TASK_VECTORS)
    bank = make_bank({"visual.w": torch.zeros(3)}, [{"visual.w": torch.tensor(size * row).float()} for row in vectors])
    found = method(granularity=granularity)(bank)["visual.w"].double().numpy()
    np.testing.assert_allclose(found / size, reference.WORKED_MERGED[granularity], rtol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_what_nobody_moved_stays(granularity: str, exponent: float) -> None:
    np.testing.assert_array_equal(merge(np.zeros((3, 2, 2)), granularity=granularity, exponent=exponent), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, r"method\.granularity is 'entry' or 'tensor', found 'row'"),
        ({"exponent": -1.0}, r"method\.exponent is at least 0, found -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options)
