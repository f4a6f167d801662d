"""Masks of the task vectors: learned, applied, and found again beside the coefficients."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import hydra.utils
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.cli.lightning import progress_bar
from adamerge.errors import ConfigError, TrainingError
from adamerge.export.coefficients import SavedCoefficients, write_coefficients
from adamerge.export.mask import MASK_NAME, describe_mask, read_mask, write_mask
from adamerge.learning.concrete import MaskImages, MaskLearner
from adamerge.learning.fit import Learned, UserInterruptError, train
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.merging.concrete_mask import ConcreteMask
from adamerge.merging.masked_model import MaskedModel
from adamerge.methods.learned import Concrete
from adamerge.objectives import FixMatch
from adamerge.tasks.datamodule import TaskImages
from adamerge.tasks.problem import Problem

SAVE_EVERY = 100
"""Optimiser steps between two checkpoints of a mask, which are three times as large as the model."""


def learn_mask(
    method: Concrete,
    problem: Problem,
    bank: ParameterBank,
    losses: TaskLosses,
    data: TaskImages,
    config: DictConfig,
    run_dir: Path,
    method_name: str,
) -> tuple[Mapping[str, Tensor], Learned]:
    """Learn a mask and draw the final one, which is written to the run's folder.

    Args:
        bank: What the mask is for.

    Returns:
        The mask by key, float32 on the CPU; the initial λ with the history of the mask.

    Raises:
        ConfigError: If the objective cannot be learned from so.
        UserInterruptError: On Ctrl-C.
        TrainingError: If a loss is not finite; what is drawn from the last good logits is written first.
    """
    if isinstance(losses.objective, FixMatch):
        raise ConfigError("a mask is not learned from images that come to be trusted. Choose another objective=….")
    partition, coefficients = method.prepare(bank)
    _, initial = method.prepare(bank)
    start = initial().detach()
    model = MaskedModel(problem.clip.image_encoder, bank, partition, compiled=config.model.compile)
    mask = ConcreteMask(
        bank.shapes,
        init=method.mask_init,
        temperature=method.temperature,
        dtype=method.mask_dtype,
        seed=config.seed,
    )
    make_logger = hydra.utils.instantiate(config.logger)
    if config.resume is None and rank_zero_only.rank == 0:
        (run_dir / "checkpoints" / "last.ckpt").unlink(missing_ok=True)  # of another run: this one has no λ yet
    try:
        learner, steps = train(
            partial(
                MaskLearner,
                model,
                coefficients,
                losses,
                mask,
                options=method,
                optimizer=partial(hydra.utils.instantiate(config.optimizer), lr=method.mask_lr),
                schedule=Schedule(**config.schedule),
                seed=config.seed,
            ),
            MaskImages(data, inner=method.inner_optimizer is not None),
            run_dir=run_dir,
            name="mask",
            make_trainer=partial(
                hydra.utils.instantiate(config.trainer),
                max_steps=method.mask_steps,
                limit_train_batches=method.mask_steps,
            ),
            resume=config.resume is not None,
            callbacks=[progress_bar("mask")],
            logger=make_logger(save_dir=run_dir) if make_logger else False,
            save_every=SAVE_EVERY,
        )
    except UserInterruptError as error:
        raise UserInterruptError(f"{error} Continue with: adamerge resume={run_dir}") from error
    except TrainingError as error:
        found = describe_mask(_final(mask, method, run_dir), method.transform.to_json() if method.transform else None)
        saved = SavedCoefficients(start, bank.task_names, partition, found, bank.base_hash, method_name)
        file = run_dir / "coefficients.safetensors"
        write_coefficients(file, saved)
        raise TrainingError(f"{error} Merge within a draw of it by method.coefficients={file}.") from error
    means = learner.mean_coefficients.cpu()
    history = Learned(start, partition, tuple(losses.heads), learner.losses.cpu(), means, steps)
    return _final(mask, method, run_dir), history


def _final(mask: ConcreteMask, method: Concrete, run_dir: Path) -> Mapping[str, Tensor]:
    """The mask that is merged within; drawn on the CPU, so that it is the same wherever its logits were learned."""
    drawn = mask.to("cpu").draw("final", binary=method.final_mask == "binary").mask
    if rank_zero_only.rank == 0:
        write_mask(run_dir / MASK_NAME, drawn)
    return drawn


def masked(bank: ParameterBank, mask: Mapping[str, Tensor]) -> ParameterBank:
    """The bank with m̃ ∘ τ in place of τ."""
    return bank.transformed(lambda key, task_vectors: task_vectors * mask[key].to(task_vectors), in_place=True)


def mask_beside(saved: SavedCoefficients, file: str) -> dict[str, Tensor]:
    """The mask within which coefficients were learned.

    Args:
        saved: The coefficients.
        file: Where they were read.

    Raises:
        CheckpointError: If there is no mask beside the file.
        ConfigError: If they were learned without a mask, or within another.
    """
    if not saved.transform or saved.transform["name"] != "mask":
        raise ConfigError(f"{file} was learned without a mask. Choose method={saved.method}.")
    path = Path(file).with_name(MASK_NAME)
    mask = read_mask(path)
    if describe_mask(mask, None)["sha256"] != saved.transform["sha256"]:
        raise ConfigError(f"{path} is not the mask within which {file} was learned. Copy both from one run.")
    return mask
