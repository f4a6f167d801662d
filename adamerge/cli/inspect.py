"""``adamerge inspect``: what a file holds, without loading a model."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from adamerge.bank import block_of, read_checkpoint
from adamerge.errors import CheckpointError
from adamerge.export.coefficients import read_coefficients
from adamerge.export.writers import WEIGHTS_NAME


def describe(path: Path, console: Console) -> None:
    """Print a run's results, the tensors of a checkpoint by block, or the λ of a coefficients file.

    Raises:
        CheckpointError: If ``path`` is none of these.
    """
    if (results := path / "results.json").is_file():
        console.print_json(results.read_text(encoding="utf-8"))
        return
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} is no checkpoint, no coefficients file and no run's folder.")
    if _holds_coefficients(file):
        _describe_coefficients(file, console)
    else:
        _describe_checkpoint(file, console)


def _holds_coefficients(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return "adamerge" in (opened.metadata() or {}) and "coefficients" in opened.keys()  # noqa: SIM118
    except SafetensorError:
        return False


def _describe_coefficients(file: Path, console: Console) -> None:
    saved = read_coefficients(file)
    console.print(
        f"{saved.method}: {saved.partition.granularity}, {saved.partition.num_groups} groups", highlight=False
    )
    console.print(f"transform: {json.dumps(saved.transform)}", highlight=False)
    table = Table()
    for column in ("task", "mean λ", "least", "most"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, row in zip(saved.task_names, saved.coefficients, strict=True):
        table.add_row(task, *(f"{value:.4f}" for value in (row.mean(), row.min(), row.max())))
    console.print(table)


def _describe_checkpoint(file: Path, console: Console) -> None:
    state = read_checkpoint(file)
    groups: dict[str, list[int]] = {}
    for key, tensor in state.items():
        part = f"visual {block_of(key)}" if key.startswith("visual.") else "text tower"
        groups.setdefault(part, []).append(tensor.numel())
    table = Table()
    for column in ("part", "tensors", "parameters"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, sizes in groups.items():
        table.add_row(part, str(len(sizes)), f"{sum(sizes):,}")
    table.add_row("all", str(len(state)), f"{sum(map(sum, groups.values())):,}", style="bold")
    console.print(table)
