"""``adamerge evaluate``: accuracy of a checkpoint on a suite."""

from pathlib import Path

import hydra.utils
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from adamerge.bank import read_checkpoint
from adamerge.cli import config as configuration
from adamerge.cli.lightning import quiet
from adamerge.cli.loading import load
from adamerge.errors import KeyMismatchError, shortlist
from adamerge.evaluation.evaluator import Accuracies, Evaluator
from adamerge.export.writers import WEIGHTS_NAME


def evaluate_checkpoint(config: DictConfig, console: Console) -> Accuracies:
    """Print and return the accuracy per task of a merged folder, a full CLIP or an image tower.

    Raises:
        KeyMismatchError: If the checkpoint lacks tensors of the suite's model, or has them in other shapes.
    """
    quiet()
    configuration.settle(config)
    path = Path(config.checkpoint)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    state = read_checkpoint(file)
    problem = load(config)
    shapes = problem.bank.shapes
    if wrong := [key for key, shape in shapes.items() if key not in state or state[key].shape != shape]:
        raise KeyMismatchError(
            f"{file} lacks {len(wrong)} tensors of {problem.clip.arch} or has them in other shapes "
            f"({shortlist(wrong)}). Name a checkpoint of the suite's architecture."
        )
    trainer = hydra.utils.instantiate(config.trainer)(logger=False, enable_checkpointing=False)
    evaluator = Evaluator(problem, trainer.strategy.root_device, str(trainer.precision), config.data.eval_batch_size)
    scores = evaluator({key: state[key].float() for key in shapes})
    table = Table(title=f"{path}: top-1 accuracy in %")
    table.add_column("task")
    table.add_column("accuracy", justify="right")
    known = [score for score in scores.values() if score is not None]
    for task, score in scores.items():
        table.add_row(task, "–" if score is None else f"{100 * score:.1f}")
    if known:
        table.add_row("average", f"{100 * sum(known) / len(known):.1f}", style="bold")
    console.print(table)
    return scores
