"""The gradient of the coefficients before anything is learned."""

import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from adamerge.learning.experts import autocast
from adamerge.learning.losses import TaskLosses
from adamerge.merging import Coefficients, MergedModel
from adamerge.tasks.datamodule import TaskImages


def gradient_at_start(
    model: MergedModel,
    coefficients: Coefficients,
    losses: TaskLosses,
    data: TaskImages,
    *,
    steps: int,
    device: torch.device,
    precision: str,
) -> Tensor:
    """∂L/∂λ, (K, G) on the CPU, of the mean loss of the first ``steps`` steps, all with the initial λ.

    Args:
        model: Merged model; left on ``device``.
        coefficients: Give the initial λ.
        losses: What is to be minimised.
        data: Of all ranks.
        steps: How many.
        device: Where to compute.
        precision: As Lightning's Trainer takes it.
    """
    model.to(device)
    losses.to(device)
    data.at(0)  # for what is known before the first step
    model.update(coefficients().detach().to(device))
    for step in range(steps):
        batch = move_data_to_device(data.batch(step), device)
        with autocast(device, precision):
            losses.backward(model, batch)
    return model.coefficient_gradient().cpu() / steps
