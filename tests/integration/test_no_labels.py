"""Learners that need no labels are handed none: here every label raises when it is read while something is learned."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
from command import on
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from adamerge.cli import job
from adamerge.cli.config import compose_config, config_dir
from adamerge.cli.job import Outcome
from adamerge.cli.run import run
from adamerge.evaluation.evaluator import Evaluator
from adamerge.tasks import problem
from adamerge.tasks.datamodule import TaskImages
from adamerge.tasks.datasets import ImageSet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ANSWERS = {"method.target": "colours", "method.control": "halves"}
"""Options that some methods must be given."""


class LabelsReadError(Exception):
    """A label reached what learns."""


@dataclass
class Guard:
    """Watches over labels.

    Attributes:
        learning: Whether reading one is an error now.
        reads: How often they were read outside of learning, which scoring does.
        known: Names of what was known about the images of any batch.
        batches: How many were learned from.
    """

    learning: bool = False
    reads: int = 0
    known: set[str] = field(default_factory=set)
    batches: int = 0

    def read(self) -> None:
        if self.learning:
            raise LabelsReadError("a label was read while something was learned")
        self.reads += 1


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    """Every data set is watched from its loading on, and every batch when it is put together."""
    watch = Guard()
    load, learn, score = problem.load_image_set, job.learn_coefficients, Evaluator.__call__
    batch = TaskImages.batch

    class Watched(ImageSet):
        def __getattribute__(self, name: str) -> Any:
            if name == "labels":
                watch.read()
            return super().__getattribute__(name)

    def watched_load(*arguments: Any, labels: bool, **options: Any) -> ImageSet:
        if labels:
            watch.read()
        found = load(*arguments, labels=labels, **options)
        return Watched(found.images, found.labels, found.class_names, found.key)

    def watched_learn(method: Any, given: problem.Problem, *arguments: Any) -> Any:
        if any(images.labels is not None for images in given.unlabeled.values()):
            raise LabelsReadError("labels came with the images to adapt on")
        watch.learning = True
        try:
            return learn(method, given, *arguments)
        finally:
            watch.learning = False

    def watched_score(*arguments: Any, **options: Any) -> Any:
        watch.read()  # also where the accuracy is looked up
        return score(*arguments, **options)

    def watched_batch(self: TaskImages, *arguments: int) -> Any:
        found = batch(self, *arguments)
        watch.batches += 1
        watch.known |= {name for known in found["targets"].values() for name in known}
        return found

    monkeypatch.setattr(problem, "load_image_set", watched_load)
    monkeypatch.setattr(job, "learn_coefficients", watched_learn)
    monkeypatch.setattr(Evaluator, "__call__", watched_score)
    monkeypatch.setattr(TaskImages, "batch", watched_batch)
    return watch


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    """Hydra's own configuration is one for the process."""
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before


@cache
def given(name: str) -> tuple[str, ...]:
    """``method=name`` and what it must be given."""
    config = composed(f"method={name}")
    return f"method={name}", *(f"{key}={ANSWERS[key]}" for key in sorted(OmegaConf.missing_keys(config)))


def composed(*overrides: str) -> DictConfig:
    before = HydraConfig.instance().cfg
    config, _ = compose_config("train", ["suite=folder", "suite.root=x", *overrides])
    HydraConfig.instance().cfg = before
    return config


def needs(name: str) -> str | None:
    """What the method's objective needs beside images; None for a method that does not learn."""
    config = composed(*given(name))
    if not hasattr(hydra.utils.instantiate(config.method), "prepare"):
        return None
    return hydra.utils.instantiate(config.objective).needs


NEEDS = {file.stem: needs(file.stem) for file in sorted((config_dir() / "method").glob("*.yaml"))}
UNLABELED = [name for name, what in NEEDS.items() if what not in (None, "labels")]
SUPERVISED = [name for name, what in NEEDS.items() if what == "labels"]


def learned(toy: Path, run_dir: Path, *options: str) -> Outcome:
    few = ["trainer.max_steps=2", "trainer.precision=32-true", "data.images_per_batch=4"]
    writing = ["export.figures=false", "export.checkpoint=false"]
    return run(*options, *few, *writing, *on(toy, run_dir), quiet=True)


def test_both_kinds_of_learners_are_found() -> None:
    assert {"adamerge", "adamerging_layerwise", "atlas_tta", "expert_merging"} <= set(UNLABELED)
    assert {"atlas_addition", "atlas_negation"} <= set(SUPERVISED)
    assert not set(NEEDS.values()) - {None, "images", "experts", "views", "labels"}


@pytest.mark.parametrize("name", UNLABELED)
def test_an_unlabeled_learner_reads_no_label(name: str, toy: Path, tmp_path: Path, guard: Guard) -> None:
    outcome = learned(toy, tmp_path, *given(name))
    assert outcome.results.steps >= 2
    assert guard.batches >= 2
    assert "labels" not in guard.known
    assert guard.reads > 0  # of the split that is scored
    assert all(task.merged is not None for task in outcome.results.tasks.values())


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_supervised_learner_is_caught(name: str, toy: Path, tmp_path: Path, guard: Guard) -> None:
    with pytest.raises(LabelsReadError, match="while something was learned"):
        learned(toy, tmp_path, *given(name))


@pytest.mark.parametrize(
    "options",
    [
        (*given("adamerging_layerwise"), "objective=cross_entropy"),
        (*given("atlas_tta"), "method.select_every=1"),
    ],
    ids=["another objective", "a choice by labels"],
)
def test_an_unlabeled_learner_that_is_told_to_use_labels_is_caught(
    options: tuple[str, ...], toy: Path, tmp_path: Path, guard: Guard
) -> None:
    with pytest.raises(LabelsReadError, match="while something was learned"):
        learned(toy, tmp_path, *options)


def test_labels_that_come_with_the_images_to_learn_from_are_caught(
    toy: Path, tmp_path: Path, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = problem._load
    monkeypatch.setattr(
        problem, "_load", lambda *arguments, labels, **options: load(*arguments, labels=True, **options)
    )
    with pytest.raises(LabelsReadError, match="came with the images to adapt on"):
        learned(toy, tmp_path, *given("adamerging_layerwise"))
