"""The part of the main job that merges without learning."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torch import Tensor

from adamerge.cli.learning import known_accuracies
from adamerge.errors import ConfigError
from adamerge.evaluation.evaluator import Evaluator
from adamerge.files import write_text
from adamerge.methods import Context, StaticMethod
from adamerge.statistics import Kept, gather
from adamerge.tasks.problem import Problem


def merge_static(
    method: StaticMethod, problem: Problem, evaluator: Evaluator, console: Console, seed: int, run_dir: Path
) -> dict[str, Tensor]:
    """Merge, tensor by tensor on the evaluator's device; where there is a choice, by accuracy on the labelled split.

    Args:
        method: Any static one.
        problem: What is merged.
        evaluator: Scores the candidates.
        console: Shows progress, and what was chosen.
        seed: Of the images that statistics are computed from.
        run_dir: Where ``statistics.json`` says which statistics were used, if any were, and in which files they are.

    Returns:
        Merged tensors by key on the CPU.

    Raises:
        ConfigError: If no candidate will do.
    """

    def progress(items: Iterable[str], doing: str) -> Iterable[str]:
        return track(list(items), doing, console=console, transient=True)

    context = Context(track=lambda items: progress(items, "merging"))
    record = run_dir / "statistics.json"
    record.unlink(missing_ok=True)  # of another run in the same folder
    if statistic := method.statistic:

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

        context = Context(_WhenAsked(kept), gathered, context.track)
    candidates = method.candidates(problem.bank.read_on(evaluator.device), context)
    first, second = next(candidates), next(candidates, None)
    if second is None:
        return {key: tensor.cpu() for key, tensor in first[1].items()}
    labelled = problem.labelled()
    pretrained = known_accuracies(evaluator(problem.bank.pretrained, images=labelled, cached=True))
    experts = known_accuracies(evaluator.experts(images=labelled))
    best: tuple[float, StaticMethod, dict[str, Tensor]] | None = None
    for candidate, merged in chain([first, second], candidates):
        merit = candidate.merit(known_accuracies(evaluator(merged, images=labelled)), pretrained, experts)
        said = "will not do" if merit is None else f"{merit:.4f}"
        console.print(f"{candidate}: {said} on the labelled split", soft_wrap=True, highlight=False)
        if merit is not None and (best is None or merit > best[0]):
            best = merit, candidate, merged
    if best is None:
        raise ConfigError("no scaling of method.grid will do. Give others.")
    console.print(f"chosen: {best[1]}", soft_wrap=True, highlight=False)
    return {key: tensor.cpu() for key, tensor in best[2].items()}


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
