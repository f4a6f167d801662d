"""Make the embedded suite's weights again from nothing, or check a built suite.

python scripts/build_mini.py --seed 0 --out adamerge/tasks/mini      # about eight minutes on two cores
python scripts/build_mini.py --out adamerge/tasks/mini --check       # the table and the requirements
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import open_clip
import torch
import yaml
from check_mini import ARCHITECTURE, check, new_model, prepare
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamerge.cli import main as adamerge
from adamerge.files import atomic_file
from adamerge.tasks.mini import TASKS
from adamerge.tasks.mini.store import write_parquet
from adamerge.tasks.mini.style import CATALOGUE, render

CAPTIONS = ("{}", "a photo of {}", "a picture of {}", "an image of {}.")
EXPERT_SEED = 1000  # the experts' images: seed 1000 + build seed, apart from the two splits


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a build; the same for every seed."""

    pictures: int = 3000  # per task, seen by the pretraining
    closeness: float = 0.25  # pretraining pictures lie up to this far on the way from catalogue to field
    generic: float = 0.2  # fraction of captions that name the kind of thing only
    wrong: float = 0.15  # fraction of captions that name another class of the same task
    steps: int = 1600
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1
    logit_scale: float = 5.0  # to start from; at CLIP's own 14 a tower this small is soon sure of wrong answers
    jitter: float = 0.15  # noise on the image tower's weights while pretraining, of their own size
    expert_images: int = 8000
    expert_epochs: int = 3
    expert_batch_size: int = 64
    expert_lr: float = 1e-4


RECIPE = Recipe()


def build(seed: int, out: Path) -> None:
    """Render, pretrain and fine-tune; write the suite to ``out``."""
    started = time.perf_counter()
    (out / "weights").mkdir(parents=True, exist_ok=True)
    if not (out / ARCHITECTURE.name).exists():
        shutil.copy(ARCHITECTURE, out)
    model = new_model(seed)
    images, captions = pretraining_pairs(seed)
    print(f"{len(images)} pictures with captions, {time.perf_counter() - started:.0f} s", flush=True)
    pretrain(model, images, captions, seed)
    print(f"pretrained, {time.perf_counter() - started:.0f} s", flush=True)
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(out / "weights" / "pretrained.safetensors") as temporary:
        save_file(state, temporary)
    for name in TASKS:
        make_expert(name, out, seed)
        print(f"expert {name}, {time.perf_counter() - started:.0f} s", flush=True)
    write_suite(out)


def write_suite(out: Path) -> None:
    """``suite.yaml`` beside the weights."""
    suite = {
        "name": "mini",
        "model": {
            "family": "open_clip",
            "arch": ARCHITECTURE.name,
            "pretrained": "weights/pretrained.safetensors",
        },
        "tasks": [
            {
                "name": name,
                "expert": f"weights/{name}.safetensors",
                "data": name,
                "templates": list(task.templates),
            }
            for name, task in TASKS.items()
        ],
    }
    (out / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False, allow_unicode=True))


def pretraining_pairs(seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures between catalogue and field, and captions as unreliable as those of the web.

    Returns:
        Images, (N, 32, 32, 3), and N captions.
    """
    rng = np.random.default_rng((7, seed))
    images, captions = [], []
    for task in TASKS.values():
        for _ in range(RECIPE.pictures):
            label = int(rng.integers(len(task.classes)))
            style = CATALOGUE.toward(task.field, RECIPE.closeness * rng.uniform())
            images.append(render(task.draw_print or task.draw, label, rng, style))
            luck = rng.uniform()
            if luck < RECIPE.wrong:
                label = int(rng.integers(len(task.classes)))
            thing = task.kind if luck > 1 - RECIPE.generic else task.phrase.format(task.classes[label])
            captions.append(CAPTIONS[rng.integers(len(CAPTIONS))].format(thing))
    return np.stack(images), captions


def pretrain(model: nn.Module, images: NDArray[np.uint8], captions: list[str], seed: int) -> None:
    """Contrastive learning; equal captions in a batch count as one text with several images."""
    unique, index = np.unique(captions, return_inverse=True)
    tokens = open_clip.get_tokenizer(ARCHITECTURE.stem)(unique.tolist())
    pixels, texts = torch.from_numpy(images), torch.from_numpy(index)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(RECIPE.logit_scale))
    optimizer = torch.optim.AdamW(decayed(model, RECIPE.weight_decay), betas=(0.9, 0.98), fused=True)
    model.train()
    for step, rows in enumerate(batches(len(pixels), RECIPE.batch_size, RECIPE.steps, seed)):
        present, target = texts[rows].unique(return_inverse=True)
        owners = nn.functional.one_hot(target, len(present)).float()  # (images, texts)
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.lr * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / RECIPE.steps)))
        optimizer.zero_grad()
        with jittered(model.visual, RECIPE.jitter):
            image_features = model.encode_image(prepare(pixels[rows]), normalize=True)
            text_features = model.encode_text(tokens[present], normalize=True)
            logits = model.logit_scale.exp() * image_features @ text_features.T
            loss = cross_entropy(logits, target) + cross_entropy(logits.T, (owners / owners.sum(0)).T)
            (loss / 2).backward()
        optimizer.step()
    model.eval()


@contextmanager
def jittered(tower: nn.Module, amount: float) -> Iterator[None]:
    """Gaussian noise of ``amount`` times its root mean square on every parameter, taken off again at the end.

    A tower that has learned under it bears the steps of eight experts at once, as a large CLIP does.
    """
    kept = [parameter.detach().clone() for parameter in tower.parameters()]
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += torch.randn_like(parameter) * amount * parameter.square().mean().sqrt()
    yield
    with torch.no_grad():
        for parameter, value in zip(tower.parameters(), kept, strict=True):
            parameter.copy_(value)


def make_expert(name: str, out: Path, seed: int) -> None:
    """Run ``adamerge finetune`` on pictures of one task that are in neither of its splits."""
    with TemporaryDirectory() as folder:
        write_parquet(TASKS[name], EXPERT_SEED + seed, RECIPE.expert_images, Path(folder, "train.parquet"))
        steps = RECIPE.expert_epochs * (RECIPE.expert_images // RECIPE.expert_batch_size)
        adamerge(
            [
                "finetune",
                f"seed={seed}",
                f"model.arch={out / ARCHITECTURE.name}",
                f"model.pretrained={out / 'weights' / 'pretrained.safetensors'}",
                f"data.root={folder}",
                f"templates={json.dumps(TASKS[name].templates)}",
                f"output={out / 'weights' / name}.safetensors",
                f"lr={RECIPE.expert_lr}",
                f"batch_size={RECIPE.expert_batch_size}",
                f"trainer.max_epochs={RECIPE.expert_epochs}",
                f"warmup_steps={steps // 10}",
                "crop_scale=1",
                "trainer.accelerator=cpu",
                "+trainer.enable_progress_bar=false",
                f"paths.cache_dir={folder}",
            ]
        )


def decayed(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` times row numbers, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(count, generator=generator)
        yield order[:batch_size]
        order = order[batch_size:]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the suite")
    parser.add_argument("--check", action="store_true", help="measure what is in --out instead of building it")
    arguments = parser.parse_args()
    if arguments.check:
        return 0 if check(arguments.out) else 1
    build(arguments.seed, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
