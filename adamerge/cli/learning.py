"""The part of the main job that learns: images and targets, stages, and what is kept when it is cut short."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from omegaconf import DictConfig
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.cli.lightning import progress_bar
from adamerge.cli.masking import learn_mask, mask_beside, masked
from adamerge.errors import ConfigError, TrainingError, shortlist
from adamerge.evaluation.evaluator import Accuracies, Evaluator
from adamerge.export.coefficients import SavedCoefficients, read_coefficients, write_coefficients
from adamerge.export.mask import describe_mask
from adamerge.learning.experts import expert_targets
from adamerge.learning.fit import Learned, UserInterruptError, learn
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.learning.selection import Selection
from adamerge.learning.start import gradient_at_start
from adamerge.learning.trusted import TrustedImages
from adamerge.merging import Coefficients, MergedModel
from adamerge.methods import Context, Learner
from adamerge.methods.learned import Concrete
from adamerge.objectives import FixMatch, Objective
from adamerge.tasks.datamodule import TaskImages, draw_shots, split_indices
from adamerge.tasks.datasets import ImageSet
from adamerge.tasks.problem import Problem
from adamerge.tasks.views import RandomView

FEW_IMAGES = 100
"""Of a task: with fewer, coefficients are soon learned that are good for no other images. Then half are held out."""

CANDIDATES_EVERY = 10
"""Steps between two iterates that are compared on images held out."""


def learn_coefficients(
    method: Learner,
    problem: Problem,
    config: DictConfig,
    run_dir: Path,
    method_name: str,
    evaluator: Evaluator,
    context: Context,
) -> tuple[dict[str, Tensor], SavedCoefficients, Learned | None]:
    """Learn λ, or read it from the method's file.

    Returns:
        Merged tensors by key on the CPU, λ with its groups, and the history if anything was learned.

    Raises:
        UserInterruptError: On Ctrl-C.
        TrainingError: If a loss is not finite; the last good λ is written first.
    """
    description = method.transform.to_json() if method.transform else None
    if method.coefficients is not None:
        saved = read_coefficients(Path(method.coefficients))
        mask = mask_beside(saved, method.coefficients) if isinstance(method, Concrete) else None
        description = describe_mask(mask, description) if mask else description
        check_coefficients_fit(saved, problem, description, method.coefficients)
        bank = _transformed(method, problem.bank, context)
        model = MergedModel(problem.clip.image_encoder, masked(bank, mask) if mask else bank, saved.partition)
        model.update(saved.coefficients)
        return model.weights(), saved, None
    objective = hydra.utils.instantiate(config.objective)
    tasks = method.learns_from(problem.bank.task_names)
    held_out = bool(method.starts) and _has_few(problem, tasks)
    draws = method.draws(config.trainer.max_steps)
    data = _images(objective, tasks, problem, config, evaluator, draws, held_out=held_out)
    selection = _selection(method, objective, tasks, problem, config, evaluator)
    bank = _transformed(method, problem.bank, context)
    losses = TaskLosses(
        objective,
        {task: problem.heads[task] for task in tasks},
        {task: method.factor(task) * weight for task, weight in task_weights(config.data.task_weights, tasks).items()},
        config.data.fuse_tasks,
    )
    make_logger = hydra.utils.instantiate(config.logger)
    make_trainer = hydra.utils.instantiate(config.trainer)
    history = None
    if isinstance(method, Concrete):
        mask, history = learn_mask(method, problem, bank, losses, data, config, run_dir, method_name)
        bank, description = masked(bank, mask), describe_mask(mask, description)
        make_trainer = make_trainer if method.learn_coefficients else partial(make_trainer, max_steps=0)
    shares = {}
    learned, stage, prepared = None, 0, method.prepare(bank)
    while prepared is not None:
        partition, coefficients = prepared
        model = MergedModel(problem.clip.image_encoder, bank, partition, compiled=config.model.compile)
        renewal = partial(_renewal, objective, model, tasks, problem, config, evaluator)
        data.renew = renewal(coefficients)
        start = partial(
            gradient_at_start,
            model,
            coefficients,
            losses,
            data,
            steps=data.steps_per_pass,
            device=evaluator.device,
            precision=evaluator.precision,
        )
        coefficients = method.restrict(coefficients, start)
        data.renew = renewal(coefficients)
        try:
            learned = learn(
                model,
                coefficients,
                losses,
                data,
                run_dir=run_dir,
                stage=stage,
                make_trainer=make_trainer,
                optimizer=hydra.utils.instantiate(config.optimizer),
                schedule=Schedule(**config.schedule),
                penalty=method.penalty,
                starts=method.starts,
                selection=selection,
                held_out_every=CANDIDATES_EVERY if held_out else None,
                resume=config.resume is not None,
                callbacks=[progress_bar()],
                logger=make_logger(save_dir=run_dir) if make_logger else False,
            )
        except UserInterruptError as error:
            raise UserInterruptError(f"{error} Continue with: adamerge resume={run_dir}") from error
        except TrainingError as error:
            kept = coefficients().detach().cpu()
            saved = SavedCoefficients(kept, bank.task_names, partition, description, bank.base_hash, method_name)
            file = run_dir / "coefficients.safetensors"
            write_coefficients(file, saved)
            raise TrainingError(
                f"{error} They are in {file}; merge with them by method.coefficients={file}."
            ) from error
        model.to("cpu").update(learned.coefficients)
        history = learned = replace(learned.after(history) if history else learned, shares=shares)
        stage += 1
        prepared = method.refine(stage, bank, partition, learned.coefficients)
        shares = method.shares(bank, learned.coefficients) if prepared else shares
    assert learned is not None
    saved = SavedCoefficients(
        learned.coefficients, bank.task_names, learned.partition, description, bank.base_hash, method_name
    )
    return model.weights(), saved, learned


def _transformed(method: Learner, bank: ParameterBank, context: Context) -> ParameterBank:
    return bank.transformed(method.transform.fit(bank, context), in_place=True) if method.transform else bank


def _images(
    objective: Objective,
    tasks: Sequence[str],
    problem: Problem,
    config: DictConfig,
    evaluator: Evaluator,
    draws: int,
    *,
    held_out: bool,
) -> TaskImages:
    """The images that are learned from, with what the objective needs to know about them in so many draws, no more.

    With ``held_out`` some of them are kept to compare iterates on.
    """
    options: dict[str, Any] = {
        "images_per_batch": config.data.images_per_batch,
        "batches_per_step": config.data.batches_per_step,
        "seed": config.seed,
    }
    view = RandomView(config.data.crop_scale, config.data.flip)
    view = view if view.crop_scale < 1 or view.flip else None
    if objective.needs == "labels":
        labelled = problem.labelled(tasks)
        images = {task: labelled[task].images for task in tasks}
        indices = {task: _learned_rows(task, labelled[task], config) for task in tasks}
        data = TaskImages(images, indices, **options)
        data.targets = {task: {"labels": labels} for task in tasks if (labels := labelled[task].labels) is not None}
        data.view, data.on_device = view, config.data.on_device
        return data
    images = {task: problem.unlabeled[task].images for task in tasks}
    data = TaskImages(images, {task: problem.adapt_indices[task] for task in tasks}, **options)
    data.view, data.on_device = view, config.data.on_device
    if held_out:
        data.hold_out()
    if isinstance(objective, FixMatch):
        data.trusted_share = objective.trusted_share
    if objective.needs == "experts":
        if view is not None:
            raise ConfigError(
                "the experts see every image once, as it is. Use data.crop_scale=1 data.flip=false with this objective."
            )
        data.targets = expert_targets(
            problem.clip.image_encoder,
            problem.bank,
            images,
            {task: data.drawn(task, draws) for task in tasks},
            objective,
            device=evaluator.device,
            precision=evaluator.precision,
            batch_size=evaluator.batch_size,
        )
    return data


def _has_few(problem: Problem, tasks: Sequence[str]) -> bool:
    """Whether a task has few images to adapt on, of which some are not scored, or others are."""
    splits = {task.name: task.splits for task in problem.suite.tasks}
    return any(
        len(problem.adapt_indices[task]) < FEW_IMAGES
        and (
            splits[task].adapt != splits[task].evaluate
            or not torch.equal(problem.score_indices[task], problem.adapt_indices[task])
        )
        for task in tasks
    )


def _learned_rows(task: str, labelled: ImageSet, config: DictConfig) -> Tensor:
    """Which labelled images a supervised learner learns from."""
    data = config.data
    limits = {name: data[name] for name in ("split_seed", "fraction", "images_per_task")}
    if data.shots is None or labelled.labels is None:
        return split_indices(len(labelled.images), task, adapt="all", **limits)[0]
    if data.fraction != 1 or data.images_per_task is not None:
        raise ConfigError("data.shots stands alone. Drop data.fraction and data.images_per_task.")
    return draw_shots(labelled.labels, data.shots, task, split_seed=data.split_seed)


def _renewal(
    objective: Objective,
    model: MergedModel,
    tasks: Sequence[str],
    problem: Problem,
    config: DictConfig,
    evaluator: Evaluator,
    coefficients: Coefficients,
) -> Callable[[int], Mapping[str, Mapping[str, Tensor]] | None] | None:
    """What is looked at again, before each step, about the images."""
    if not isinstance(objective, FixMatch):
        return None
    return TrustedImages(
        model,
        coefficients,
        {task: problem.unlabeled[task].images for task in tasks},
        {task: problem.adapt_indices[task] for task in tasks},
        problem.heads,
        objective,
        steps=config.trainer.max_steps,
        batch_size=evaluator.batch_size,
        precision=evaluator.precision,
    )


def _selection(
    method: Learner,
    objective: Objective,
    tasks: Sequence[str],
    problem: Problem,
    config: DictConfig,
    evaluator: Evaluator,
) -> Selection | None:
    """How the method chooses among its iterates: on labelled images that it does not learn from, if there are any."""
    every = method.candidates_every
    if every is None:
        return None
    images = problem.labelled(tasks)
    rows = {task: torch.arange(len(images[task].images)) for task in tasks}
    for task, every_row in rows.items():
        seen = _learned_rows(task, images[task], config) if objective.needs == "labels" else every_row[:0]
        left = every_row[~torch.isin(every_row, seen)]
        rows[task] = left if len(left) else every_row
    known = {"tasks": tasks, "images": images, "rows": rows}
    pretrained = known_accuracies(evaluator(problem.bank.pretrained, cached=True, **known))
    experts = known_accuracies(evaluator.experts(**known))
    return Selection(
        every,
        score=lambda model: known_accuracies(evaluator(model.weights(), **known)),
        merit=lambda merged: method.merit(merged, pretrained, experts),
    )


def known_accuracies(found: Accuracies) -> dict[str, float]:
    """Of images that all have labels."""
    return {task: accuracy for task, accuracy in found.items() if accuracy is not None}


def task_weights(given: Mapping[str, float] | None, tasks: Sequence[str]) -> dict[str, float]:
    """Factor of each task's loss; 1 for those not named.

    Raises:
        ConfigError: If a named task is not merged.
    """
    given = given or {}
    if unknown := given.keys() - set(tasks):
        raise ConfigError(f"data.task_weights names {shortlist(unknown)}, but the tasks are {', '.join(tasks)}.")
    return {task: float(given.get(task, 1.0)) for task in tasks}


def check_coefficients_fit(
    saved: SavedCoefficients, problem: Problem, transform: dict[str, Any] | None, file: str
) -> None:
    """Raise ConfigError unless saved coefficients were learned for this base, these tasks, keys and transform."""
    bank = problem.bank
    if saved.base_hash != bank.base_hash:
        raise ConfigError(f"{file} was learned for another pretrained model. Use the base it was learned on.")
    if saved.task_names != bank.task_names:
        raise ConfigError(
            f"{file} holds coefficients of {', '.join(saved.task_names)}, but the tasks are "
            f"{', '.join(bank.task_names)}. Merge the same tasks in the same order with suite.tasks=[…]."
        )
    if saved.partition.sizes.keys() != bank.pretrained.keys():
        raise ConfigError(f"{file} covers other tensors than are merged here. Use the same model.include/exclude.")
    if saved.transform != transform:
        raise ConfigError(
            f"{file} was learned on task vectors transformed by {saved.transform}, this method transforms by "
            f"{transform}. Choose method={saved.method}."
        )
