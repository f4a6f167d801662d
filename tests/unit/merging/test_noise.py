"""Noise that depends on a name and a position alone, against SplitMix64 in Python's integers."""

import hashlib

import pytest
import torch

from adamerge.merging.noise import random_words, rounded, uniform

MASK = 2**64 - 1


def word(name: str, position: int) -> int:
    """The low half of SplitMix64's output for even positions, the high half for odd ones."""
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    z = (position // 2 * 0x9E3779B97F4A7C15 + salt) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    z ^= z >> 31
    return z >> 32 if position % 2 else z & 0xFFFFFFFF


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (10, 16), (40_000, 40_001)])
def test_words_are_splitmix64(start: int, stop: int) -> None:
    found = random_words("name", start, stop, "cpu").tolist()
    assert [value % 2**32 for value in found] == [word("name", position) for position in range(start, stop)]


def test_a_number_depends_on_its_name_and_position_alone() -> None:
    long = uniform("a", 100_001, device="cpu", dtype=torch.float32)
    assert torch.equal(long[:40_000], uniform("a", 40_000, device="cpu", dtype=torch.float32))
    assert torch.equal(long.double(), uniform("a", 100_001, device="cpu", dtype=torch.float64))
    assert not torch.equal(long, uniform("b", 100_001, device="cpu", dtype=torch.float32))
    assert (word("a", 99_999) >> 9) + 0.5 == long[99_999] * 2**23


def test_numbers_are_uniform_between_0_and_1_and_not_correlated() -> None:
    count = 200_000
    first, second = (uniform(name, count, device="cpu", dtype=torch.float64) for name in ("0/step 0/x", "0/step 1/x"))
    assert 0 < first.min() < 1e-4
    assert 1 - 1e-4 < first.max() < 1
    # Four standard errors: of a mean 1/√12n, of a share √(0.1 · 0.9 / n), of a correlation 1/√n.
    assert abs(first.mean() - 0.5) < 4 / (12 * count) ** 0.5
    shares = torch.histc(first, bins=10, min=0, max=1) / count
    assert (shares - 0.1).abs().max() < 4 * (0.09 / count) ** 0.5
    for left, right in ((first, second), (first[1:], first[:-1]), (first[2:], first[:-2])):
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 4 / count**0.5


def test_rounding_gives_a_neighbour_and_the_value_on_average() -> None:
    spacing = 2.0**-7  # of bfloat16 between 1 and 2
    for value in (1 + 0.3 * spacing, -1 - 0.3 * spacing):
        found = rounded("name", torch.full((400, 100), value)).double()
        assert set(found.abs().unique().tolist()) == {1.0, 1 + spacing}
        # Four standard errors of a share of 0.3 among 40,000.
        assert (found.mean() - value).abs() < 4 * spacing * (0.21 / 40_000) ** 0.5


def test_rounding_keeps_what_needs_none_and_leaves_its_input() -> None:
    exact = torch.tensor([0.0, -0.5, 1.0, 384.0])
    assert torch.equal(rounded("name", exact), exact.bfloat16())
    values = torch.randn(5, 3).t()
    before = values.clone()
    found = rounded("name", values)
    assert torch.equal(values, before)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), values, rtol=2.0**-7, atol=0)
    assert torch.equal(found, rounded("name", values))
