"""The main job: load, score the references, learn or merge, score, export."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra.utils
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor

from adamerge.cli import config as configuration
from adamerge.cli.console import announce, conclude
from adamerge.cli.context import make_context
from adamerge.cli.learning import learn_coefficients
from adamerge.cli.lightning import quiet
from adamerge.cli.loading import load
from adamerge.cli.merging import merge_static
from adamerge.errors import OutputError
from adamerge.evaluation.evaluator import Accuracies, Evaluator
from adamerge.evaluation.report import Results, TaskResult, peak_memory_bytes
from adamerge.export.coefficients import SavedCoefficients
from adamerge.export.run import export_run
from adamerge.files import write_text
from adamerge.methods.static import Individual, TaskArithmetic
from adamerge.tasks.problem import Problem

REFERENCE_SCALING = 0.3
"""λ of the Task Arithmetic column of every table."""


@dataclass(frozen=True)
class Outcome:
    """What a run leaves in memory; the same stands in its folder.

    Attributes:
        results: Accuracies and times.
        merged: Merged tensors of the image tower by key; None for a method that makes no single model.
        coefficients: λ with its groups; None for a method without.
        run_dir: The folder.
    """

    results: Results
    merged: dict[str, Tensor] | None
    coefficients: SavedCoefficients | None
    run_dir: Path


@dataclass
class Job:
    """One run of one configuration."""

    config: DictConfig
    run_dir: Path
    method_name: str
    console: Console
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "adapt", "evaluate", "export"), 0.0)
    )

    def run(self) -> Outcome | None:
        """Do all of it; None on the helper processes of a distributed run."""
        config = self.config
        quiet()
        configuration.check_complete(config)
        prepare_folder(self.run_dir)
        method = hydra.utils.instantiate(config.method)
        configuration.settle(config, self.run_dir, learned=hasattr(method, "prepare"))
        if config.resume:
            configuration.check_same(config, self.run_dir)
        pl.seed_everything(config.seed, workers=True, verbose=False)
        with self._phase("load"):
            problem = self._load()
        configuration.save_config(config, self.run_dir)
        announce(self.console, problem, self.method_name, self.run_dir)
        probe = hydra.utils.instantiate(config.trainer)(
            logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        evaluator = Evaluator(problem, probe.strategy.root_device, str(probe.precision), config.data.eval_batch_size)
        if rank_zero_only.rank == 0:
            with self._phase("evaluate"), self.console.status("scoring the pretrained model and the experts"):
                references = self._references(problem, evaluator)
        else:
            references = ({}, {}, {})
        pretrained, arithmetic, experts = references
        statistic = getattr(method, "statistic", None)
        context = make_context(statistic, problem, evaluator, self.console, config.seed, self.run_dir)
        learned, saved = None, None
        with self._phase("adapt"):
            if isinstance(method, Individual):
                merged = None
            elif hasattr(method, "prepare"):
                merged, saved, learned = learn_coefficients(
                    method, problem, config, self.run_dir, self.method_name, evaluator, context
                )
            else:
                merged = merge_static(method, problem, evaluator, self.console, context)
        if rank_zero_only.rank != 0:
            return None
        with self._phase("evaluate"), self.console.status("scoring the merged model"):
            scores = experts if merged is None else evaluator(merged)
        tasks = {
            task: TaskResult(pretrained[task], arithmetic[task], scores[task], experts[task])
            for task in problem.bank.task_names
        }
        results = Results(
            suite=problem.suite.name,
            method=self.method_name,
            seed=config.seed,
            steps=learned.steps if learned else 0,
            adapt=config.data.adapt,
            fraction=config.data.fraction,
            tasks=tasks,
            seconds=self.seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )
        with self._phase("export"), self.console.status("writing"):
            plain: Any = OmegaConf.to_container(config, resolve=True)
            export_run(self.run_dir, problem, results, config=plain, merged=merged, coefficients=saved, learned=learned)
        results = replace(results, seconds=self.seconds, peak_memory_bytes=peak_memory_bytes())
        write_text(self.run_dir / "results.json", json.dumps(results.to_json(), indent=2) + "\n")
        conclude(self.console, results, self.run_dir, exported=merged is not None and config.export.checkpoint)
        return Outcome(results, merged, saved, self.run_dir)

    def _load(self) -> Problem:
        config = self.config
        with self.console.status("reading the model, the experts and the images"):
            problem = load(config)
        if config.export.checkpoint:
            need_room(self.run_dir, 4 * sum(tensor.numel() for tensor in problem.clip.state_dict.values()))
        return problem

    def _references(self, problem: Problem, evaluator: Evaluator) -> tuple[Accuracies, Accuracies, Accuracies]:
        """Pretrained, Task Arithmetic at 0.3 and experts; by content, so that a sweep pays once."""
        arithmetic = TaskArithmetic(scaling=REFERENCE_SCALING, grid=(), transform=None)(problem.bank)
        return (
            evaluator(problem.bank.pretrained, cached=True),
            evaluator(arithmetic, cached=True),
            evaluator.experts(),
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def prepare_folder(run_dir: Path) -> None:
    """Make sure that results can be written to ``run_dir``.

    Raises:
        OutputError: If they cannot.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".adamerge-probe"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to the output folder {run_dir}: {error.strerror}. Choose another with paths.run_dir=DIR."
        ) from error


def need_room(run_dir: Path, bytes_needed: int) -> None:
    """Raise OutputError unless the disk of ``run_dir`` has room for ``bytes_needed``."""
    free = shutil.disk_usage(run_dir).free
    if free < bytes_needed:
        raise OutputError(
            f"the merged model needs {bytes_needed / 2**20:,.0f} MiB, but {run_dir} has {free / 2**20:,.0f} MiB free. "
            "Free some room, choose another folder with paths.run_dir=DIR, or set export.checkpoint=false."
        )
