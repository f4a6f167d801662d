import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from adamerge.evaluation.report import Results, TaskResult, peak_memory_bytes

SECONDS = {"load": 1.0, "adapt": 2.0, "evaluate": 3.0, "export": 4.0}
UNKNOWN = TaskResult(None, None, None, None)


def results(tasks: dict[str, TaskResult], *, fraction: float = 1.0, adapt: str = "all") -> Results:
    return Results("mini", "task_arithmetic", 3, 500, adapt, fraction, tasks, SECONDS, 12345)


TWO = {"digits": TaskResult(0.5, 0.55, 0.6, 0.8), "shapes": TaskResult(0.25, 0.3, 0.45, 0.5)}


def test_json_has_exactly_the_documented_schema():
    data = results(TWO, fraction=0.05, adapt="half").to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == {
        "suite": "mini",
        "method": "task_arithmetic",
        "seed": 3,
        "steps": 500,
        "data": {"adapt": "half", "fraction": 0.05},
        "tasks": {
            "digits": {"pretrained": 0.5, "merged": 0.6, "expert": 0.8, "normalized": pytest.approx(0.75)},
            "shapes": {"pretrained": 0.25, "merged": 0.45, "expert": 0.5, "normalized": pytest.approx(0.9)},
        },
        # The mean of the ratios .75 and .9, not the ratio .525 / .65 of the means.
        "average": {
            "pretrained": 0.375,
            "merged": pytest.approx(0.525),
            "expert": pytest.approx(0.65),
            "normalized": pytest.approx(0.825),
        },
        "seconds": SECONDS,
        "peak_memory_bytes": 12345,
    }


def test_unlabeled_tasks_are_null_and_stay_out_of_the_averages():
    data = results({**TWO, "unlabeled": UNKNOWN}).to_json()
    assert data["tasks"]["unlabeled"] == dict.fromkeys(("pretrained", "merged", "expert", "normalized"))
    assert data["average"] == pytest.approx(results(TWO).to_json()["average"])


@pytest.mark.parametrize("tasks", [{}, {"unlabeled": UNKNOWN}])
def test_averages_of_nothing_are_null(tasks):
    assert set(results(tasks).to_json()["average"].values()) == {None}


@pytest.mark.parametrize(("merged", "expert"), [(None, 0.5), (0.5, None), (0.5, 0.0)])
def test_normalized_needs_both_and_an_expert_that_is_ever_right(merged, expert):
    assert TaskResult(None, None, merged, expert).normalized is None


def test_an_accuracy_of_zero_is_a_value():
    assert TaskResult(0.0, 0.0, 0.0, 0.5).normalized == 0.0
    assert results({"hard": TaskResult(0.0, 0.0, 0.0, 0.5)}).to_json()["average"]["merged"] == 0.0


def test_a_missing_phase_is_an_error():
    with pytest.raises(KeyError, match="export"):
        replace(results(TWO), seconds={"load": 1.0, "adapt": 2.0, "evaluate": 3.0}).to_json()


def test_markdown():
    table = results({**TWO, "un|labeled": UNKNOWN}).markdown()
    assert table == (
        "| task | pretrained | Task Arithmetic | merged | expert | normalised |\n"
        "| --- | --: | --: | --: | --: | --: |\n"
        "| digits | 50.0 | 55.0 | 60.0 | 80.0 | 75.0 |\n"
        "| shapes | 25.0 | 30.0 | 45.0 | 50.0 | 90.0 |\n"
        "| un\\|labeled | – | – | – | – | – |\n"
        "| **average** | **37.5** | **42.5** | **52.5** | **65.0** | **82.5** |\n"
    )


def shown(result: Results, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(result.table())
    return stream.getvalue()


def test_terminal_table_has_the_same_cells_in_the_same_order():
    lines = shown(results({**TWO, "[bold]": UNKNOWN})).splitlines()
    rows = [line.split() for line in lines if line.split()]
    assert ["digits", "50.0", "55.0", "60.0", "80.0", "75.0"] in rows
    assert ["[bold]", *"–––––"] in rows
    names = [row[0] for row in rows if row[0] in ("digits", "shapes", "[bold]", "average")]
    assert names == ["digits", "shapes", "[bold]", "average"]
    assert ["average", "37.5", "42.5", "52.5", "65.0", "82.5"] in rows


def test_terminal_table_loses_nothing_at_80_columns():
    long_name = "a_task_name_" * 4
    text = shown(results({"fashion_mnist": TWO["digits"], long_name: TWO["shapes"]}), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(cell in text for cell in ("fashion_mnist", "Task Arithmetic", "normalised", "55.0", "75.0"))
    assert long_name in "".join(
        line.split(" ")[1] for line in text.splitlines() if line.startswith(" ") and line.strip()
    )


def test_terminal_table_says_which_images_were_used():
    assert "data.adapt=half" in shown(results(TWO, adapt="half"))
    assert "data.fraction=0.01" in shown(results(TWO, fraction=0.01))
    assert "no labels" in shown(results({"unlabeled": UNKNOWN}))


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="reads CUDA's allocator there")
def test_peak_memory_is_in_bytes():
    with open("/proc/self/status") as status:  # noqa: PTH123
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    # The kernel lets a process inherit its parent's peak, so there may be more, but hardly a thousand times as much.
    assert 0.9 * peak < peak_memory_bytes() < 100 * peak
