"""Fine-tuning: it learns, follows its schedule, repeats itself for a seed, and leaves a frozen encoder."""

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from reference import tower
from torch import Tensor, nn

from adamerge.errors import DataError
from adamerge.learning.finetune import finetune

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)


class Encoder(nn.Module):
    """uint8 images (B, 3, 8, 8) → features (B, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = tower.make_network().visual

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images.float() / 64 - 2)


class Recorder(Callback):
    """Loss and learning rate of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def coloured(count: int = 48) -> tuple[Tensor, Tensor]:
    """Noise whose channel ``label`` is bright."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(120, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] += 110
    return images, labels


def head() -> Tensor:
    return tower.make_heads(1)[0]


def run(
    encoder: nn.Module,
    *,
    recorder: Recorder | None = None,
    epochs: int = 8,
    images: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    found, labels = coloured()
    if images is not None:
        found, labels = images, labels[: len(images)]
    make_trainer = partial(
        pl.Trainer,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[recorder] if recorder else [],
        gradient_clip_val=1.0,
    )
    options = {
        "batch_size": 16,
        "lr": 3e-3,
        "weight_decay": 0.1,
        "warmup_steps": 4,
        "crop_scale": 1.0,
        "seed": 0,
    } | options
    return finetune(encoder, found, labels, head(), make_trainer=make_trainer, **options)


@torch.no_grad()
def accuracy(encoder: nn.Module) -> float:
    images, labels = coloured()
    return ((encoder(images) @ head().T).argmax(dim=1) == labels).float().mean().item()


def test_the_loss_falls_and_the_images_are_told_apart(recorder: Recorder) -> None:
    encoder = Encoder()
    before = accuracy(encoder)
    run(encoder, recorder=recorder)
    assert len(recorder.losses) == 8 * 3
    assert recorder.losses[0] > 0.8
    assert sum(recorder.losses[-3:]) / 3 < 0.1 * recorder.losses[0]
    assert before < 0.7 < 0.95 < accuracy(encoder)


def test_the_rate_warms_up_and_falls_along_a_cosine(recorder: Recorder) -> None:
    run(Encoder(), recorder=recorder, lr=0.4)
    rates = torch.tensor(recorder.rates)
    torch.testing.assert_close(rates[:5], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.4]))
    assert (rates[4:].diff() < 0).all()
    torch.testing.assert_close(rates[14], torch.tensor(0.2))  # half-way between steps 4 and 24
    assert rates[-1] < 0.01


def test_a_warm_up_longer_than_the_run_ends_at_the_peak(recorder: Recorder) -> None:
    run(Encoder(), recorder=recorder, lr=0.3, warmup_steps=500, epochs=1)
    torch.testing.assert_close(torch.tensor(recorder.rates), torch.tensor([0.1, 0.2, 0.3]))


def test_the_encoder_is_frozen_again_and_its_weights_are_returned() -> None:
    encoder = Encoder()
    start = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    weights = run(encoder, epochs=1)
    assert list(weights) == list(start)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    for name, parameter in encoder.named_parameters():
        assert torch.equal(weights[name], parameter)
        assert weights[name].data_ptr() != parameter.data_ptr()
        assert not weights[name].requires_grad
        assert not torch.equal(weights[name], start[name]), name


@pytest.mark.parametrize("crop_scale", [1.0, 0.5])
def test_a_seed_decides(crop_scale: float) -> None:
    torch.manual_seed(7)
    first = run(Encoder(), epochs=2, crop_scale=crop_scale)
    torch.manual_seed(8)
    second = run(Encoder(), epochs=2, crop_scale=crop_scale)
    other = run(Encoder(), epochs=2, crop_scale=crop_scale, seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_crops_change_what_is_seen() -> None:
    plain, cropped = run(Encoder(), epochs=1), run(Encoder(), epochs=1, crop_scale=0.5)
    assert not any(torch.equal(plain[name], cropped[name]) for name in plain)


def test_fewer_images_than_a_batch_are_one_batch(recorder: Recorder) -> None:
    run(Encoder(), recorder=recorder, images=coloured()[0][:5], epochs=2)
    assert len(recorder.losses) == 2


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="no labelled image"):
        run(Encoder(), images=coloured()[0][:0])
