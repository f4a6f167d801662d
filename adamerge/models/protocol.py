"""What the rest of the package needs to know of a CLIP model, whatever library it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ModelSpec:
    """Which CLIP to load, as written under ``model`` in suite.yaml.

    Attributes:
        family: The library whose architecture and keys the weights have: ``open_clip``.
        arch: A JSON file relative to the suite's folder, or a name that open_clip knows.
        pretrained: A weight file relative to the suite's folder, an open_clip tag, ``hf-hub:OWNER/NAME`` or
            ``local-dir:FOLDER``.
    """

    family: str
    arch: str
    pretrained: str


class ClipModel(Protocol):
    """A frozen, pretrained CLIP: an image encoder to merge into, a text tower for the heads, a preprocessing."""

    @property
    def family(self) -> str: ...

    @property
    def arch(self) -> str: ...

    @property
    def model_cfg(self) -> dict[str, Any]:
        """The architecture, as ``model_cfg`` of an open_clip_config.json."""
        ...

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """Size, mean, standard deviation and resizing, as ``preprocess_cfg`` of an open_clip_config.json."""
        ...

    @property
    def files(self) -> Mapping[str, Path]:
        """The local files that were read, by role: ``arch`` (if a JSON) and ``pretrained``."""
        ...

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the pretrained model as stored, with the stored dtypes."""
        ...

    @property
    def merge_keys(self) -> tuple[str, ...]:
        """Floating-point parameters of the image tower (``visual.*``), in state-dict order."""
        ...

    @property
    def image_encoder(self) -> nn.Module:
        """Images (B, 3, H, W) to features (B, d), not normalised; parameters are named as ``merge_keys``.

        uint8 images are scaled and normalised inside; floating-point images are taken as normalised already.
        """
        ...

    @property
    def logit_scale(self) -> float:
        """The factor between cosine similarity and logit, exp of the stored parameter."""
        ...

    @property
    def preprocess_hash(self) -> str:
        """Hash of everything that ``resize`` depends on."""
        ...

    @property
    def text_hash(self) -> str:
        """Hash of the text tower's weights, the tokenizer's settings and the logit scale."""
        ...

    def resize(self, image: "Image") -> Tensor:
        """One image in the size of the encoder, uint8 (3, H, W): the evaluation transform without normalisation."""
        ...

    def encode_text(self, texts: Sequence[str], *, device: torch.device | str = "cpu") -> Tensor:
        """L2-normalised text features, float32 (N, d) on the CPU; the tower visits ``device`` for the pass."""
        ...
