"""The part of the main job that merges without learning."""

from itertools import chain

from rich.console import Console
from torch import Tensor

from adamerge.cli.learning import known_accuracies
from adamerge.errors import ConfigError
from adamerge.evaluation.evaluator import Evaluator
from adamerge.methods import Context, StaticMethod
from adamerge.tasks.problem import Problem


def merge_static(
    method: StaticMethod, problem: Problem, evaluator: Evaluator, console: Console, context: Context
) -> dict[str, Tensor]:
    """Merge, tensor by tensor on the evaluator's device; where there is a choice, by accuracy on the labelled split.

    Args:
        method: Any static one.
        problem: What is merged.
        evaluator: Scores the candidates.
        console: Shows what was chosen.
        context: Of the method's statistic; shows progress.

    Returns:
        Merged tensors by key on the CPU.

    Raises:
        ConfigError: If no candidate will do.
    """
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
