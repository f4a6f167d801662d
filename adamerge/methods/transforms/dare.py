"""DARE: drop entries at random, and make up for them."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError
from adamerge.merging.noise import uniform
from adamerge.methods.protocol import NOTHING, Context, Transform


@dataclass(frozen=True)
class Dare(Transform):
    """m ∘ τ / (1 - drop) with m = 0 at a fraction ``drop`` of the entries, drawn one by one, and 1 elsewhere.

    The mean over seeds is τ. A mask depends on the seed, the tensor's key and the task's name alone: not on the device,
    nor on which tasks and tensors come before.

    Args:
        drop: Probability of an entry to become zero, in [0, 1).
        rescale: Whether to divide by 1 - drop.
        masks: ``own`` (one per task) or ``shared`` (one for all tasks).
        matrices_only: Whether only tensors of two dimensions are dropped from.
        seed: Of the masks.

    Raises:
        ConfigError: If an option is out of range.

    Differs: the original draws from one global generator, tensor after tensor. FusionBench's option for linear weights
    takes the weights of linear layers; ``matrices_only`` takes whatever has two dimensions, so also the positional
    embedding, and the projections that the original CLIP stores as plain parameters. mergekit rescales every tensor by
    the factor that gives back its sum of magnitudes, in place of 1 / (1 - drop).

    Source: DARE, arXiv:2311.03099.
    """

    drop: float
    rescale: bool
    masks: Literal["own", "shared"]
    matrices_only: bool
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop is the probability of an entry to become zero, in [0, 1); found {self.drop}.")
        if self.masks not in ("own", "shared"):
            raise ConfigError(f"masks are each task's 'own' or 'shared' by all, found '{self.masks}'.")

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        names = bank.task_names

        def apply(key: str, task_vectors: Tensor) -> Tensor:
            dropped = task_vectors.clone()
            if self.matrices_only and task_vectors.dim() != 3:  # (K, m, n)
                return dropped
            if self.masks == "shared":
                dropped.mul_(self._kept(f"{self.seed}/{key}", dropped[0]))
            else:
                for name, task_vector in zip(names, dropped, strict=True):
                    task_vector.mul_(self._kept(f"{self.seed}/{key}/{name}", task_vector))
            return dropped.div_(1 - self.drop) if self.rescale else dropped

        return apply

    def to_json(self) -> dict[str, Any]:
        return {"name": "dare", **asdict(self)}

    def _kept(self, name: str, like: Tensor) -> Tensor:
        """Where entries stay, bool, of the shape of ``like``."""
        draws = uniform(f"dare/{name}", like.numel(), device=like.device, dtype=torch.float32)
        return (draws >= self.drop).view(like.shape)
