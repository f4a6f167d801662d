"""What scripts/benchmark.py measures, on the smallest sizes."""

import pytest
from benchmark import measure_accuracy
from measures import measure_step


def test_accuracy_over_steps_of_the_embedded_suite() -> None:
    curve = measure_accuracy("mini", "fast", seed=0, every=30)["curve"]
    steps, seconds, accuracies = zip(*curve, strict=True)
    assert steps == (30, 60)
    assert 0 < seconds[0] < seconds[1]
    assert all(0.68 < accuracy < 0.72 for accuracy in accuracies)  # Task Arithmetic's, where it starts: 0.636


@pytest.mark.parametrize("contestant", ["bf16-mixed/bfloat16", "32-true/float32", "reference"])
def test_a_step_of_every_contestant_is_timed(contestant: str) -> None:
    measured = measure_step("mini", 2, 2, 1, contestant)
    assert 0 < measured["sec_per_step"] < 60
    assert measured["peak_anonymous_MiB"] > 0
