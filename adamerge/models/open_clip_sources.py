"""Where an open_clip architecture and its weights come from: files, registered names, tags, the hub."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from adamerge.errors import CheckpointError, ConfigError
from adamerge.models.protocol import ModelSpec

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_HUB, _FOLDER = "hf-hub:", "local-dir:"


@dataclass(frozen=True)
class Architecture:
    """An open_clip model config, the preprocessing that was found beside it, and the files read for it."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    tokenizer_source: str  # what open_clip.get_tokenizer takes; empty: the tokenizer follows from model_cfg
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Weights:
    """A local weight file and the preprocessing its source states."""

    file: Path
    preprocess_cfg: dict[str, Any]


def _inside(root: Path, name: str, option: str) -> Path:
    """``root / name``, which may not lie outside ``root``; links inside ``root`` may lead anywhere."""
    path = Path(name)
    if not path.is_absolute() and ".." in path.parts:
        raise ConfigError(
            f"{option}: '{name}' leaves the suite's folder {root}. Put the file inside, or name it absolutely."
        )
    return root / path


def find_architecture(name: str, root: Path) -> Architecture:
    """The architecture called ``name``: a JSON below ``root``, a registered name, ``hf-hub:…`` or ``local-dir:…``."""
    if name.endswith(".json"):
        file = _inside(root, name, "model.arch")
        config = _read_config(file)
        return Architecture(config.get("model_cfg", config), config.get("preprocess_cfg", {}), "", {"arch": file})

    import open_clip

    if name.startswith((_HUB, _FOLDER)):
        config = _named_config(name, root)
        source = name if name.startswith(_HUB) else f"{_FOLDER}{root / name.removeprefix(_FOLDER)}"
        return Architecture(config.get("model_cfg", config), config.get("preprocess_cfg", {}), source, {})
    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=5, cutoff=0.3)
        raise ConfigError(
            f"model.arch: open_clip knows no '{name}'; close to it are {', '.join(close) or 'none'}. Choose one of "
            "open_clip.list_models(), or name a JSON file in the suite's folder."
        )
    model_cfg = open_clip.get_model_config(name)
    return Architecture({} if model_cfg is None else model_cfg, {}, name, {})


def _read_config(file: Path) -> dict[str, Any]:
    """An open_clip model config, bare or inside an open_clip_config.json."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such model config. Put it there, or correct model.arch in suite.yaml.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a JSON file ({error}). Correct it.") from error
    if isinstance(config, dict):
        model_cfg = config.get("model_cfg", config)
        if isinstance(model_cfg, dict) and {"embed_dim", "vision_cfg", "text_cfg"} <= model_cfg.keys():
            return config
    raise ConfigError(
        f"{file}: expected an open_clip model config with embed_dim, vision_cfg and text_cfg. Write it as the files in "
        "open_clip/model_configs are."
    )


def _named_config(name: str, root: Path) -> dict[str, Any]:
    """The open_clip_config.json of a hub repository or a local folder."""
    if name.startswith(_FOLDER):
        return _read_config(_inside(root, name.removeprefix(_FOLDER), "model") / "open_clip_config.json")
    return _read_config(_download(name, "open_clip_config.json"))


def _download(name: str, filename: str | None) -> Path:
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        return Path(download_pretrained_from_hf(name.removeprefix(_HUB), filename=filename))
    except Exception as error:
        raise CheckpointError(
            f"'{name}': cannot be downloaded ({first_line(error)}). Check the name and the network, or give a file."
        ) from error


def find_weights(spec: ModelSpec, arch: Architecture, root: Path) -> Weights:
    """The weight file, downloaded if need be, after everything known beforehand about its GELU was compared."""
    name = spec.pretrained
    if name.startswith((_HUB, _FOLDER)):
        config = _named_config(name, root)
        check_gelu(spec, arch, _gelu_in_config(config))
        if name.startswith(_HUB):
            return Weights(_download(name, None), config.get("preprocess_cfg", {}))
        folder = _inside(root, name.removeprefix(_FOLDER), "model.pretrained")
        files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
        preferred = [file for file in files if file.name.startswith("open_clip_")] or files
        if not preferred:
            raise CheckpointError(f"{folder}: no weight file in it. Put open_clip_model.safetensors there.")
        return Weights(max(preferred, key=lambda file: file.suffix == ".safetensors"), config.get("preprocess_cfg", {}))

    file = _inside(root, name, "model.pretrained")
    if file.is_file():
        beside = file.parent / "open_clip_config.json"
        config = _read_config(beside) if beside.is_file() else {}
        check_gelu(spec, arch, _gelu_in_config(config) if config else None)
        return Weights(file, config.get("preprocess_cfg", {}))
    if file.suffix in _WEIGHT_SUFFIXES or "/" in name:
        raise CheckpointError(f"{file}: no such weight file. Put it there, or correct model.pretrained in suite.yaml.")
    return _find_tag(spec, arch)


def _find_tag(spec: ModelSpec, arch: Architecture) -> Weights:
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    tag = get_pretrained_cfg(spec.arch, spec.pretrained)
    if not tag:
        tags = list_pretrained_tags_by_model(spec.arch)
        raise ConfigError(
            f"model.pretrained: '{spec.pretrained}' is neither a file in the suite's folder nor a tag of {spec.arch}, "
            f"which has {', '.join(sorted(tags)) or 'none'}. Name one of them, a file or hf-hub:OWNER/NAME."
        )
    check_gelu(spec, arch, bool(tag.get("quick_gelu", False)))
    try:
        file = Path(download_pretrained(tag))
    except Exception as error:
        raise CheckpointError(
            f"tag '{spec.pretrained}' of {spec.arch}: cannot be downloaded ({first_line(error)}). Check the network, "
            "or give a file in model.pretrained."
        ) from error
    return Weights(file, {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key)})


def _gelu_in_config(config: dict[str, Any]) -> bool:
    return bool(config.get("model_cfg", config).get("quick_gelu", False))


def gelu_in_metadata(file: Path) -> bool | None:
    """What a safetensors file says under ``quick_gelu``: whether it was trained with it; None if it does not say."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as content:
        value = (content.metadata() or {}).get("quick_gelu")
    return None if value is None else value.lower() == "true"


def check_gelu(spec: ModelSpec, arch: Architecture, trained: bool | None) -> None:
    """Refuse weights trained with QuickGELU (``trained``) in an architecture without it, or the reverse."""
    computed = bool(arch.model_cfg.get("quick_gelu", False))
    if trained is None or trained == computed:
        return
    names = {True: "QuickGELU", False: "GELU"}
    if spec.arch.endswith(".json"):
        remedy = f'Write "quick_gelu": {str(trained).lower()} in {spec.arch}.'
    elif trained:
        remedy = f"Set model.arch to {spec.arch}-quickgelu."
    else:
        remedy = f"Set model.arch to {spec.arch.removesuffix('-quickgelu')}."
    raise ConfigError(
        f"model.arch '{spec.arch}' computes {names[computed]}, but model.pretrained '{spec.pretrained}' was trained "
        f"with {names[trained]}. {remedy}"
    )


def first_line(error: Exception) -> str:
    """What a foreign error says, without the rest of its page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
