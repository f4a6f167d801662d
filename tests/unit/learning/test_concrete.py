"""The mask's learner under a real Trainer against an independent implementation on the same images and numbers u."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import concrete
from torch import Tensor
from unit.learning.test_module import (
    CONSTANT,
    TASKS,
    Encoder,
    FailsAt,
    Setting,
    Stop,
    StopsAt,
    adam,
    infinite_slope,
    make_trainer,
    normalized,
    not_a_number,
)

from adamerge.errors import ConfigError, TrainingError
from adamerge.learning.concrete import MaskImages, MaskLearner
from adamerge.learning.fit import train
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.merging import Coefficients, Partition
from adamerge.merging.concrete_mask import ConcreteMask
from adamerge.merging.masked_model import MaskedModel
from adamerge.merging.noise import uniform
from adamerge.methods.learned import Concrete
from adamerge.objectives import Entropy, Objective

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)

SEED = 5
DEFAULTS = {
    "transform": None,
    "coefficients": None,
    "granularity": "tensor",
    "constraint": "identity",
    "init": 0.3,
    "learn_coefficients": True,
    "mask_init": 0.0,
    "mask_dtype": "float32",
    "mask_lr": 1e-3,
    "mask_steps": 1000,
    "temperature": 0.5,
    "redraw": False,
    "inner_optimizer": None,
    "inner_at": "initial",
    "final_mask": "continuous",
}
INNER = {
    "adam": (partial(torch.optim.Adam, lr=1.0), lambda: concrete.Adam(1.0)),
    "sgd": (partial(torch.optim.SGD, lr=1.0), lambda: concrete.Descent(1.0)),
}


@pytest.fixture
def setting() -> Setting:
    return Setting()


def fit(
    setting: Setting,
    steps: int,
    folder: Path,
    *,
    objective: Objective | None = None,
    fuse_tasks: Any = True,
    lr: float = 1e-3,
    schedule: Schedule = CONSTANT,
    precision: str = "32-true",
    save_every: int = 10,
    batches_per_step: int = 1,
    **options: Any,
) -> MaskLearner:
    method = Concrete(**(DEFAULTS | options))
    partition, coefficients = method.prepare(setting.bank)
    mask = ConcreteMask(setting.bank.shapes, init=0.0, temperature=0.5, dtype=method.mask_dtype, seed=SEED)
    learner, _ = train(
        partial(
            MaskLearner,
            MaskedModel(Encoder(setting.network), setting.bank, partition),
            coefficients,
            TaskLosses(objective or Entropy(), setting.heads, dict.fromkeys(TASKS, 1.0), fuse_tasks),
            mask,
            options=method,
            optimizer=partial(adam, lr=lr),
            schedule=schedule,
            seed=SEED,
        ),
        MaskImages(setting.data(batches_per_step=batches_per_step), inner=method.inner_optimizer is not None),
        run_dir=folder,
        name="mask",
        make_trainer=partial(make_trainer, max_steps=steps, limit_train_batches=steps, precision=precision),
        resume=True,
        callbacks=(),
        logger=False,
        save_every=save_every,
    )
    return learner


def logits(learner: MaskLearner) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in learner.mask.items()}


def drawn(setting: Setting, name: str) -> dict[str, Tensor]:
    return {
        key: uniform(f"{SEED}/{name}/{key}", base.numel(), device="cpu", dtype=torch.float32).view_as(base)
        for key, base in setting.pretrained.items()
    }


def batches(setting: Setting, draw: int) -> list[list[Tensor]]:
    images = setting.data(batches_per_step=1).batch(draw)["images"]
    return [[normalized(images[task])] for task in TASKS]


def reference(
    setting: Setting,
    steps: int,
    *,
    inner: str | None,
    inner_at: str = "initial",
    redraw: bool = False,
    granularity: str = "tensor",
) -> tuple[dict[str, Tensor], Tensor]:
    problem = concrete.Problem(
        setting.network,
        setting.pretrained,
        setting.experts,
        list(setting.heads.values()),
        granularity=granularity,
    )
    groups = Partition.build(granularity, setting.bank.shapes).num_groups
    found, coefficients = problem.learn(
        [drawn(setting, f"step {step}") for step in range(steps)],
        [batches(setting, 2 * step + 1 if inner else step) for step in range(steps)],
        lr=1e-3,
        start=torch.full((len(TASKS), groups), 0.3),
        inner=[batches(setting, 2 * step) for step in range(steps)],
        outer_noise=[drawn(setting, f"step {step}, outer") for step in range(steps)] if redraw else None,
        inner_optimizer=INNER[inner][1]() if inner else None,
        inner_at=inner_at,
    )
    return dict(found), coefficients


def assert_same_steps(found: dict[str, Tensor], expected: dict[str, Tensor], *, share: float = 0.999) -> None:
    """Nearly all entries: Adam's step is about the sign of the gradient, which rounding decides where it is about 0."""
    close = torch.cat([(found[key] - expected[key]).abs().flatten() < 2e-5 for key in expected])
    moved = torch.cat([expected[key].abs().flatten() > 1e-4 for key in expected])
    assert close.float().mean() > share
    assert moved.float().mean() > 0.9


# Against the reference


@pytest.mark.parametrize("fuse_tasks", [True, False], ids=["fused", "one after another"])
@pytest.mark.parametrize("granularity", ["task", "tensor"])
def test_task_arithmetic_s_steps_are_the_reference_s(
    setting: Setting, tmp_path: Path, granularity: str, fuse_tasks: bool
) -> None:
    learner = fit(setting, 5, tmp_path, granularity=granularity, fuse_tasks=fuse_tasks)
    expected, _ = reference(setting, 5, inner=None, granularity=granularity)
    assert_same_steps(logits(learner), expected)
    assert torch.equal(learner.coefficients(), torch.full_like(learner.coefficients(), 0.3))


@pytest.mark.parametrize("fuse_tasks", [True, False], ids=["fused", "one after another"])
@pytest.mark.parametrize("inner_at", ["initial", "previous"])
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_bi_level_steps_are_the_reference_s(
    setting: Setting, tmp_path: Path, inner: str, inner_at: str, fuse_tasks: bool
) -> None:
    options = {"inner_optimizer": INNER[inner][0], "inner_at": inner_at, "fuse_tasks": fuse_tasks}
    learner = fit(setting, 3, tmp_path, **options)
    expected, coefficients = reference(setting, 3, inner=inner, inner_at=inner_at)
    torch.testing.assert_close(learner.coefficients().detach(), coefficients, rtol=1e-3, atol=1e-3)
    assert (coefficients - 0.3).abs().max() > 0.01
    assert_same_steps(logits(learner), expected, share=0.98)


def test_where_the_inner_gradient_is_taken_and_which_mask_the_outer_merge_has_make_a_difference(
    setting: Setting, tmp_path: Path
) -> None:
    inner = {"inner_optimizer": INNER["sgd"][0]}
    plain = logits(fit(setting, 3, tmp_path / "plain", **inner))
    redrawn = fit(setting, 3, tmp_path / "redrawn", redraw=True, **inner)
    expected, _ = reference(setting, 3, inner="sgd", redraw=True)
    assert_same_steps(logits(redrawn), expected, share=0.98)
    previous = logits(fit(setting, 3, tmp_path / "previous", inner_at="previous", **inner))
    for other in (logits(redrawn), previous):
        assert any((other[key] - plain[key]).abs().max() > 1e-4 for key in plain)


def test_the_first_loss_and_its_coefficients_are_in_the_history(setting: Setting, tmp_path: Path) -> None:
    learner = fit(setting, 2, tmp_path, inner_optimizer=INNER["sgd"][0])
    problem = concrete.Problem(setting.network, setting.pretrained, setting.experts, list(setting.heads.values()))
    zero = {key: torch.zeros_like(base) for key, base in setting.pretrained.items()}
    start = torch.full((3, len(zero)), 0.3)
    noise = drawn(setting, "step 0")
    stepped = start - problem.coefficient_gradient(zero, noise, start, batches(setting, 0))
    expected = problem.loss(zero, noise, stepped, batches(setting, 1))
    torch.testing.assert_close(learner.losses[0].sum(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.mean_coefficients[0], stepped.mean(1), rtol=1e-4, atol=1e-5)


# What it trains, and what not


def test_only_the_mask_and_the_inner_coefficients_train(setting: Setting, tmp_path: Path) -> None:
    task_vectors = {key: tensor.clone() for key, tensor in setting.bank.task_vectors.items()}
    learner = fit(setting, 3, tmp_path, inner_optimizer=INNER["adam"][0])
    names = {name for name, _ in learner.named_parameters()}
    assert names == {"coefficients.raw", *(f"mask.logits.{index}" for index in range(len(task_vectors)))}
    (group,) = learner.trainer.optimizers[0].param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(value) for _, value in learner.mask.items()]
    torch.testing.assert_close(dict(setting.network.state_dict()), setting.pretrained, rtol=0, atol=0)
    torch.testing.assert_close(dict(setting.bank.pretrained), setting.pretrained, rtol=0, atol=0)
    torch.testing.assert_close(dict(setting.bank.task_vectors), task_vectors, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"mask_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_the_loss_falls(setting: Setting, tmp_path: Path, options: dict[str, Any]) -> None:
    totals = fit(setting, 120, tmp_path, lr=5e-2, **options).losses.sum(dim=1)
    assert totals[-20:].mean() < 0.9 * totals[:20].mean()


def test_the_clamp_keeps_the_inner_coefficients_in_range(setting: Setting, tmp_path: Path) -> None:
    inner = {"inner_optimizer": INNER["adam"][0], "granularity": "task"}
    free = fit(setting, 4, tmp_path / "free", **inner).coefficients()
    clamped = fit(setting, 4, tmp_path / "clamped", constraint="clamp", **inner).coefficients()
    assert free.min() < 0 or free.max() > 1
    assert clamped.min() >= 0
    assert clamped.max() <= 1


def test_the_rate_falls_as_the_schedule_says(setting: Setting, tmp_path: Path) -> None:
    constant = logits(fit(setting, 2, tmp_path / "constant"))
    linear = logits(
        fit(setting, 2, tmp_path / "linear", schedule=Schedule(steps=2, decay="linear", average=0, patience=0))
    )
    first = logits(fit(setting, 1, tmp_path / "first"))
    key = "visual.proj"
    whole, half = constant[key] - first[key], linear[key] - first[key]
    torch.testing.assert_close(half, 0.5 * whole, rtol=1e-3, atol=1e-6)


def test_bfloat16_logits_are_near_float32(setting: Setting, tmp_path: Path) -> None:
    wide = logits(fit(setting, 60, tmp_path / "wide", lr=1e-2))
    learner = fit(setting, 60, tmp_path / "narrow", lr=1e-2, mask_dtype="bfloat16")
    narrow = logits(learner)
    assert {value.dtype for value in narrow.values()} == {torch.bfloat16}
    state = learner.trainer.optimizers[0].state_dict()["state"]
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.bfloat16}
    error = torch.cat([(narrow[key].float() - wide[key]).flatten() for key in wide])
    size = torch.cat([value.flatten() for value in wide.values()])
    assert error.square().mean() < 0.1 * size.square().mean()


def test_bf16_mixed_is_near_float32(setting: Setting, tmp_path: Path) -> None:
    inner = {"inner_optimizer": INNER["sgd"][0]}
    wide = fit(setting, 5, tmp_path / "wide", **inner)
    mixed = fit(setting, 5, tmp_path / "mixed", precision="bf16-mixed", **inner)
    torch.testing.assert_close(mixed.losses, wide.losses, rtol=0.05, atol=0.02)
    assert not torch.equal(mixed.losses, wide.losses)


# Losses that are not finite


@pytest.mark.parametrize(
    ("failure", "what"),
    [(not_a_number, "the loss of task b is"), (infinite_slope, "the gradient of the mask is")],
)
def test_a_loss_that_is_not_finite_keeps_the_last_good_mask(
    setting: Setting, tmp_path: Path, failure: Callable[[Tensor], Tensor], what: str
) -> None:
    good = logits(fit(setting, 13, tmp_path / "good"))
    kept: list[MaskLearner] = []
    objective = FailsAt(13, 1, failure)
    with pytest.raises(TrainingError, match=f"{what} not finite at step 13. Learning stopped; the mask of step 13"):
        fit_keeping(kept, setting, 40, tmp_path / "bad", objective)
    found = logits(kept[0])
    assert all(torch.equal(found[key], good[key]) for key in good)


def fit_keeping(kept: list[MaskLearner], setting: Setting, steps: int, folder: Path, objective: Objective) -> None:
    """``fit`` that hands over the module before it runs."""
    start = MaskLearner.on_fit_start

    def remember(self: MaskLearner) -> None:
        kept.append(self)
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskLearner, "on_fit_start", remember)
        fit(setting, steps, folder, objective=objective)


def test_an_inner_loss_that_is_not_finite_is_named(setting: Setting, tmp_path: Path) -> None:
    # With an inner step there are two calls per task and step: the fourth step's inner ones begin at 6 · 3.
    with pytest.raises(TrainingError, match=r"the loss of task c is not finite at step 3\."):
        fit(setting, 10, tmp_path, objective=FailsAt(6, 2, not_a_number), inner_optimizer=INNER["adam"][0])


# Reproducible, whole or in parts


VARIANTS = {
    "arithmetic": {},
    "adam": {"inner_optimizer": INNER["adam"][0]},
    "previous": {"inner_optimizer": INNER["adam"][0], "inner_at": "previous", "redraw": True},
    "bfloat16": {"mask_dtype": "bfloat16", "inner_optimizer": INNER["sgd"][0]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_continues_bit_by_bit(setting: Setting, tmp_path: Path, options: dict[str, Any]) -> None:
    unbroken = fit(setting, 25, tmp_path / "unbroken", **options)
    calls = 2 if "inner_optimizer" in options else 1
    with pytest.raises(Stop):
        fit(setting, 25, tmp_path / "broken", objective=StopsAt(17 * calls), **options)
    counting = FailsAt(-1, 0, not_a_number)
    resumed = fit(setting, 25, tmp_path / "broken", objective=counting, **options)
    assert counting.calls == 15 * calls * len(TASKS)
    expected, found = logits(unbroken), logits(resumed)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(resumed.losses, unbroken.losses)
    assert torch.equal(resumed.mean_coefficients, unbroken.mean_coefficients)
    finals = [learner.mask.draw("final").mask for learner in (resumed, unbroken)]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in expected)


def test_checkpoints_are_as_rare_as_asked(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(setting, 25, tmp_path, objective=StopsAt(17), save_every=15)
    assert torch.load(tmp_path / "checkpoints" / "mask.ckpt", weights_only=True)["global_step"] == 15


# The method's own options


@pytest.fixture
def method() -> Callable[..., Concrete]:
    return lambda **options: Concrete(**(DEFAULTS | options))


def test_draws_count_inner_and_outer_ones(method: Callable[..., Concrete]) -> None:
    inner = INNER["adam"][0]
    assert method(mask_steps=30, learn_coefficients=False).draws(50) == 30
    assert method(mask_steps=30, inner_optimizer=inner).draws(50) == 60
    assert method(mask_steps=3, inner_optimizer=inner).draws(50) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_at": "last"}, r"method\.inner_at is 'initial' or 'previous', found 'last'"),
        ({"final_mask": "hard"}, r"method\.final_mask is 'continuous' or 'binary', found 'hard'"),
        ({"mask_steps": -1}, r"method\.mask_steps is at least 0, found -1"),
    ],
)
def test_options_out_of_range_are_refused(
    method: Callable[..., Concrete], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options)


def test_coefficients_start_as_adamerging_s(method: Callable[..., Concrete], setting: Setting) -> None:
    partition, coefficients = method(init=[0.1, 0.2, 0.3], granularity="task").prepare(setting.bank)
    assert isinstance(coefficients, Coefficients)
    assert partition.num_groups == 1
    torch.testing.assert_close(coefficients(), torch.tensor([[0.1], [0.2], [0.3]]))
