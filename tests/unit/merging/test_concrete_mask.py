"""Draws of a relaxed Bernoulli mask, and the slope of its logits."""

import math

import pytest
import torch
from reference import concrete
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.merging.concrete_mask import ConcreteMask
from adamerge.merging.noise import uniform

SHAPES = {"matrix": (7, 5), "vector": (11,), "one": (1,), "large": (300, 200)}


def make_mask(dtype: str = "float32", *, seed: int = 3, temperature: float = 0.5, init: float = 0.0) -> ConcreteMask:
    return ConcreteMask(SHAPES, init=init, temperature=temperature, dtype=dtype, seed=seed)


def spread(mask: ConcreteMask) -> ConcreteMask:
    """With logits that differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, logits in mask.items():
            logits += 2 * torch.randn(logits.shape, generator=generator)
    return mask


def noise(key: str, dtype: torch.dtype, name: str = "step 4", seed: int = 3) -> Tensor:
    shape = SHAPES[key]
    return uniform(f"{seed}/{name}/{key}", math.prod(shape), device="cpu", dtype=dtype).view(shape)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_a_draw_is_the_reference_s(temperature: float) -> None:
    mask = spread(make_mask(temperature=temperature)).double()
    drawn = mask.draw("step 4")
    for key, logits in mask.items():
        expected = concrete.mask(logits.detach(), noise(key, torch.float64), temperature)
        torch.testing.assert_close(drawn.mask[key], expected)
        kept = torch.sigmoid((torch.logit(noise(key, torch.float64)) + logits.detach()) / temperature)
        torch.testing.assert_close(drawn.means[key], kept.mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("binary", [False, True])
def test_the_mean_over_a_tensor_is_one(dtype: str, binary: bool) -> None:
    drawn = spread(make_mask(dtype)).draw("final", binary=binary)
    for key, values in drawn.mask.items():
        assert values.dtype == torch.float32
        assert (values >= 0).all()
        if values.any():
            assert values.mean().item() == pytest.approx(1, abs=1e-5), key


def test_a_binary_draw_keeps_what_exceeds_a_half() -> None:
    mask = spread(make_mask())
    soft, hard = mask.draw("final"), mask.draw("final", binary=True)
    for key in SHAPES:
        kept = soft.mask[key] * soft.means[key] > 0.5
        assert torch.equal(hard.mask[key] > 0, kept)
        assert hard.means[key] == kept.float().mean()
    # At logit 0 half of the entries, within four standard errors of 60,000.
    assert abs(make_mask().draw("final", binary=True).means["large"] - 0.5) < 4 * 0.5 / 60_000**0.5


def test_a_tensor_of_which_nothing_is_kept_has_a_mask_of_zeros() -> None:
    drawn = make_mask(init=-40.0).draw("final", binary=True)
    assert all(torch.equal(values, torch.zeros_like(values)) for values in drawn.mask.values())


def test_the_same_seed_and_name_give_the_same_mask_and_others_another() -> None:
    first = make_mask().draw("step 0").mask
    again = make_mask().draw("step 0").mask
    assert all(torch.equal(first[key], again[key]) for key in SHAPES)
    for other in (make_mask(seed=4).draw("step 0").mask, make_mask().draw("step 1").mask):
        assert not any(torch.equal(first[key], other[key]) for key in ("matrix", "vector", "large"))
    assert not torch.equal(first["large"].flatten()[:11], first["vector"])


def slopes(mask: ConcreteMask, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of Σ weights ∘ m̃."""
    drawn = mask.draw("step 4")
    return {key: mask.slope(key, drawn, weights[key].clone()) for key in SHAPES}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in SHAPES.items()}


def test_slopes_are_autograd_s(weights: dict[str, Tensor]) -> None:
    mask = spread(make_mask()).double()
    found = slopes(mask, weights)
    for key, logits in mask.items():
        (concrete.mask(logits, noise(key, torch.float64), 0.5) * weights[key]).sum().backward()
        torch.testing.assert_close(found[key], logits.grad)
    assert found["matrix"].abs().max() > 0.1
    assert found["one"].abs().max() < 1e-12  # m̃ of a single entry is 1, whatever its logit


def test_slopes_are_finite_differences(weights: dict[str, Tensor]) -> None:
    mask = spread(make_mask()).double()
    found = slopes(mask, weights)
    step = 1e-6
    for key, place in (("matrix", (2, 3)), ("vector", (10,)), ("large", (299, 0))):
        logits = dict(mask.items())[key]
        values = []
        for change in (step, -2 * step):
            logits.data[place] += change
            values.append((mask.draw("step 4").mask[key] * weights[key]).sum())
        logits.data[place] += step
        torch.testing.assert_close((values[0] - values[1]) / (2 * step), found[key][place], rtol=1e-5, atol=1e-9)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.mask_dtype is one of float32, bfloat16, found 'float16'"):
        make_mask("float16")
    with pytest.raises(ConfigError, match=r"method\.temperature is above 0, found 0"):
        make_mask(temperature=0)
