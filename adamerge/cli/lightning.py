"""How Lightning talks to the user, and in which precision it computes."""

import logging
import warnings
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar

from adamerge.learning.fit import CHECKPOINT_EVERY
from adamerge.models.processor import made_by_intel


def quiet() -> None:
    """Keep tips, deprecations and device inventories of other libraries out of the user's sight."""
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torch", "open_clip", "timm"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")


def best_precision(device: torch.device) -> str:
    """bf16 autocast where ``device`` has fast units for it, float32 elsewhere; as Lightning's Trainer takes it."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        names = ["amx_bf16", "arm_bf16", "bf16"] + ([] if made_by_intel() else ["avx512_bf16"])
        fast = any(features.get(name) for name in names)
    else:
        fast = False
    return "bf16-mixed" if fast else "32-true"


def progress_bar(learned: str = "coefficients") -> Callback:
    """Lightning's bar with rate and time left, refreshed as rarely as the losses are read.

    Args:
        learned: What is learned, in a word.
    """
    return _LearningBar(learned)


class _LearningBar(TQDMProgressBar):
    def __init__(self, learned: str) -> None:
        super().__init__(refresh_rate=CHECKPOINT_EVERY)
        self._learned = learned

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description(f"learning {self._learned}")

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        return {key: value for key, value in super().get_metrics(*args).items() if key != "v_num"}
