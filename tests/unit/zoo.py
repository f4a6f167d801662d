"""A toy zoo: a small image tower, three experts, heads and images."""

from dataclasses import dataclass

import torch
from reference import layerwise, tower
from torch import Tensor, nn

from adamerge.bank import ParameterBank


@dataclass(frozen=True)
class Zoo:
    """Everything that an implementation of AdaMerging starts from.

    Attributes:
        network: Frozen tower; images (B, 3, 8, 8) → features (B, 12).
        pretrained: θ₀ by parameter name.
        experts: One such dict per task.
        heads: Per task (C, 12), times the logit scale.
        batches: ``batches[step][task]``: two batches of four images.
        bank: θ₀ and τ of the same.
    """

    network: nn.Module
    pretrained: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    heads: list[Tensor]
    batches: list[list[list[Tensor]]]
    bank: ParameterBank

    def reference_gradient(self, raw: Tensor, constraint: str, granularity: str, step: int = 0) -> Tensor:
        return layerwise.gradient(
            self.network,
            self.pretrained,
            self.experts,
            self.heads,
            self.batches[step],
            raw,
            constraint=constraint,
            granularity=granularity,
        )


def make_zoo(dtype: torch.dtype = torch.float32, *, num_tasks: int = 3, steps: int = 1) -> Zoo:
    """The same zoo in any dtype: everything is drawn in float32 and then widened."""
    network = tower.make_network()
    experts = tower.make_experts(network, num_tasks)
    network = network.to(dtype)
    experts = [{key: tensor.to(dtype) for key, tensor in expert.items()} for expert in experts]
    pretrained = dict(tower.state(network))
    batches = [
        [[images.to(dtype) for images in of_task] for of_task in of_step]
        for of_step in tower.make_batches(steps, num_tasks)
    ]
    bank = ParameterBank.from_experts(
        pretrained, {f"task{k}": expert for k, expert in enumerate(experts)}, list(pretrained), dtype=dtype
    )
    heads = [head.to(dtype) for head in tower.make_heads(num_tasks)]
    return Zoo(network, pretrained, experts, heads, batches, bank)


def make_bank(pretrained: dict[str, Tensor], experts: list[dict[str, Tensor]], **options: object) -> ParameterBank:
    """A bank of all keys; tasks are called a, b, c, …"""
    names = "abcdefgh"[: len(experts)]
    return ParameterBank.from_experts(
        pretrained,
        dict(zip(names, experts, strict=True)),
        list(pretrained),
        **options,  # type: ignore[arg-type]
    )
