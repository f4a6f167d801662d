"""The numbers of a run: as JSON for programs, as a table for the terminal and for a README."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("task", "pretrained", "Task Arithmetic", "merged", "expert", "normalised")
PHASES = ("load", "adapt", "evaluate", "export")


@dataclass(frozen=True)
class TaskResult:
    """Top-1 accuracies on one task as fractions; None where the images have no labels or the model was not scored."""

    pretrained: float | None
    task_arithmetic: float | None
    merged: float | None
    expert: float | None

    @property
    def normalized(self) -> float | None:
        """merged / expert; None where either is unknown or the expert has no right answer."""
        if self.merged is None or not self.expert:
            return None
        return self.merged / self.expert

    @property
    def columns(self) -> tuple[float | None, ...]:
        """The values in the order of ``COLUMNS[1:]``."""
        return self.pretrained, self.task_arithmetic, self.merged, self.expert, self.normalized


@dataclass(frozen=True)
class Results:
    """Everything that ``results.json`` and the table say about a run.

    Attributes:
        adapt: Which test images were adapted on, ``all`` or ``half`` (``data.adapt``).
        fraction: The share of those images that the learner could see (``data.fraction``).
        tasks: By task name, in the order of merging.
        seconds: Wall-clock time of each of ``PHASES``; 0 for a phase that did not run.
    """

    suite: str
    method: str
    seed: int
    steps: int
    adapt: str
    fraction: float
    tasks: dict[str, TaskResult]
    seconds: dict[str, float]
    peak_memory_bytes: int

    @property
    def average(self) -> tuple[float | None, ...]:
        """Per column the mean over the tasks that have a value; for ``normalised`` the mean of the ratios."""
        rows = [task.columns for task in self.tasks.values()]
        return tuple(_mean(column) for column in zip(*rows, strict=True)) if rows else (None,) * len(COLUMNS[1:])

    def to_json(self) -> dict[str, Any]:
        """The schema of ``results.json``: accuracies are fractions, unknown ones null.

        Raises:
            KeyError: If ``seconds`` lacks one of ``PHASES``.
        """
        return {
            "suite": self.suite,
            "method": self.method,
            "seed": self.seed,
            "steps": self.steps,
            "data": {"adapt": self.adapt, "fraction": self.fraction},
            "tasks": {name: _scores(task.columns) for name, task in self.tasks.items()},
            "average": _scores(self.average),
            "seconds": {phase: self.seconds[phase] for phase in PHASES},
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def table(self) -> "Table":
        """For the terminal: one row per task, then the averages; percentages."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape(f"{self.suite}, {self.method}, seed {self.seed}: top-1 accuracy in %"),
            caption=escape(self._data_note()),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in COLUMNS:
            if column == "task":
                table.add_column(column, overflow="fold")
            else:
                table.add_column(column, justify="right", no_wrap=True)
        for name, task in self.tasks.items():
            table.add_row(escape(name), *map(_percent, task.columns))
        table.add_section()
        table.add_row("average", *map(_percent, self.average), style="bold")
        return table

    def markdown(self) -> str:
        """The same table as GitHub markdown, without a title."""
        rows = [(_escape_cell(name), *map(_percent, task.columns)) for name, task in self.tasks.items()]
        average = tuple(f"**{cell}**" for cell in ("average", *map(_percent, self.average)))
        rule = ("---", *("--:" for _ in COLUMNS[1:]))
        return "".join(f"| {' | '.join(row)} |\n" for row in (COLUMNS, rule, *rows, average))

    def _data_note(self) -> str:
        if not any(task.merged is not None for task in self.tasks.values()):
            return "no accuracies: the images have no labels"
        images = {
            "all": "all (adapts on and scores on the same test images)",
            "half": "half (adapts on one half of the test images, scores on the other)",
        }
        note = f"data.adapt={images.get(self.adapt, self.adapt)}"
        return note if self.fraction == 1 else f"{note}, data.fraction={self.fraction:g}"


def peak_memory_bytes() -> int:
    """The most memory this process has held: on CUDA's allocator once CUDA is in use, else resident in RAM.

    0 on systems that do not say (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def _scores(columns: tuple[float | None, ...]) -> dict[str, float | None]:
    pretrained, _, merged, expert, normalized = columns
    return {"pretrained": pretrained, "merged": merged, "expert": expert, "normalized": normalized}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|")
