"""Metrics-weighted averaging, by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from unit.flat_bank import bank_of

from adamerge.errors import ConfigError
from adamerge.methods import Context
from adamerge.methods.static import MetricsWeightedAverage
from adamerge.statistics import Scores

TASK_VECTORS = np.array([[1.0, 0.0, 6.0], [0.0, 1.0, 2.0]])


def merged(loss: Sequence[float], accuracy: Sequence[float] = (0.5, 0.5), **options: Any) -> list[float]:
    """What becomes of TASK_VECTORS, so that the first two numbers are the weights."""
    defaults = {"metric": "loss", "exponent": 1.0, "scaling": 1.0, "grid": (), "transform": None}
    method = MetricsWeightedAverage(**({"scores": Scores(None)} | defaults | options))
    scores = {"loss": torch.tensor(loss, dtype=torch.float64), "accuracy": torch.tensor(accuracy, dtype=torch.float64)}
    return method(bank_of(TASK_VECTORS, {"a": (3,)}), Context(scores))["a"].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.75, 0.25, 5.0]),  # 1/0.2 : 1/0.6 = 3 : 1
        ({"exponent": 2}, [0.9, 0.1, 5.6]),  # 9 : 1
        ({"exponent": 0}, [0.5, 0.5, 4.0]),
        ({"metric": "accuracy"}, [0.2, 0.8, 2.8]),  # 1 : 4
        ({"metric": "accuracy", "exponent": 0.5}, [1 / 3, 2 / 3, 10 / 3]),  # 1 : 2
        ({"metric": "accuracy", "exponent": 0}, [0.5, 0.5, 4.0]),
        ({"scaling": 2}, [1.5, 0.5, 10.0]),
    ],
    ids=str,
)
def test_weights_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    assert merged([0.2, 0.6], [0.2, 0.8], **options) == pytest.approx(expected, rel=1e-6)


def test_a_large_power_neither_overflows_nor_underflows() -> None:
    # (0.6 / 0.2)^1000 is beyond float64; 1000 · log(0.5 / 0.499) is 2.
    assert merged([0.2, 0.6], exponent=1000) == [1, 0, 6]
    assert merged([0.6, 0.2], exponent=1000) == [0, 1, 2]
    ratio = (0.5 / 0.499) ** 1000
    close = merged([0.499, 0.5], exponent=1000)
    assert close[:2] == pytest.approx([ratio / (1 + ratio), 1 / (1 + ratio)], rel=1e-6)


def test_scores_of_zero_are_no_nan() -> None:
    assert merged([0.0, 0.5]) == [1, 0, 6]
    assert merged([0.0, 0.0]) == [0.5, 0.5, 4]
    assert merged([1, 1], [0.0, 0.5], metric="accuracy") == pytest.approx([0, 1, 2], abs=1e-30)
    assert merged([1, 1], [0.0, 0.0], metric="accuracy") == [0.5, 0.5, 4]


def test_it_asks_for_scores() -> None:
    scores = Scores(64)
    options: dict[str, Any] = {"metric": "loss", "exponent": 1.0, "scaling": 1.0, "grid": (), "transform": None}
    assert MetricsWeightedAverage(scores=scores, **options).statistic is scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "f1"}, "'loss' or 'accuracy', found 'f1'"),
        ({"exponent": -1}, "at least 0, found -1"),
        ({"exponent": float("nan")}, "at least 0, found nan"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged([1, 1], **options)
