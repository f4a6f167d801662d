"""What transforms and static merges may know about the experts, gathered when they ask."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torch import Tensor

from adamerge.evaluation.evaluator import Evaluator
from adamerge.files import write_text
from adamerge.methods import Context, Statistic
from adamerge.statistics import Kept, gather
from adamerge.tasks.problem import Problem


def make_context(
    statistic: Statistic | None, problem: Problem, evaluator: Evaluator, console: Console, seed: int, run_dir: Path
) -> Context:
    """A context that computes on the evaluator's device.

    Args:
        statistic: What to gather; None where weights are enough.
        problem: What is merged.
        evaluator: How to compute.
        console: Shows progress.
        seed: Of the images that are looked at.
        run_dir: Where ``statistics.json`` says which statistics were used, if any were, and in which files they are.
    """

    def progress(items: Iterable[str], doing: str) -> Iterable[str]:
        return track(list(items), doing, console=console, transient=True)

    record = run_dir / "statistics.json"
    record.unlink(missing_ok=True)  # of another run in the same folder
    merging = Context(track=lambda items: progress(items, "merging"))
    if statistic is None:
        return merging

    def gathered(replaced: Mapping[str, Tensor] | None = None, keys: Iterable[str] | None = None):
        return gather(
            statistic,
            problem,
            device=evaluator.device,
            precision=evaluator.precision,
            batch_size=evaluator.batch_size,
            seed=seed,
            track=(lambda items: progress(items, "looking at the experts")) if replaced is None else iter,
            replaced=replaced,
            keys=keys,
        )

    def kept() -> Mapping[str, Tensor]:
        found = gathered()
        if isinstance(found, Kept):
            write_text(record, json.dumps(found.to_json(), indent=2, default=str) + "\n")
        return found

    return Context(_WhenAsked(kept), gathered, merging.track)


class _WhenAsked(Mapping[str, Tensor]):
    """Tensors that are computed when first asked for: a method that recomputes them all need not have them before."""

    def __init__(self, compute: Callable[[], Mapping[str, Tensor]]) -> None:
        self._compute = compute

    @cached_property
    def _computed(self) -> Mapping[str, Tensor]:
        return self._compute()

    def __getitem__(self, name: str) -> Tensor:
        return self._computed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._computed)

    def __len__(self) -> int:
        return len(self._computed)
