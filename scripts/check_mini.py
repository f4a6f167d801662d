"""Measure a built mini suite, with code of its own: autograd through Σ λτ, nothing of the merging package."""
# ruff: noqa: T201

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from adamerge.tasks.mini import ROOT, TASKS, MiniTask, render_task
from adamerge.tasks.mini.registry import TEST_SEED

ARCHITECTURE = ROOT / "ViT-mini-16-32.json"
StateDict = dict[str, Tensor]


def new_model(seed: int) -> nn.Module:
    """The untrained CLIP."""
    open_clip.add_model_config(ARCHITECTURE)
    torch.manual_seed(seed)
    return open_clip.create_model(ARCHITECTURE.stem)


def prepare(images: Tensor) -> Tensor:
    """uint8 (B, 32, 32, 3) to CLIP's normalised (B, 3, 32, 32)."""
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def zero_shot_head(model: nn.Module, task: MiniTask) -> Tensor:
    """Unit text features times the logit scale, (C, D)."""
    texts = [template.format(name) for name in task.classes for template in task.templates]
    features = model.encode_text(open_clip.get_tokenizer(ARCHITECTURE.stem)(texts), normalize=True)
    mean = features.view(len(task.classes), len(task.templates), -1).mean(1)
    return normalize(mean, dim=-1) * model.logit_scale.exp()


@dataclass(frozen=True)
class Suite:
    """A built suite in memory, with every task's test images."""

    model: nn.Module
    base: StateDict  # vision tower, without the prefix
    vectors: dict[str, Tensor]  # (K, …) by tensor
    heads: list[Tensor]  # (C, D) each
    tests: list[tuple[Tensor, Tensor]]  # images, labels

    @classmethod
    def read(cls, root: Path) -> Suite:
        """From the folder that ``build`` wrote."""
        model = new_model(0).eval()
        model.load_state_dict(load_file(root / "weights" / "pretrained.safetensors"))
        base = {key: value.detach().clone() for key, value in model.visual.state_dict().items()}
        experts = [load_file(root / "weights" / f"{name}.safetensors") for name in TASKS]
        vectors = {
            key: torch.stack([expert[f"visual.{key}"].float() - base[key] for expert in experts]) for key in base
        }
        heads = [zero_shot_head(model, task) for task in TASKS.values()]
        tests = []
        for name in TASKS:
            images, labels = render_task(name, TEST_SEED, 500)
            tests.append((prepare(torch.from_numpy(images)), torch.from_numpy(labels)))
        return cls(model, base, vectors, heads, tests)

    def features(self, weights: StateDict, images: Tensor) -> Tensor:
        """Unit features, (B, D)."""
        return normalize(functional_call(self.model.visual, weights, (images,)), dim=-1)

    @torch.no_grad()
    def score(self, weights: StateDict) -> list[float]:
        """Accuracy per task."""
        scores = []
        for head, (images, labels) in zip(self.heads, self.tests, strict=True):
            features = torch.cat([self.features(weights, part) for part in images.split(250)])
            scores.append(((features @ head.T).argmax(1) == labels).float().mean().item())
        return scores

    def scaled(self, coefficient: float) -> StateDict:
        """Task Arithmetic."""
        return {key: self.base[key] + coefficient * self.vectors[key].sum(0) for key in self.base}

    def expert(self, task: int) -> StateDict:
        """One expert as it is."""
        return {key: self.base[key] + self.vectors[key][task] for key in self.base}

    def adamerge(self, layerwise: bool, steps: int = 500, seed: int = 0) -> list[float]:
        """Accuracy after minimising the entropy on the test images; SPECS A1."""
        keys, num_tasks = list(self.base), len(self.heads)
        raw = torch.full((num_tasks, len(keys) if layerwise else 1), 0.3, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=1e-3)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            coefficients = raw.clamp(0, 1).expand(num_tasks, len(keys)).unbind(1)
            merged = {
                key: self.base[key] + torch.tensordot(column, self.vectors[key], 1)
                for key, column in zip(keys, coefficients, strict=True)
            }
            # two batches of 16 per task; the sum of their means is twice the mean of all 32
            picked = [images[torch.randperm(len(images), generator=generator)[:32]] for images, _ in self.tests]
            features = self.features(merged, torch.cat(picked)).split(32)
            logs = [(part @ head.T).log_softmax(-1) for part, head in zip(features, self.heads, strict=True)]
            loss = sum((-2 * (log.exp() * log).sum(-1).mean() for log in logs), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            coefficients = raw.clamp(0, 1).expand(num_tasks, len(keys)).unbind(1)
            return self.score(
                {
                    key: self.base[key] + torch.tensordot(column, self.vectors[key], 1)
                    for key, column in zip(keys, coefficients, strict=True)
                }
            )


def check(root: Path) -> bool:
    """Print the table of a built suite and whether it behaves like the real thing."""
    suite = Suite.read(root)
    singles = {round(0.05 * i, 2): suite.score(suite.scaled(0.05 * i)) for i in range(1, 11)}
    best = max(singles, key=lambda coefficient: np.mean(singles[coefficient]))
    rows = {
        "pretrained": suite.score(suite.base),
        "task arithmetic 0.3": singles[0.3],
        f"best single {best}": singles[best],
        "task-wise": suite.adamerge(layerwise=False),
        "layer-wise": suite.adamerge(layerwise=True),
        "experts": [suite.score(suite.expert(task))[task] for task in range(len(TASKS))],
    }
    print(" " * 20, *(f"{name:>8}" for name in TASKS), f"{'average':>8}")
    for title, scores in rows.items():
        print(f"{title:20}", *(f"{score:8.3f}" for score in (*scores, float(np.mean(scores)))))
    whole = math.sqrt(sum(float(value.square().sum()) for value in suite.base.values()))
    lengths = torch.stack([value.flatten(1).square().sum(1) for value in suite.vectors.values()]).sum(0).sqrt()
    print(f"{'‖τ‖ / ‖θ₀‖, %':20}", *(f"{100 * length / whole:8.1f}" for length in lengths.tolist()))

    pretrained, arithmetic, single, taskwise, layerwise, experts = map(np.mean, rows.values())
    size = sum(file.stat().st_size for file in (root / "weights").glob("*.safetensors")) / 1e6
    requirements = {
        "pretrained between 30 and 65 %": 0.30 <= pretrained <= 0.65,
        "experts above 90 %": experts > 0.90,
        "layer-wise at least 5 points above task arithmetic 0.3": layerwise >= arithmetic + 0.05,
        "layer-wise above the best single coefficient": layerwise > single,
        "layer-wise above task-wise": layerwise > taskwise,
        f"weights at most 25 MB ({size:.1f})": size <= 25,
    }
    for requirement, holds in requirements.items():
        print(f"  {'yes' if holds else 'NO '} {requirement}")
    return all(requirements.values())
