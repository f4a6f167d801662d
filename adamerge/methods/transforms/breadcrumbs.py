"""Model Breadcrumbs: without the smallest entries, and without outliers."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError
from adamerge.methods.protocol import NOTHING, Context, Transform
from adamerge.methods.transforms.quantiles import kth_smallest


@dataclass(frozen=True)
class Breadcrumbs(Transform):
    """Zero each tensor's ⌊drop_low·n⌋ smallest of n magnitudes and its ⌊drop_high·n⌋ largest; no rescaling.

    Entries that tie with the smallest or the largest that is kept stay.

    Args:
        drop_low: Fraction of smallest entries, in [0, 1); the paper's β.
        drop_high: Fraction of largest entries, in [0, 1), with ``drop_low`` below 1; 1 minus the paper's γ.
        within: What n entries are ranked together: a ``tensor``, or a ``row`` along its last dimension.

    Raises:
        ConfigError: If an option is out of range.

    Differs: the paper masks layer by layer, its original repository row by row (``within=row``). In mergekit
    ``density`` is 1 - drop_low - drop_high and ``gamma`` is drop_high; it rounds down what it keeps, ⌊density·n⌋. What
    the paper chose for CLIP is not verified; its repository starts its search at drop_low = 0.85, drop_high = 0.006.

    Source: Model Breadcrumbs, arXiv:2312.06795.
    """

    drop_low: float
    drop_high: float
    within: Literal["tensor", "row"]

    def __post_init__(self) -> None:
        if self.drop_low < 0 or self.drop_high < 0 or self.drop_low + self.drop_high >= 1:
            raise ConfigError(
                "drop_low and drop_high are fractions, 0 or more, that leave something: together below 1. "
                f"Found {self.drop_low} and {self.drop_high}."
            )
        if self.within not in ("tensor", "row"):
            raise ConfigError(f"entries are ranked within a 'tensor' or a 'row', found '{self.within}'.")

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        return lambda key, task_vectors: task_vectors * self._kept(task_vectors.abs())

    def to_json(self) -> dict[str, Any]:
        return {"name": "breadcrumbs", **asdict(self)}

    def _kept(self, magnitudes: Tensor) -> Tensor:
        """Where entries stay, bool, (K, *shape)."""
        last = magnitudes.shape[-1] if magnitudes.dim() > 1 else 1
        size = last if self.within == "row" else magnitudes[0].numel()
        ranks = [1 + int(self.drop_low * size), size - int(self.drop_high * size)]
        if self.within == "row":
            rows = magnitudes.reshape(-1, last).float()
            limits = torch.stack([rows.kthvalue(rank, dim=1).values for rank in ranks])
            limits = limits.view(2, *magnitudes.shape[:-1], 1) if magnitudes.dim() > 1 else limits
        else:
            limits = kth_smallest(lambda: [magnitudes], ranks)
            limits = limits.view(2, -1, *[1] * (magnitudes.dim() - 1))
        rounded = magnitudes.float()
        return (rounded >= limits[0]) & (rounded <= limits[1])
