"""The learner under a real Trainer against an independent implementation on the same batches; what it must not do."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from reference import layerwise, tower
from torch import Tensor, nn
from torch.func import functional_call
from unit.zoo import make_bank

from adamerge.bank import ParameterBank
from adamerge.errors import TrainingError
from adamerge.learning.fit import Learned, UserInterruptError, learn
from adamerge.learning.losses import TaskLosses, passes
from adamerge.learning.module import CoefficientLearner
from adamerge.learning.schedule import Schedule
from adamerge.merging import Coefficients, MergedModel, Partition
from adamerge.objectives import Entropy, Objective, Outputs, Target
from adamerge.tasks.datamodule import HELD_OUT, TaskImages

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)

TASKS = ("a", "b", "c")
SIZES = {"a": 30, "b": 30, "c": 6}  # c is smaller than a step's 2 · 4 images: a batch of 4 and one of 2
PER_BATCH = 4
make_trainer = partial(
    pl.Trainer,
    accelerator="cpu",
    devices=1,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    log_every_n_steps=10,
)
adam = partial(torch.optim.Adam, lr=1e-3)


CONSTANT = Schedule(steps=500, decay="constant", average=0, patience=0)


class Encoder(nn.Module):
    """uint8 images (B, 3, 8, 8) → features (B, 12): the reference's tower behind CLIP's kind of normalisation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.visual = network.visual
        self.calls = 0
        self.dtypes: set[torch.dtype] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        features = self.visual(normalized(images))
        self.dtypes.add(features.dtype)
        return features


def normalized(images: Tensor) -> Tensor:
    return images.float() / 64 - 2


@dataclass
class Setting:
    """A toy problem, and everything of it that a run needs."""

    network: nn.Module = field(default_factory=tower.make_network)
    experts: list[dict[str, Tensor]] = field(init=False)
    pretrained: dict[str, Tensor] = field(init=False)
    bank: ParameterBank = field(init=False)
    heads: dict[str, Tensor] = field(init=False)
    images: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.experts = tower.make_experts(self.network, len(TASKS))
        self.pretrained = dict(tower.state(self.network))
        self.bank = make_bank(self.pretrained, self.experts)
        self.heads = dict(zip(TASKS, tower.make_heads(len(TASKS)), strict=True))
        generator = torch.Generator().manual_seed(5)
        self.images = {
            task: torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
            for task, size in SIZES.items()
        }

    def data(self, images: dict[str, Tensor] | None = None, **options: Any) -> TaskImages:
        images = images or self.images
        indices = {task: torch.arange(len(of_task)) for task, of_task in images.items()}
        options = {"images_per_batch": PER_BATCH, "batches_per_step": 2, "seed": 0} | options
        return TaskImages(images, indices, **options)

    def reference_batches(self, steps: int) -> list[list[list[Tensor]]]:
        """``[step][task]``: the image batches that ``data`` deals, cut by its documented order."""
        found = []
        for step in range(steps):
            images = self.data().batch(step)["images"]
            found.append([list(normalized(images[task]).split(PER_BATCH)) for task in TASKS])
        return found


@dataclass
class Run:
    """What one call of Trainer.fit leaves."""

    learner: CoefficientLearner
    trainer: pl.Trainer
    encoder: Encoder
    start: Tensor
    message: str = ""

    @property
    def raw(self) -> Tensor:
        return self.learner.coefficients.raw.detach()


@pytest.fixture
def setting() -> Setting:
    return Setting()


def fit(
    setting: Setting,
    steps: int,
    *,
    granularity: str = "tensor",
    constraint: str = "clamp",
    objective: Objective | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = adam,
    schedule: Schedule = CONSTANT,
    task_weights: dict[str, float] | None = None,
    fuse_tasks: Any = True,
    check_every: int = 10,
    held_out_every: int | None = None,
    starts: Sequence[float] = (),
    data: TaskImages | None = None,
    precision: str = "32-true",
    accelerator: str = "cpu",
    callbacks: Iterable[pl.Callback] = (),
    error: type[Exception] | None = None,
) -> Run:
    partition = Partition.build(granularity, setting.bank.shapes)
    coefficients = Coefficients(len(TASKS), partition.num_groups, init=0.3, constraint=constraint)
    encoder = Encoder(setting.network)
    learner = CoefficientLearner(
        MergedModel(encoder, setting.bank, partition),
        coefficients,
        TaskLosses(objective or Entropy(), setting.heads, dict.fromkeys(TASKS, 1.0) | (task_weights or {}), fuse_tasks),
        optimizer=optimizer,
        schedule=schedule,
        max_steps=steps,
        check_every=check_every,
        held_out_every=held_out_every,
        starts=starts,
    )
    trainer = make_trainer(
        max_steps=steps,
        limit_train_batches=steps,
        logger=False,
        enable_checkpointing=False,
        precision=precision,
        accelerator=accelerator,
        callbacks=list(callbacks),
    )
    run = Run(learner, trainer, encoder, coefficients.raw.detach().clone())
    if error is None:
        trainer.fit(learner, datamodule=data or setting.data())
    else:
        with pytest.raises(error) as found:
            trainer.fit(learner, datamodule=data or setting.data())
        run.message = str(found.value)
    return run


# Against the reference


@pytest.mark.parametrize("fuse_tasks", [True, False], ids=["fused", "one after another"])
@pytest.mark.parametrize("granularity", ["tensor", "task", "block"])
def test_coefficients_after_20_steps_equal_the_reference(setting: Setting, granularity: str, fuse_tasks: bool) -> None:
    run = fit(setting, 20, granularity=granularity, fuse_tasks=fuse_tasks)
    expected = layerwise.learn(
        setting.network,
        setting.pretrained,
        setting.experts,
        list(setting.heads.values()),
        setting.reference_batches(20),
        20,
        granularity=granularity,
    )
    assert run.trainer.global_step == 20
    assert (expected - 0.3).abs().max() > 0.01
    torch.testing.assert_close(run.raw, expected, rtol=1e-5, atol=0)
    assert run.encoder.calls == 20 * (1 if fuse_tasks else len(TASKS))


@pytest.mark.gpu
@pytest.mark.parametrize("fuse_tasks", [True, False], ids=["fused", "one after another"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "random(3)"])
def test_a_gpu_learns_what_the_cpu_learns_from_a_recorded_step(
    setting: Setting, granularity: str, fuse_tasks: bool
) -> None:
    here = fit(setting, 20, granularity=granularity, fuse_tasks=fuse_tasks)
    there = fit(setting, 20, granularity=granularity, fuse_tasks=fuse_tasks, accelerator="gpu")
    torch.testing.assert_close(there.raw.cpu(), here.raw, rtol=0, atol=2e-4)  # a hundredth of what 20 steps move
    torch.testing.assert_close(there.learner.losses.cpu(), here.learner.losses, rtol=1e-4, atol=1e-5)
    assert there.encoder.calls == 3 * (1 if fuse_tasks else len(TASKS))


@pytest.mark.gpu
def test_images_that_lie_on_the_gpu_are_the_same_images(setting: Setting) -> None:
    held = setting.data()
    held.on_device = True
    brought, there = (fit(setting, 20, data=data, accelerator="gpu") for data in (setting.data(), held))
    assert torch.equal(there.raw, brought.raw)
    assert all(images.is_cuda for images in held._images.values())


class NoWaiting(pl.Callback):
    """Whatever waits for the device between the end of one step and that of another fails."""

    def __init__(self, after: int, until: int) -> None:
        self.modes = {after: "error", until: "default"}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if mode := self.modes.get(trainer.global_step):
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_the_host_does_not_wait_between_two_looks(setting: Setting) -> None:
    try:
        run = fit(setting, 10, check_every=5, accelerator="gpu", callbacks=[NoWaiting(after=5, until=9)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.trainer.progress_bar_metrics["total"] == pytest.approx(float(run.learner.losses[9].sum()))
    assert run.learner.losses.isfinite().all()


def test_losses_are_the_references_and_history_is_of_the_coefficients_before_each_step(setting: Setting) -> None:
    steps = 5
    run = fit(setting, steps)
    batches = setting.reference_batches(steps)
    first = layerwise.losses(
        setting.network,
        setting.pretrained,
        setting.experts,
        list(setting.heads.values()),
        batches[0],
        torch.full((3, run.learner.model.partition.num_groups), 0.3),
    )
    torch.testing.assert_close(run.learner.losses[0], torch.stack(first), rtol=1e-5, atol=0)
    assert run.learner.losses.shape == run.learner.mean_coefficients.shape == (steps, len(TASKS))
    assert run.learner.losses.isfinite().all()
    torch.testing.assert_close(run.learner.mean_coefficients[0], torch.full((3,), 0.3), rtol=1e-6, atol=0)
    for done in range(1, steps):
        before = fit(setting, done).learner.coefficients().detach().mean(dim=1)
        torch.testing.assert_close(run.learner.mean_coefficients[done], before, rtol=0, atol=0)


def test_the_order_in_which_tasks_come_out_of_the_data_does_not_matter(setting: Setting) -> None:
    reversed_data = setting.data(dict(reversed(setting.images.items())))
    expected = fit(setting, 3)
    for fuse_tasks in (False, True):
        found = fit(setting, 3, data=reversed_data, fuse_tasks=fuse_tasks)
        torch.testing.assert_close(found.raw, expected.raw, rtol=1e-5, atol=0)


def test_the_result_is_the_iterate_that_does_best_on_the_draws_held_out(setting: Setting) -> None:
    rising = fit(setting, 12, optimizer=partial(torch.optim.SGD, lr=0.1, maximize=True), held_out_every=4)
    last = rising.learner.coefficients().detach().clone()
    assert (rising.learner.result() == 0.3).all()
    assert (last != 0.3).any()
    falling = fit(setting, 10, optimizer=partial(torch.optim.SGD, lr=0.1), held_out_every=4)
    at_the_end = fit(setting, 10, optimizer=partial(torch.optim.SGD, lr=0.1)).learner
    assert torch.equal(falling.learner.result(), at_the_end.result())
    assert torch.equal(at_the_end.result(), at_the_end.coefficients())


def test_learning_starts_from_the_constant_that_does_best_on_all_images(setting: Setting) -> None:
    starts = [-step / 10 for step in range(20)]
    few = {task: images[:4] for task, images in setting.images.items()}
    data = setting.data(few)
    data.hold_out()

    def best(images: dict[str, Tensor]) -> float:
        def entropy(start: float) -> float:
            weights = {k: v + start * sum(expert[k] - v for expert in setting.experts) for k, v in base.items()}
            outputs = {
                task: Outputs.of(functional_call(setting.network, weights, (normalized(images[task]),)), head)
                for task, head in setting.heads.items()
            }
            return sum(Entropy()(found, Target()).mean().item() for found in outputs.values())

        base = setting.pretrained
        return min(starts, key=entropy)

    held_out = {task: few[task][data.draw(task, HELD_OUT[0])[0]] for task in TASKS}
    assert best(held_out) != best(few)
    found = fit(
        setting, 1, constraint="identity", data=data, starts=starts, held_out_every=1
    ).learner.mean_coefficients[0]
    assert found.tolist() == pytest.approx([best(few)] * 3)


# What it trains, and what not


def test_only_the_coefficients_train(setting: Setting) -> None:
    task_vectors = {key: tensor.clone() for key, tensor in setting.bank.task_vectors.items()}
    run = fit(setting, 3)
    assert [name for name, _ in run.learner.named_parameters()] == ["coefficients.raw"]
    assert (run.raw != run.start).all()
    torch.testing.assert_close(dict(setting.network.state_dict()), setting.pretrained, rtol=0, atol=0)
    torch.testing.assert_close(dict(setting.bank.pretrained), setting.pretrained, rtol=0, atol=0)
    torch.testing.assert_close(dict(setting.bank.task_vectors), task_vectors, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in setting.network.parameters())


@pytest.mark.parametrize("constraint", ["clamp", "softmax"])
def test_the_loss_falls(setting: Setting, constraint: str) -> None:
    run = fit(setting, 60, constraint=constraint, optimizer=partial(torch.optim.Adam, lr=2e-2))
    totals = run.learner.losses.sum(dim=1)
    assert totals[-10:].mean() < 0.9 * totals[:10].mean()


def gradient(setting: Setting, **options: Any) -> Tensor:
    """∂loss/∂λ of step 0, by one step of gradient descent at rate 1."""
    run = fit(setting, 1, constraint="identity", optimizer=partial(torch.optim.SGD, lr=1.0), **options)
    return run.start - run.raw


@pytest.mark.parametrize("fuse_tasks", [True, False])
def test_task_weights_scale_losses_and_gradients(setting: Setting, fuse_tasks: bool) -> None:
    weights = {"a": 2.0, "b": 0.0, "c": 0.5}
    alone = [
        gradient(setting, task_weights=dict.fromkeys(TASKS, 0.0) | {task: 1.0}, fuse_tasks=fuse_tasks) for task in TASKS
    ]
    found = gradient(setting, task_weights=weights, fuse_tasks=fuse_tasks)
    torch.testing.assert_close(found, 2 * alone[0] + 0.5 * alone[2], rtol=1e-3, atol=1e-6)
    assert alone[1].abs().max() > 1e-3
    plain, weighted = fit(setting, 1), fit(setting, 1, task_weights=weights)
    expected = plain.learner.losses[0] * torch.tensor([2.0, 0.0, 0.5])
    torch.testing.assert_close(weighted.learner.losses[0], expected, rtol=1e-6, atol=0)


def test_two_batches_of_the_same_images_count_twice(setting: Setting) -> None:
    same = {task: images[:1].expand(16, -1, -1, -1) for task, images in setting.images.items()}
    one = fit(setting, 1, data=setting.data(same, batches_per_step=1)).learner.losses[0]
    two = fit(setting, 1, data=setting.data(same, batches_per_step=2)).learner.losses[0]
    larger = fit(setting, 1, data=setting.data(same, batches_per_step=1, images_per_batch=8)).learner.losses[0]
    torch.testing.assert_close(two, 2 * one, rtol=1e-5, atol=0)
    torch.testing.assert_close(larger, one, rtol=1e-5, atol=0)
    doubled = gradient(setting, data=setting.data(same, batches_per_step=2))
    torch.testing.assert_close(
        doubled, 2 * gradient(setting, data=setting.data(same, batches_per_step=1)), rtol=1e-3, atol=1e-6
    )


# Losses that are not finite


class FailsAt(Entropy):
    """Entropy, but at one call of ``task`` (in order of heads) and ``step`` something else."""

    def __init__(self, step: int, task: int, failure: Callable[[Tensor], Tensor]) -> None:
        self.call, self.failure, self.calls = step * len(TASKS) + task, failure, 0

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        self.calls += 1
        loss = super().__call__(outputs, target)
        return self.failure(loss) if self.calls == self.call + 1 else loss


def not_a_number(loss: Tensor) -> Tensor:
    return loss * torch.nan


def infinite(loss: Tensor) -> Tensor:
    return loss + torch.inf


def infinite_slope(loss: Tensor) -> Tensor:
    return loss + (0 * loss).sqrt()  # finite itself


@pytest.mark.parametrize("fuse_tasks", [True, False])
@pytest.mark.parametrize(
    ("failure", "what"),
    [
        (not_a_number, "the loss of task b is"),
        (infinite, "the loss of task b is"),
        (infinite_slope, "the gradient of the coefficients is"),
    ],
)
def test_a_loss_that_is_not_finite_keeps_the_last_good_coefficients(
    setting: Setting, failure: Callable[[Tensor], Tensor], what: str, fuse_tasks: bool
) -> None:
    good = fit(setting, 13, fuse_tasks=fuse_tasks)
    run = fit(setting, 40, objective=FailsAt(13, 1, failure), fuse_tasks=fuse_tasks, error=TrainingError)
    assert run.message.startswith(f"{what} not finite at step 13. ")
    assert torch.equal(run.raw, good.raw)
    assert run.trainer.global_step == 20  # the host looks every ten steps, not at each
    assert torch.equal(run.learner.losses[:13], good.learner.losses)


def test_a_failure_in_the_last_steps_is_found_at_the_end(setting: Setting) -> None:
    run = fit(setting, 4, objective=FailsAt(3, 2, not_a_number), error=TrainingError)
    assert "the loss of task c is not finite at step 3" in run.message
    assert torch.equal(run.raw, fit(setting, 3).raw)


# Half precision


@pytest.mark.parametrize("fuse_tasks", [True, False])
def test_bf16_mixed_is_near_float32(setting: Setting, fuse_tasks: bool) -> None:
    wide, mixed = (
        fit(setting, 10, fuse_tasks=fuse_tasks),
        fit(setting, 10, fuse_tasks=fuse_tasks, precision="bf16-mixed"),
    )
    assert wide.encoder.dtypes == {torch.float32}
    assert mixed.encoder.dtypes == {torch.bfloat16}
    assert mixed.raw.dtype == torch.float32
    # Two decimal digits of the features, times a logit scale of 10: losses to 3 %, and most of λ's way is the same.
    torch.testing.assert_close(mixed.learner.losses, wide.learner.losses, rtol=0.03, atol=0.01)
    assert (mixed.raw - wide.raw).abs().mean() < 0.2 * (wide.raw - wide.start).abs().mean()
    assert not torch.equal(mixed.raw, wide.raw)


# learn(): checkpoints and going on


def learn_in(folder: Path, setting: Setting, steps: int, objective: Objective | None = None) -> Learned:
    partition = Partition.build("tensor", setting.bank.shapes)
    return learn(
        MergedModel(Encoder(setting.network), setting.bank, partition),
        Coefficients(len(TASKS), partition.num_groups, init=0.3, constraint="clamp"),
        TaskLosses(objective or Entropy(), setting.heads, dict.fromkeys(TASKS, 1.0), fuse_tasks=True),
        setting.data(),
        run_dir=folder,
        make_trainer=partial(make_trainer, max_steps=steps, limit_train_batches=steps),
        optimizer=adam,
        schedule=CONSTANT,
        resume=True,
    )


class Stop(Exception):  # noqa: N818
    """Ends a run as abruptly as a test can within its process."""


class StopsAt(FailsAt):
    def __init__(self, step: int) -> None:
        def stop(loss: Tensor) -> Tensor:
            raise Stop("stopped by the test")

        super().__init__(step, 0, stop)


def test_a_resumed_run_continues_bit_by_bit(setting: Setting, tmp_path: Path) -> None:
    unbroken = learn_in(tmp_path / "unbroken", setting, 25)
    with pytest.raises(Stop):
        learn_in(tmp_path / "broken", setting, 25, StopsAt(17))
    with pytest.raises(Stop):
        learn_in(tmp_path / "broken", setting, 25, StopsAt(13))  # 10 + 13: past the next checkpoint
    counting = FailsAt(-1, 0, not_a_number)
    resumed = learn_in(tmp_path / "broken", setting, 25, counting)
    assert counting.calls == 5 * len(TASKS)
    assert resumed.steps == unbroken.steps == 25
    assert torch.equal(resumed.coefficients, unbroken.coefficients)
    assert torch.equal(resumed.losses, unbroken.losses)
    assert torch.equal(resumed.mean_coefficients, unbroken.mean_coefficients)


def test_a_finished_run_is_not_run_again(setting: Setting, tmp_path: Path) -> None:
    done = learn_in(tmp_path, setting, 10)
    counting = FailsAt(-1, 0, not_a_number)
    again = learn_in(tmp_path, setting, 10, counting)
    assert counting.calls == 0
    assert torch.equal(again.coefficients, done.coefficients)
    assert torch.equal(again.losses, done.losses)


def test_a_checkpoint_has_no_model_weights(setting: Setting, tmp_path: Path) -> None:
    learn_in(tmp_path, setting, 10)
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {
        "coefficients.raw",
        "losses",
        "mean_coefficients",
        "failed_step",
        "average",
        "end",
    }
    assert checkpoint["global_step"] == 10

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    shapes = {tuple(tensor.shape) for tensor in tensors(checkpoint)}
    raw = (3, len(setting.bank.pretrained))
    assert shapes == {raw, (3 * raw[1],), (10, 3), ()}  # raw and Adam's moments, the average, history, counters


def test_no_steps_leave_the_start(setting: Setting, tmp_path: Path) -> None:
    learned = learn_in(tmp_path, setting, 0)
    assert learned.steps == 0
    assert learned.losses.shape == (0, 3)
    assert torch.equal(learned.coefficients, torch.full_like(learned.coefficients, 0.3))


@pytest.fixture
def _sigint() -> Iterator[None]:
    """Ctrl-C as in the foreground, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Pressing:
    """Presses Ctrl-C when it is deleted, where Python would lose a KeyboardInterrupt."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class PressesAt(FailsAt):
    """Somebody presses Ctrl-C that often during a step."""

    def __init__(self, step: int, times: int) -> None:
        def press(loss: Tensor) -> Tensor:
            pressing = Pressing()
            del pressing
            for _ in range(times - 1):
                signal.raise_signal(signal.SIGINT)
            return loss

        super().__init__(step, 0, press)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize(("times", "step"), [(1, 13), (2, 12)], ids=["after the step", "at once"])
def test_ctrl_c_names_the_step_and_keeps_the_last_checkpoint(
    times: int, step: int, setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(UserInterruptError, match=f"stopped by the user at step {step}"):
        learn_in(tmp_path, setting, 25, PressesAt(12, times))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 10
    assert torch.equal(
        learn_in(tmp_path, setting, 25).coefficients, learn_in(tmp_path / "other", setting, 25).coefficients
    )


def test_a_handler_of_ones_own_stays(setting: Setting, tmp_path: Path) -> None:
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        assert learn_in(tmp_path, setting, 25, PressesAt(12, 1)).steps == 25
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [1]


@pytest.mark.usefixtures("_sigint")
def test_learning_in_another_thread(setting: Setting, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(learn_in, tmp_path, setting, 3).result()
    assert found.steps == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_run_leaves_a_checkpoint_from_before_the_failure(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="task c is not finite at step 14"):
        learn_in(tmp_path, setting, 25, FailsAt(14, 2, not_a_number))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 10
    assert checkpoint["state_dict"]["failed_step"] == -1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TiB")],
    ids=["device", "cpu"],
)
def test_running_out_of_memory_says_what_helps(setting: Setting, tmp_path: Path, error: Exception) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise error

    with pytest.raises(TrainingError, match=r"data\.fuse_tasks=false.*images_per_batch.*bf16-mixed"):
        learn_in(tmp_path, setting, 2, FailsAt(0, 0, fail))


def test_other_errors_keep_their_type(setting: Setting, tmp_path: Path) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        learn_in(tmp_path, setting, 2, FailsAt(0, 0, fail))


@pytest.mark.parametrize(
    ("side", "expected"),
    [(8, [["a", "b", "c", "d"]]), (512, [["a", "b", "c"], ["d"]]), (2048, [["a"], ["b"], ["c"], ["d"]])],
)
def test_on_a_cpu_as_many_tasks_together_as_stay_in_memory_that_is_used_again(
    side: int, expected: list[list[str]]
) -> None:
    image = torch.empty(1, dtype=torch.uint8).expand(1, 3, side, side)
    parts = {"a": image, "b": image, "c": image.expand(2, 3, side, side), "d": image.expand(4, 3, side, side)}
    assert passes(parts) == expected


def test_half_precision_takes_twice_as_many_images_at_a_time() -> None:
    image = torch.empty(1, dtype=torch.uint8).expand(1, 3, 1024, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert passes(dict.fromkeys("abc", image)) == [["a", "b"], ["c"]]
    assert passes(dict.fromkeys("abc", image)) == [["a"], ["b"], ["c"]]


def test_passes_on_a_gpu_take_all() -> None:
    image = torch.empty(64, 3, 2048, 2048, device="meta")
    assert passes({"a": image, "b": image}) == [["a", "b"]]


def test_auto_learns_what_any_choice_does(setting: Setting) -> None:
    torch.testing.assert_close(fit(setting, 5, fuse_tasks="auto").raw, fit(setting, 5, fuse_tasks=False).raw)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_rate_falls_as_the_schedule_says(setting: Setting, decay: str) -> None:
    rates: list[float] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    fit(setting, 4, optimizer=partial(Recorder, lr=0.5), schedule=Schedule(steps=4, decay=decay, average=0, patience=0))
    factors = {"constant": [1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.853553, 0.5, 0.146447]}
    assert rates == pytest.approx([0.5 * factor for factor in factors[decay]], rel=1e-5)


@pytest.mark.parametrize(("average", "counted"), [(0, 1), (0.25, 1), (0.5, 2), (1, 4)])
def test_the_result_is_the_mean_of_the_last_iterates(setting: Setting, average: float, counted: int) -> None:
    # The schedule looks at the run's own number of steps: four runs give the four iterates.
    iterates = [fit(setting, steps).raw for steps in range(1, 5)]
    found = fit(setting, 4, schedule=Schedule(steps=4, decay="constant", average=average, patience=0)).raw
    torch.testing.assert_close(found, torch.stack(iterates[-counted:]).mean(0))
