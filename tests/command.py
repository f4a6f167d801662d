"""What the integration tests share: how the command line is called."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMAND = [str(Path(sys.executable).with_name("adamerge"))]
Run = Callable[..., subprocess.CompletedProcess[str]]


def on(suite: Path, run_dir: Path, *more: str) -> list[str]:
    """Options that merge the suite at ``suite`` into ``run_dir``, on the CPU."""
    return ["suite=folder", f"suite.root={suite}", f"paths.run_dir={run_dir}", "trainer.accelerator=cpu", *more]
