"""Make an expert: fine-tune the image tower against a frozen zero-shot head."""

from collections.abc import Callable
from math import cos, pi

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from adamerge.errors import DataError


class FineTuner(pl.LightningModule):
    """Cross-entropy of the image tower's zero-shot logits, AdamW, linear warm-up then cosine to zero.

    Args:
        encoder: uint8 images (B, 3, H, W) → features (B, d); its parameters are trained.
        head: Frozen zero-shot head, (C, d), logit scale included.
        lr: Peak learning rate.
        weight_decay: AdamW's, on every parameter.
        warmup_steps: Steps of the linear warm-up.
        augment: Applied to uint8 images first, or None.

    Source: the recipe of the task_vectors experts (arXiv:2212.04089), whose defaults are in conf/finetune.yaml.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Tensor,
        *,
        lr: float,
        weight_decay: float,
        warmup_steps: int,
        augment: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head, persistent=False)
        self._lr, self._weight_decay, self._warmup_steps = lr, weight_decay, warmup_steps
        self._augment = augment

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self._augment is not None:
            images = torch.stack([self._augment(image) for image in images])
        features = normalize(self.encoder(images).float(), dim=-1)
        loss = cross_entropy(features @ self.get_buffer("head").T, labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        total = int(self.trainer.estimated_stepping_batches)
        warmup = min(self._warmup_steps, total)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + cos(pi * (step - warmup) / max(1, total - warmup)))

        optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=self._lr, weight_decay=self._weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def finetune(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    head: Tensor,
    *,
    make_trainer: Callable[..., pl.Trainer],
    batch_size: int,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    crop_scale: float,
    seed: int,
) -> dict[str, Tensor]:
    """Fine-tune ``encoder`` in place and leave it frozen again.

    Args:
        encoder: As ``FineTuner`` takes it.
        images: uint8 (N, 3, H, W).
        labels: (N,), row numbers of the head.
        head: (C, d), logit scale included.
        make_trainer: Makes the Trainer, which owns epochs, precision, device and gradient clipping.
        batch_size: Images per step.
        lr: Peak learning rate.
        weight_decay: AdamW's.
        warmup_steps: Steps of the linear warm-up.
        crop_scale: Smallest area of the random resized crop, as a fraction; 1 leaves images as they are.
        seed: Of shuffling and augmentation.

    Returns:
        The encoder's parameters by name, on the CPU.

    Raises:
        DataError: If there are fewer images than one batch needs.
    """
    if len(images) < 1:
        raise DataError("there is no labelled image to fine-tune on.")
    pl.seed_everything(seed, workers=True, verbose=False)
    data = TensorDataset(images, labels)
    shuffle = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        data, batch_size=batch_size, shuffle=True, drop_last=len(images) >= batch_size, generator=shuffle
    )
    encoder.requires_grad_(True)
    tuner = FineTuner(
        encoder,
        head,
        lr=lr,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        augment=_random_crop(images.shape[-1], crop_scale) if crop_scale < 1 else None,
    )
    make_trainer(enable_checkpointing=False, logger=False).fit(tuner, loader)
    encoder.eval().requires_grad_(False).to("cpu")
    return {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}


def _random_crop(size: int, crop_scale: float) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    return v2.RandomResizedCrop(size, scale=(crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
