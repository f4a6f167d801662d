"""A folder suite that is made in a second: a two-block CLIP, three experts, images that are easy to tell apart."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

TASKS = {"colours": ("red", "green", "blue"), "halves": ("left", "right"), "sizes": ("small", "middling", "large")}
ARCH = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def make_suite(root: Path, *, images: int = 24, labels: bool = True, seed: int = 0) -> Path:
    """Write the suite to ``root`` and return it; experts are the pretrained model plus a little noise."""
    import open_clip

    root.mkdir(parents=True, exist_ok=True)
    (root / "toy-arch.json").write_text(json.dumps(ARCH))
    torch.manual_seed(seed)
    state = open_clip.model.CLIP(**ARCH).state_dict()
    (root / "weights").mkdir(exist_ok=True)
    save_file(state, root / "weights" / "pretrained.safetensors")
    tower = {key: tensor for key, tensor in state.items() if key.startswith("visual.")}
    for task in TASKS:
        expert = {key: tensor + 0.05 * max(tensor.norm(), 1) * _direction(tensor) for key, tensor in tower.items()}
        save_file(expert, root / "weights" / f"{task}.safetensors")
        for split in ("train", "test"):
            write_images(root / "data" / task, split, task, images, labels=labels, seed=seed + (split == "test"))
    entries = [
        {"name": task, "expert": f"weights/{task}.safetensors", "data": f"data/{task}", "templates": ["a photo of {}."]}
        | ({} if labels else {"classes": list(names)})
        for task, names in TASKS.items()
    ]
    model = {"family": "open_clip", "arch": "toy-arch.json", "pretrained": "weights/pretrained.safetensors"}
    (root / "suite.yaml").write_text(yaml.safe_dump({"name": "toy", "model": model, "tasks": entries}))
    return root


def _direction(tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(tensor)
    return noise / noise.norm()


def write_images(folder: Path, split: str, task: str, count: int, *, labels: bool = True, seed: int = 0) -> None:
    """Write ``count`` images of a task as ``<split>.parquet`` in the layout of Hugging Face ``datasets``."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = TASKS[task]
    columns = {"image": [], "label": []}
    for index in range(count):
        label = index % len(names)
        columns["image"].append(draw(task, label, rng))
        columns["label"].append(label)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    if not labels:
        del columns["label"], features["label"]
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(folder / f"{split}.parquet")


def draw(task: str, label: int, rng: np.random.Generator) -> Image.Image:
    pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
    if task == "colours":
        pixels[..., label] += 140
    elif task == "halves":
        pixels[:, 8 * label : 8 * label + 8] += 140
    else:
        edge = (2, 4, 7)[label]
        pixels[8 - edge : 8 + edge, 8 - edge : 8 + edge] += 140
    return Image.fromarray(pixels)
