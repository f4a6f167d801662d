"""A small CLIP image tower, experts and images to compare implementations on; plain torch, nothing of adamerge."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, PATCH, SIZE, OUTPUT = 16, 2, 2, 4, 8, 12


class Block(nn.Module):
    """Pre-norm attention and MLP, the projections of Q, K and V packed as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.in_proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        query, key, value = (
            part.view(batch, length, HEADS, -1).transpose(1, 2)  # (B, heads, N, width/heads)
            for part in self.in_proj(self.ln_1(tokens)).chunk(3, dim=-1)
        )
        attention = (query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        tokens = tokens + self.out_proj((attention @ value).transpose(1, 2).reshape(batch, length, WIDTH))
        return tokens + self.c_proj(F.gelu(self.c_fc(self.ln_2(tokens))))


class Tower(nn.Module):
    """ViT with CLIP's layout: images (B, 3, 8, 8) to features (B, 12), not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, OUTPUT) / WIDTH**0.5)
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.resblocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_post = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, N, width)
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)
        tokens = self.resblocks(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(tokens[:, 0]) @ self.proj


def make_network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen tower under the name ``visual``, every tensor random (also the LayerNorms')."""
    torch.manual_seed(seed)
    network = nn.Module()
    network.visual = Tower()
    network.forward = network.visual.forward
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return network.to(dtype)


def make_experts(network: nn.Module, num_tasks: int, *, seed: int = 799, size: float = 0.2) -> list[dict[str, Tensor]]:
    """Experts at a distance of ``size`` times each tensor's norm, in random directions.

    With the default seed no λ gradient of the tests in float32 is a sum that cancels to less than a 150th of its terms.
    """
    generator = torch.Generator().manual_seed(seed)
    experts = []
    for _ in range(num_tasks):
        expert = {}
        for key, tensor in network.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            expert[key] = tensor + (size * tensor.double().norm() * noise / noise.norm()).to(tensor.dtype)
        experts.append(expert)
    return experts


def make_heads(
    num_tasks: int, *, seed: int = 2, scale: float = 10.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Unit class embeddings times a logit scale, with 3, 4, 5, … classes."""
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.randn(3 + task, OUTPUT, generator=generator, dtype=torch.float64) for task in range(num_tasks)]
    return [(scale * F.normalize(head, dim=1)).to(dtype) for head in heads]


def make_batches(
    steps: int,
    num_tasks: int,
    *,
    per_task: int = 2,
    images: int = 4,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> list[list[list[Tensor]]]:
    """``batches[step][task]``: ``per_task`` batches of normalised images, (images, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            [
                torch.randn(images, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
                for _ in range(per_task)
            ]
            for _ in range(num_tasks)
        ]
        for _ in range(steps)
    ]


def state(network: nn.Module) -> Mapping[str, Tensor]:
    """The network's own weights: θ₀."""
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}
