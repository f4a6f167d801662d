"""The merged model as files that open_clip reads without adamerge, and the heads that go with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adamerge.errors import KeyMismatchError, OutputError, ShapeError, shortlist
from adamerge.files import atomic_directory, atomic_file

if TYPE_CHECKING:
    from adamerge.models.protocol import ClipModel

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
CARD_NAME = "README.md"


def write_open_clip_folder(directory: Path, clip: "ClipModel", merged: Mapping[str, Tensor], *, card: str) -> None:
    """Write the full CLIP with ``merged`` in the place of its image tower, for open_clip's ``local-dir:``.

    The folder holds the model's and the preprocessing's configuration, all weights in float32 (tensors that are not
    floating point as they are), the model card, and the tokenizer's files where the text tower names a Hugging Face
    tokenizer (open_clip then looks for them here). It appears whole or not at all.

    Args:
        directory: The folder to write; one that stands there is replaced.
        merged: Tensors by key of ``clip.state_dict``; what is missing keeps its pretrained value.
        card: Text of the folder's README.md.

    Raises:
        KeyMismatchError: If ``merged`` has keys that the CLIP lacks.
        ShapeError: If a merged tensor has another shape than the pretrained one.
        OutputError: If the folder cannot be written.
    """
    pretrained = clip.state_dict
    if unknown := merged.keys() - pretrained.keys():
        raise KeyMismatchError(
            f"the merged weights have {len(unknown)} keys that the pretrained model lacks ({shortlist(unknown)}). "
            "Merge only keys of clip.merge_keys."
        )
    if wrong := [key for key, tensor in merged.items() if tensor.shape != pretrained[key].shape]:
        raise ShapeError(
            f"{len(wrong)} merged tensors have another shape than the pretrained ones: {shortlist(wrong)}."
        )
    config = {"model_cfg": clip.model_cfg, "preprocess_cfg": clip.preprocess_cfg}
    with atomic_directory(directory) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD_NAME).write_text(card, encoding="utf-8")
        _write_tokenizer(temporary, clip)
        weights = {key: merged.get(key, tensor) for key, tensor in pretrained.items()}
        save_tensors(temporary / WEIGHTS_NAME, {key: _at_rest(tensor) for key, tensor in weights.items()})
        # safetensors makes files that only their owner may read.
        (temporary / WEIGHTS_NAME).chmod((temporary / CONFIG_NAME).stat().st_mode)


def write_heads(path: Path, heads: Mapping[str, Tensor], class_names: Mapping[str, Sequence[str]]) -> None:
    """Write the zero-shot heads, a tensor (C, d) per task, with the class names as JSON under ``class_names``.

    Args:
        heads: Unit class vectors times CLIP's logit scale, by task.
        class_names: The C names by task, in the order of the rows.

    Raises:
        ShapeError: If a head's rows and its class names differ in number.
        OutputError: If the file cannot be written.
    """
    for task, head in heads.items():
        if head.ndim != 2 or len(head) != len(class_names[task]):
            raise ShapeError(
                f"the head of task '{task}' has the shape {tuple(head.shape)}, but there are {len(class_names[task])} "
                "class names: one row per class is needed."
            )
    names = {task: list(class_names[task]) for task in heads}
    with atomic_file(path) as temporary:
        tensors = {task: _at_rest(head) for task, head in heads.items()}
        save_tensors(temporary, tensors, {"class_names": json.dumps(names, ensure_ascii=False)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """safetensors' ``save_file`` for tensors that may share memory, with a full disk told as such.

    Raises:
        OutputError: If the file cannot be written.
    """
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.contiguous()
        separate[key] = tensor.clone() if tensor.data_ptr() in seen else tensor  # safetensors refuses tied tensors
        seen.add(tensor.data_ptr())
    try:
        save_file(separate, path, metadata={"format": "pt", **(metadata or {})})
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"cannot write {path.name} in {path.parent.parent}: {error}. Free some room or choose another place with "
            "paths.run_dir=DIR."
        ) from error


def _at_rest(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _write_tokenizer(folder: Path, clip: "ClipModel") -> None:
    """The files of a Hugging Face tokenizer, wherever the pretrained model has it from."""
    name = clip.model_cfg.get("text_cfg", {}).get("hf_tokenizer_name")
    if not name:
        return  # open_clip's own tokenizer is part of open_clip; its settings stand in text_cfg
    import open_clip

    source: str = getattr(clip, "tokenizer_source", "")  # a folder or hub model that brings the tokenizer itself
    tokenizer: Any = open_clip.get_tokenizer(source) if source else open_clip.tokenizer.HFTokenizer(name)
    tokenizer.save_pretrained(folder)
