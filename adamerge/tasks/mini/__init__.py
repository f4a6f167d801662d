"""The embedded suite: a small CLIP, eight experts, and eight tasks that are drawn instead of downloaded.

The weights lie beside this file and are described by ``suite.yaml``, whose ``data`` entries are folders under
what ``materialize`` returns. ``scripts/build_mini.py`` makes the weights again from nothing.
"""

from pathlib import Path

from adamerge.tasks.mini.registry import TASKS, MiniTask, render_task
from adamerge.tasks.mini.store import materialize

ROOT = Path(__file__).parent

__all__ = ["ROOT", "TASKS", "MiniTask", "materialize", "render_task"]
