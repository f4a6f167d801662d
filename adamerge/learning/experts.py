"""What every expert says about its own task's images, computed once from the bank."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from adamerge.bank import ParameterBank
from adamerge.merging import MergedModel, Partition
from adamerge.models.hidden import HiddenStates
from adamerge.objectives import Objective

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """What Lightning's Trainer of that precision puts around a step."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


@torch.no_grad()
def expert_targets(
    network: nn.Module,
    bank: ParameterBank,
    images: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    objective: Objective,
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
) -> dict[str, dict[str, Tensor]]:
    """Features and hidden states of each task's expert, by merging with a one-hot λ: no expert is loaded again.

    Args:
        network: The image tower.
        bank: θ₀ and the experts' own task vectors, before any transform.
        images: uint8 (N, 3, H, W) by task.
        rows: Ascending indices of the images that will be asked for, by task.
        objective: Whose ``layers`` say which hidden states to keep.
        device: Where to compute.
        precision: As Lightning's Trainer takes it.
        batch_size: Images per forward pass.

    Returns:
        By task ``features`` (N, d) and ``hidden/i`` (N, L, w) for the i-th of the layers, on the CPU in the dtype of
        the network's output; rows that were not asked for are unset.
    """
    model = MergedModel(network, bank, Partition.build("task", bank.shapes))
    model.to(device)
    found: dict[str, dict[str, Tensor]] = {}
    for task, wanted in rows.items():
        one_hot = torch.zeros(bank.num_tasks, 1, device=device)
        one_hot[bank.task_names.index(task)] = 1
        model.update(one_hot)
        hidden = HiddenStates(model.network, objective.layers)
        of_task: dict[str, Tensor] = {}
        try:
            for some in wanted.split(batch_size):
                with autocast(device, precision):
                    features = model(images[task][some].to(device, non_blocking=True))
                states = {f"hidden/{i}": state for i, state in enumerate(hidden.take())}
                for name, values in {"features": features, **states}.items():
                    if name not in of_task:
                        of_task[name] = values.new_empty(len(images[task]), *values.shape[1:], device="cpu")
                    of_task[name][some] = values.cpu()
        finally:
            hidden.close()
        found[task] = of_task
    return found
