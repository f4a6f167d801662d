"""CLIP models of open_clip: built from a JSON or a registered name, loaded strictly, frozen."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adamerge.bank.checkpoints import hash_tensors, read_checkpoint
from adamerge.errors import ConfigError, KeyMismatchError, shortlist
from adamerge.models.layers import use_lean_layers
from adamerge.models.open_clip_sources import check_gelu, find_architecture, find_weights, first_line, gelu_in_metadata
from adamerge.models.protocol import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

_VISUAL = "visual."
_TEXT_BATCH = 256


class ImageEncoder(nn.Module):
    """The image tower behind its normalisation: images (B, 3, H, W), uint8 or normalised floats, to features (B, d).

    The arithmetic on uint8 images is ToTensor's and Normalize's, in their order; features equal open_clip's up to the
    order of float32 sums (``models.layers``).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        use_lean_layers(visual)
        self.visual = visual
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        features = self.visual(images)
        return features[0] if isinstance(features, tuple) else features  # towers with output_tokens return both


@dataclass(frozen=True, eq=False)
class OpenClipModel:
    """A pretrained open_clip model; the members are described in ``models.protocol.ClipModel``."""

    arch: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    files: Mapping[str, Path]
    state_dict: dict[str, Tensor]
    merge_keys: tuple[str, ...]
    image_encoder: ImageEncoder
    logit_scale: float
    network: nn.Module
    tokenizer_source: str
    family: str = "open_clip"

    def resize(self, image: "Image") -> Tensor:
        import numpy as np

        for step in self._resize_steps:
            image = step(image)
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def encode_text(self, texts: Sequence[str], *, device: torch.device | str = "cpu") -> Tensor:
        network = self.network
        tensors = {
            name: tensor.to(device)
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
            if not name.startswith(_VISUAL)
        }
        with torch.no_grad():
            batches = [
                torch.func.functional_call(network, tensors, kwargs={"text": batch.to(device)})[1].float().cpu()
                for batch in self._tokenize(list(texts)).split(_TEXT_BATCH)
            ]
        return torch.cat(batches)

    @property
    def preprocess_hash(self) -> str:
        cfg = {key: value for key, value in self.preprocess_cfg.items() if key not in ("mean", "std")}
        versions = [importlib.metadata.version(name) for name in ("open_clip_torch", "torchvision", "pillow")]
        return _hash_json([cfg, versions])

    @property
    def text_hash(self) -> str:
        return self._text_hash

    @cached_property
    def _text_hash(self) -> str:
        text = {key: value for key, value in self.state_dict.items() if not key.startswith(_VISUAL)}
        settings = {key: value for key, value in self.model_cfg.items() if key != "vision_cfg"}
        version = importlib.metadata.version("open_clip_torch")
        return _hash_json([hash_tensors(text), settings, self.tokenizer_source, version])

    @cached_property
    def _resize_steps(self) -> list[Callable]:
        from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2

        steps: list[Callable] = image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False).transforms  # pyright: ignore[reportAttributeAccessIssue]
        end = next(index for index, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        return steps[:end]

    @cached_property
    def _tokenize(self) -> Callable[[list[str]], Tensor]:
        import open_clip

        if self.tokenizer_source:
            return open_clip.get_tokenizer(self.tokenizer_source)
        text_cfg = self.model_cfg["text_cfg"]
        length = text_cfg.get("context_length", open_clip.factory.DEFAULT_CONTEXT_LENGTH)
        options = text_cfg.get("tokenizer_kwargs") or {}
        if name := text_cfg.get("hf_tokenizer_name"):
            mode = text_cfg.get("tokenizer_mode")
            return open_clip.tokenizer.HFTokenizer(name, context_length=length, tokenizer_mode=mode, **options)
        return open_clip.SimpleTokenizer(context_length=length, **options)


def load_clip(spec: ModelSpec, *, root: Path) -> OpenClipModel:
    """The pretrained CLIP of a suite: float32, frozen, in evaluation mode, on the CPU.

    Args:
        spec: Architecture and weights.
        root: The folder at which relative paths in ``spec`` start, and which they may not leave.

    Raises:
        ConfigError: If the family, architecture or tag is unknown, a path leaves ``root``, or the weights were trained
            with the other GELU than the architecture computes (found before anything is downloaded).
        CheckpointError: If the weights cannot be had or read.
        KeyMismatchError: If the weights do not fit the architecture.
    """
    if spec.family != "open_clip":
        raise ConfigError(f"model.family: expected 'open_clip', found '{spec.family}'.")
    arch = find_architecture(spec.arch, root)
    weights = find_weights(spec, arch, root)
    stored = read_checkpoint(weights.file)
    check_gelu(spec, arch, gelu_in_metadata(weights.file))
    network = _build(arch.model_cfg, spec.arch)
    state_dict = _fit(stored, network, spec, weights.file)
    widened = {key: value.float() if value.is_floating_point() else value for key, value in state_dict.items()}
    network.load_state_dict(widened, strict=True, assign=True)
    network.requires_grad_(False).eval()

    preprocess_cfg = _preprocess_cfg(weights.preprocess_cfg | arch.preprocess_cfg, network)
    encoder = ImageEncoder(network.get_submodule("visual"), preprocess_cfg["mean"], preprocess_cfg["std"]).eval()
    trainable = (name for name, value in encoder.named_parameters() if value.is_floating_point())
    return OpenClipModel(
        arch=spec.arch,
        model_cfg=arch.model_cfg,
        preprocess_cfg=preprocess_cfg,
        files={**arch.files, "pretrained": weights.file},
        state_dict=state_dict,
        merge_keys=tuple(trainable),
        image_encoder=encoder,
        logit_scale=float(widened["logit_scale"].exp()),
        network=network,
        tokenizer_source=arch.tokenizer_source,
    )


class _NoRandomInit(TorchFunctionMode):
    """Leaves new parameters as allocated: all of them are loaded, and the global generator stays untouched."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        if func in (torch.rand, torch.randn):
            return torch.empty(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
        return func(*args, **kwargs)


def _build(model_cfg: dict[str, Any], name: str) -> nn.Module:
    """The network with unset weights, of the class that ``open_clip.create_model`` chooses."""
    from open_clip.model import CLIP, CustomTextCLIP

    config = deepcopy(model_cfg)
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        raise ConfigError(f"model.arch: '{name}' is a CoCa captioning model, not a CLIP. Choose a ViT of open_clip.")
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    try:
        with _NoRandomInit():
            return (CustomTextCLIP if custom_text else CLIP)(**config)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model.arch: open_clip cannot build '{name}' ({first_line(error)}). Correct its vision_cfg and text_cfg."
        ) from error


def _fit(stored: dict[str, Tensor], network: nn.Module, spec: ModelSpec, file: Path) -> dict[str, Tensor]:
    """The stored tensors in the network's order, after open_clip's own historical differences are levelled.

    Levelled: three scalars that OpenAI's archives carry beside the weights, text keys without ``text.`` where the
    network keeps a text module, and a logit scale of shape () or (1,).
    """
    expected = network.state_dict()
    found = {
        key: value for key, value in stored.items() if key not in ("input_resolution", "context_length", "vocab_size")
    }
    if "text_projection" in found and "text.text_projection" in expected:
        found = {f"text.{key}" if f"text.{key}" in expected else key: value for key, value in found.items()}
    for key in ("logit_scale", "logit_bias"):
        if key in found and key in expected and found[key].numel() == 1:
            found[key] = found[key].reshape(expected[key].shape)
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    problems = [
        f"{label} {len(keys)} ({shortlist(keys)})"
        for label, keys in (("missing keys:", missing), ("unknown keys:", extra), ("other shapes:", shapes))
        if keys
    ]
    if problems:
        raise KeyMismatchError(
            f"{file} does not fit architecture '{spec.arch}': {'; '.join(problems)}. Choose the model.arch it was "
            "trained with; a full CLIP is needed, text tower included."
        )
    return {key: found[key] for key in expected}


def _preprocess_cfg(overrides: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """open_clip's defaults, what the weights say, and the size that the image tower takes."""
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = merge_preprocess_dict(asdict(PreprocessCfg()), overrides)
    if (size := getattr(network.get_submodule("visual"), "image_size", None)) is not None:
        cfg["size"] = size
    return {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()}


def _hash_json(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
