"""What the integration tests share: how the command line is called."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMAND = [str(Path(sys.executable).with_name("adamerge"))]
Run = Callable[..., subprocess.CompletedProcess[str]]
FFG = (
    "+method.transform={_target_: adamerge.methods.transforms.Ota, exponent: 0, epsilon: 0, density: 0.3, "
    "thresholds: null, normalize: false, masked: base, rank_one: false, curvature: {_target_: "
    "adamerge.statistics.Fisher, form: sampled, share: 0.9, batch_size: 4, images_per_task: 4, seed: 0}}"
)
"""Task vectors cut down to 0.3 of their entries by the Fisher information of four images per task."""


def on(suite: Path, run_dir: Path, *more: str) -> list[str]:
    """Options that merge the suite at ``suite`` into ``run_dir``, on the CPU."""
    return ["suite=folder", f"suite.root={suite}", f"paths.run_dir={run_dir}", "trainer.accelerator=cpu", *more]
