"""The part of the main job that learns: images and targets, stages, and what is kept when it is cut short."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra.utils
from omegaconf import DictConfig
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.cli.lightning import progress_bar
from adamerge.errors import ConfigError, TrainingError, shortlist
from adamerge.evaluation.evaluator import Evaluator
from adamerge.export.coefficients import SavedCoefficients, read_coefficients, write_coefficients
from adamerge.learning.experts import expert_targets
from adamerge.learning.fit import Learned, UserInterruptError, learn
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.merging import MergedModel
from adamerge.methods import Learner
from adamerge.objectives import Objective
from adamerge.tasks.datamodule import TaskImages, split_indices
from adamerge.tasks.problem import Problem


def learn_coefficients(
    method: Learner, problem: Problem, config: DictConfig, run_dir: Path, method_name: str, evaluator: Evaluator
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
        check_coefficients_fit(saved, problem, description, method.coefficients)
        model = MergedModel(problem.clip.image_encoder, _transformed(method, problem.bank), saved.partition)
        model.update(saved.coefficients)
        return model.weights(), saved, None
    objective = hydra.utils.instantiate(config.objective)
    tasks = method.learns_from(problem.bank.task_names)
    data = _images(objective, tasks, problem, config, evaluator)
    bank = _transformed(method, problem.bank)
    losses = TaskLosses(
        objective,
        {task: problem.heads[task] for task in tasks},
        task_weights(config.data.task_weights, tasks),
        config.data.fuse_tasks,
    )
    make_logger = hydra.utils.instantiate(config.logger)
    learned, stage, prepared = None, 0, method.prepare(bank)
    while prepared is not None:
        partition, coefficients = prepared
        model = MergedModel(problem.clip.image_encoder, bank, partition, compiled=config.model.compile)
        try:
            learned = learn(
                model,
                coefficients,
                losses,
                data,
                run_dir=run_dir,
                stage=stage,
                make_trainer=hydra.utils.instantiate(config.trainer),
                optimizer=hydra.utils.instantiate(config.optimizer),
                schedule=Schedule(**config.schedule),
                penalty=method.penalty,
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
        stage += 1
        prepared = method.refine(stage, bank, partition, learned.coefficients)
    assert learned is not None
    saved = SavedCoefficients(
        learned.coefficients, bank.task_names, learned.partition, description, bank.base_hash, method_name
    )
    return model.weights(), saved, learned


def _transformed(method: Learner, bank: ParameterBank) -> ParameterBank:
    return bank.transformed(method.transform.fit(bank), in_place=True) if method.transform else bank


def _images(
    objective: Objective, tasks: Sequence[str], problem: Problem, config: DictConfig, evaluator: Evaluator
) -> TaskImages:
    """The images that are learned from, with what the objective needs to know about them and no more."""
    options: dict[str, Any] = {
        "images_per_batch": config.data.images_per_batch,
        "batches_per_step": config.data.batches_per_step,
        "seed": config.seed,
    }
    if objective.needs == "labels":
        labelled = problem.labelled()
        images = {task: labelled[task].images for task in tasks}
        limits = {name: config.data[name] for name in ("split_seed", "fraction", "images_per_task")}
        indices = {task: split_indices(len(images[task]), task, adapt="all", **limits)[0] for task in tasks}
        data = TaskImages(images, indices, **options)
        data.targets = {task: {"labels": labels} for task in tasks if (labels := labelled[task].labels) is not None}
        return data
    images = {task: problem.unlabeled[task].images for task in tasks}
    data = TaskImages(images, {task: problem.adapt_indices[task] for task in tasks}, **options)
    if objective.needs == "experts":
        data.targets = expert_targets(
            problem.clip.image_encoder,
            problem.bank,
            images,
            {task: data.drawn(task, config.trainer.max_steps) for task in tasks},
            objective,
            device=evaluator.device,
            precision=evaluator.precision,
            batch_size=evaluator.batch_size,
        )
    return data


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
