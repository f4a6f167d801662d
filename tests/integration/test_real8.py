"""The main job on real images: `--shared=DIR` turns it on, DIR holding real8."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from command import COMMAND

GRID = [round(0.05 * step, 2) for step in range(1, 11)]


@pytest.mark.shared
@pytest.mark.slow
def test_layerwise_beats_every_single_coefficient(
    real8: Path, tmp_path: Path, environment: dict[str, str], request: pytest.FixtureRequest
) -> None:
    """Task Arithmetic at 0.3 < layer-wise < experts; layer-wise 3 points over it and above every λ of the grid."""
    environment = {**environment, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}

    def average(name: str, *options: str) -> dict[str, float]:
        folder = tmp_path / name
        command = [*COMMAND, "suite=folder", f"suite.root={real8}", f"paths.run_dir={folder}", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "results.json").read_text())["average"]

    light = ["export.checkpoint=false", "export.figures=false"]
    single = {
        scaling: average(f"single-{scaling}", "method=task_arithmetic", f"method.scaling={scaling}", *light)["merged"]
        for scaling in GRID
    }
    runs = [average(f"layerwise-{seed}", "method=adamerging_layerwise", f"seed={seed}") for seed in range(3)]
    layerwise = sum(run["merged"] for run in runs) / len(runs)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nreal8: single λ {single}; layer-wise {[run['merged'] for run in runs]}")  # noqa: T201
    assert single[0.3] < layerwise < runs[0]["expert"]
    assert layerwise >= single[0.3] + 0.03
    assert layerwise > max(single.values())
