"""What methods may know about the experts."""

import pytest
import torch

from adamerge.cli.context import _WhenAsked


def test_statistics_are_computed_when_first_asked_for() -> None:
    calls = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"a": torch.ones(2), "b": torch.zeros(3)}

    statistics = _WhenAsked(compute)
    assert not calls
    assert list(statistics) == ["a", "b"]
    assert len(statistics) == 2
    assert statistics["b"].shape == (3,)
    with pytest.raises(KeyError):
        statistics["c"]
    assert len(calls) == 1
