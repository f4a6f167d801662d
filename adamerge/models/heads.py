"""Zero-shot classification heads from the pretrained text tower."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.errors import CheckpointError, ConfigError
from adamerge.files import atomic_file
from adamerge.models.protocol import ClipModel


def zero_shot_heads(
    clip: ClipModel,
    prompts: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    cache_dir: Path | None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """One head per task: class embeddings averaged over templates, times the logit scale.

    Every template is filled with every class name (underscores become spaces) and encoded, L2-normalised, averaged
    over templates, L2-normalised again and multiplied by exp(logit_scale). The texts of all tasks that are not in the
    cache go through the text tower together, each distinct text once. Logits are ``head @ normalize(features)``.

    Args:
        clip: The model whose text tower reads the prompts.
        prompts: Class names and templates (each with one or more ``{}``) by task.
        cache_dir: Heads are kept in ``cache_dir/heads``, named by everything they depend on; None keeps nothing.
        device: Where the text tower runs.

    Returns:
        Float32 heads on the CPU by task, (C, d).

    Raises:
        ConfigError: If a task has no class names or no templates.
        CheckpointError: If an embedding is not finite.

    Source: SPECS C3.
    """
    for task, (class_names, templates) in prompts.items():
        if not class_names or not templates:
            missing = "class names" if not class_names else "templates"
            raise ConfigError(f"task '{task}' has no {missing}. Give 'classes' and 'templates' in suite.yaml.")
    files = {task: _cache_file(clip, *entry, cache_dir) for task, entry in prompts.items()}
    heads = {task: head for task, file in files.items() if (head := _read(file)) is not None}
    missing = {task: _fill(*entry) for task, entry in prompts.items() if task not in heads}
    if missing:
        rows = {text: None for texts in missing.values() for per_class in texts for text in per_class}
        positions = {text: row for row, text in enumerate(rows)}
        features = clip.encode_text(list(rows), device=device)
        if not bool(torch.isfinite(features).all()):
            raise CheckpointError("the pretrained text tower gives NaN or Inf. Check the pretrained weight file.")
        for task, texts in missing.items():
            index = torch.tensor([[positions[text] for text in per_class] for per_class in texts])  # (C, T)
            mean = torch.nn.functional.normalize(features[index].mean(dim=1), dim=-1)  # (C, d)
            heads[task] = mean * clip.logit_scale
            _write(files[task], heads[task])
    return {task: heads[task] for task in prompts}


def _fill(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    names = [name.replace("_", " ") for name in class_names]
    return [[template.replace("{}", name) for template in templates] for name in names]


def _cache_file(
    clip: ClipModel, class_names: Sequence[str], templates: Sequence[str], cache_dir: Path | None
) -> Path | None:
    if cache_dir is None:
        return None
    content = json.dumps(["heads-1", clip.text_hash, list(class_names), list(templates)])
    return cache_dir / "heads" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"


def _read(file: Path | None) -> Tensor | None:
    if file is None or not file.is_file():
        return None
    try:
        return load_file(file)["head"]
    except (SafetensorError, OSError, KeyError):  # a damaged cache is made again
        return None


def _write(file: Path | None, head: Tensor) -> None:
    if file is not None:
        with atomic_file(file) as temporary:
            save_file({"head": head.contiguous()}, temporary)
