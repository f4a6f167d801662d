"""What the user sees."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from adamerge.export.model_card import loading_snippet

if TYPE_CHECKING:
    from adamerge.evaluation.report import Results
    from adamerge.tasks.problem import Problem


def announce(console: Console, problem: "Problem", method: str, run_dir: Path) -> None:
    """What will be merged, on which images, and where it will be written."""
    bank = problem.bank
    parameters = sum(tensor.numel() for tensor in bank.pretrained.values())
    images = sum(len(indices) for indices in problem.adapt_indices.values())
    console.print(
        f"[bold]{method}[/bold]: {bank.num_tasks} experts of {problem.clip.arch} "
        f"({len(bank.pretrained)} tensors, {parameters / 1e6:.1f} M parameters) into one model, "
        f"{images:,} unlabeled images",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"tasks: {', '.join(bank.task_names)}", soft_wrap=True, highlight=False)
    console.print(f"output: {run_dir}", soft_wrap=True, highlight=False)


def conclude(console: Console, results: "Results", run_dir: Path, *, exported: bool) -> None:
    """The table, where everything is, and how to load it."""
    console.print(results.table())
    seconds = "  ".join(f"{name} {value:.1f} s" for name, value in results.seconds.items())
    peak = results.peak_memory_bytes / 2**20
    console.print(f"{seconds}  peak memory {peak:,.0f} MiB", soft_wrap=True, highlight=False)
    console.print(f"written to {run_dir}", soft_wrap=True, highlight=False)
    if exported:
        console.print("load the merged model anywhere with", highlight=False)
        console.print(loading_snippet(run_dir / "merged"), soft_wrap=True, highlight=False, markup=False)
