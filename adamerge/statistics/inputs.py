"""Gram matrices of what the linear layers of an image tower are fed with."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge.errors import ConfigError, shortlist
from adamerge.learning.experts import autocast
from adamerge.statistics.gather import Expert

_PROJECTION = "visual.proj"
"""CLIP's last linear map: a bare parameter (n, d) that features are multiplied with from the right."""

_CHUNK = 512
"""Tokens whose products are summed in float32 before the sum is added in float64: its error stays below a rounding."""


@dataclass(frozen=True)
class InputGrams:
    """XᵀX / N for every matrix that maps tokens linearly, X (N, n) being all tokens that one expert feeds it with.

    Those matrices are the weights of ``nn.Linear``, ``in_proj_weight`` (query, key and value have the same input) and
    ``out_proj.weight`` of self-attention, and ``visual.proj``, whose tokens are the images' pooled ones. N counts
    tokens: images times patches and class token, where all tokens pass.

    Computed in float32 over 512 tokens at a time, added up in float64 (float32 on mps), given in the network's dtype:
    as exact as if all were computed in float64.

    Args:
        images_per_task: Images to feed; None for all.
        exclude: Shell patterns of such matrices that get no Gram matrix.

    Raises:
        ConfigError: If a pattern fits no such matrix, the input of one is not seen, or is NaN or Inf.
    """

    images_per_task: int | None
    exclude: Sequence[str]

    @property
    def needs(self) -> Literal["images"]:
        return "images"

    @torch.no_grad()
    def __call__(self, expert: Expert) -> dict[str, Tensor]:
        """(n, n) by the matrix's name, for those among ``expert.keys``."""
        network, device = expert.network, expert.device
        wanted = self._wanted(expert)
        if not wanted:
            return {}
        sums = {key: _Sum() for key in wanted}
        replaced = {}
        if _PROJECTION in wanted:  # by the identity, so that the features are its inputs
            weight = network.get_parameter(_PROJECTION)
            replaced[_PROJECTION] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        assert expert.images is not None
        with ExitStack() as hooks:
            for key, module in wanted.items():
                if module is not None:
                    hooks.callback(module.register_forward_pre_hook(_catch(sums[key])).remove)
            for images in expert.images.split(expert.batch_size):
                with autocast(device, expert.precision):
                    features = functional_call(network, replaced, (images.to(device),))
                if replaced:
                    sums[_PROJECTION].add(features)
        if unseen := [key for key, found in sums.items() if not found.tokens]:
            raise ConfigError(
                f"the inputs of {shortlist(unseen)} cannot be seen: not a plain linear layer or self-attention, or not "
                "used. Exclude them with method.inputs.exclude=[…]; they then take the mean."
            )
        grams = {key: found.mean().to(network.get_parameter(key).dtype) for key, found in sums.items()}
        if bad := [key for key, gram in grams.items() if not gram.isfinite().all()]:
            raise ConfigError(
                f"task '{expert.task}': the inputs of {shortlist(bad)} are NaN or Inf. Use trainer.precision=32-true."
            )
        return grams

    def to_json(self) -> dict[str, Any]:
        return {"name": "input_grams", **asdict(self), "exclude": sorted(self.exclude)}

    def _wanted(self, expert: Expert) -> dict[str, nn.Module | None]:
        """The matrices to look at, each with the module that it belongs to; None for the projection."""
        matrices: dict[str, nn.Module | None] = {}
        for name, module in expert.network.named_modules():
            if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                matrices[f"{name}.in_proj_weight"] = module
            elif isinstance(module, nn.Linear):
                matrices[f"{name}.weight"] = module
        if any(name == _PROJECTION and parameter.dim() == 2 for name, parameter in expert.network.named_parameters()):
            matrices[_PROJECTION] = None
        for pattern in self.exclude:
            if not any(fnmatchcase(key, pattern) for key in matrices):
                raise ConfigError(
                    f"the pattern '{pattern}' of method.inputs.exclude fits none of {len(matrices)} linear weights. "
                    f"They look like '{min(matrices, default='')}'."
                )
        excluded = {key for key in matrices if any(fnmatchcase(key, pattern) for pattern in self.exclude)}
        return {key: matrices[key] for key in expert.keys if key in matrices and key not in excluded}


class _Sum:
    """Σ xxᵀ over tokens x, and their number."""

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Tokens (…, n) more."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        rows = rows.float() if rows.dtype.itemsize < 4 else rows
        if self._total is None:
            wide = torch.float32 if rows.device.type == "mps" else torch.float64
            self._total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=wide)
        with torch.autocast(rows.device.type, enabled=False):
            for some in rows.split(_CHUNK):
                self._total += some.mT @ some
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        assert self._total is not None
        return self._total / self.tokens


def _catch(found: _Sum) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds a module's input, if all of its first three (an attention's query, key, value) are one."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and all(other is inputs[0] for other in inputs[1:3]):
            found.add(inputs[0])

    return hook
