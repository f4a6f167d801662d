"""The rate over a run, the weights of its iterates, and when a run whose loss has stopped falling ends."""

from math import cos, pi
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamerge.errors import ConfigError
from adamerge.learning.schedule import Schedule

DECAYS = ["constant", "linear", "cosine", "hold"]


def schedule(**options: Any) -> Schedule:
    return Schedule(**({"steps": 100, "decay": "constant", "average": 0.0, "patience": 0} | options))


# The rate


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0.01]),
        ("cosine", [1, (1 + cos(pi / 4)) / 2, 0.5, (1 - cos(pi / 4)) / 2, (1 - cos(pi / 100)) / 2]),
        ("hold", [1, 1, 1, 0.25 / 0.3, 0.01 / 0.3]),
    ],
)
def test_rates_by_hand(decay: str, expected: list[float]) -> None:
    found = [schedule(decay=decay).factor(step, 100) for step in (0, 25, 50, 75, 99)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@given(steps=st.integers(1, 500))
def test_rates_start_at_one_never_rise_and_stay_above_zero(decay: str, steps: int) -> None:
    found = [schedule(decay=decay).factor(step, steps) for step in range(steps)]
    assert found[0] == 1
    assert found == sorted(found, reverse=True)
    assert found[-1] > 0
    if decay != "constant" and steps > 1:
        assert found[-1] <= 1 / (0.3 * steps) + 1e-9  # as good as nothing is left


# Averaging


def mean(iterates: list[float], average: float) -> float:
    """The running mean as the learner keeps it."""
    kept, steps = 0.0, len(iterates)
    for step, iterate in enumerate(iterates):
        kept += schedule(average=average).weight(step, steps) * (iterate - kept)
    return kept


@given(
    iterates=st.lists(st.integers(-100, 100).map(float), min_size=1, max_size=60),
    average=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
)
def test_the_running_mean_is_that_of_the_last_share(iterates: list[float], average: float) -> None:
    counted = iterates[-max(1, round(average * len(iterates))) :]
    assert mean(iterates, average) == pytest.approx(sum(counted) / len(counted), abs=1e-9)


def test_weights_by_hand() -> None:
    found = [schedule(average=0.5).weight(step, 6) for step in range(6)]
    assert found == [0, 0, 0, 1, 1 / 2, 1 / 3]
    assert [schedule().weight(step, 3) for step in range(3)] == [0, 0, 1]


# The end


def falling(factor: float, patience: int, *, last: float = 1.0) -> list[float]:
    """Two stretches of equal losses, the second lower by ``factor``."""
    return [last / factor] * patience + [last] * patience


@pytest.mark.parametrize(("factor", "ends"), [(0.9, False), (0.949, False), (0.951, True), (1.0, True), (1.2, True)])
def test_a_run_ends_where_a_loss_falls_by_less_than_a_twentieth(factor: float, ends: bool) -> None:
    found = schedule(decay="hold", patience=7).end(falling(factor, 7))
    assert found == (20 if ends else None)  # 14 steps are the 70 % that come before the fall


def test_it_looks_at_the_last_two_stretches_alone() -> None:
    stopped = schedule(decay="hold", patience=5)
    assert stopped.end([100.0] * 4 + falling(0.5, 5)) is None
    assert stopped.end([0.0] * 25 + falling(1.0, 5)) == 50
    assert stopped.end(falling(0.5, 5) + [0.9] * 5) is None  # 0.9 is less than 0.95
    assert stopped.end(falling(0.5, 5) + [0.96] * 5) == 21  # 15 / 0.7


def test_within_a_stretch_it_is_the_mean_that_counts() -> None:
    stopped = schedule(decay="hold", patience=4)
    assert stopped.end([4.0, 0, 4, 0, 1, 3, 1, 3]) == 11  # the means are 2 and 2
    assert stopped.end([4.0, 0, 4, 0, 3, 0, 3, 0]) is None


@pytest.mark.parametrize("steps", [0, 1, 13])
def test_too_few_steps_never_end(steps: int) -> None:
    assert schedule(decay="hold", patience=7).end([1.0] * steps) is None


def test_without_patience_it_never_ends() -> None:
    assert schedule(decay="hold").end([1.0] * 99) is None


@given(patience=st.integers(1, 60), more=st.integers(0, 300))
def test_the_rate_is_whole_where_the_end_is_found_and_falls_from_there(patience: int, more: int) -> None:
    """No jump, and no step at the full rate is left."""
    held, done = schedule(decay="hold", patience=patience), 2 * patience + more
    end = held.end([1.0] * done)
    assert end is not None
    assert end > done
    assert held.factor(done, end) == pytest.approx(1, abs=1 / (0.3 * end))
    assert all(held.factor(step, end) == 1 for step in range(done - 1))
    assert held.factor(done + 1, end) < 1 or end == done + 1


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "step"}, r"schedule\.decay: expected one of constant, linear, cosine, hold, found 'step'"),
        ({"average": 1.5}, r"schedule\.average lies in \[0, 1\], found 1\.5"),
        ({"average": -0.1}, r"schedule\.average lies in \[0, 1\], found -0\.1"),
        ({"patience": -1, "decay": "hold"}, r"schedule\.patience is 0 or more"),
        ({"patience": 5}, r"above 0 it needs schedule\.decay=hold"),
        ({"patience": 5, "decay": "cosine"}, r"above 0 it needs schedule\.decay=hold"),
        (
            {"patience": 5, "decay": "hold", "average": 0.5},
            r"schedule\.average is at most 0\.3 with schedule\.patience",
        ),
    ],
)
def test_a_schedule_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule(**options)


def test_the_whole_fall_may_be_averaged() -> None:
    assert schedule(decay="hold", patience=5, average=0.3).weight(70, 100) == 1
