"""The nearest point of the probability simplex."""

import torch
from torch import Tensor


def project_to_simplex(values: Tensor) -> Tensor:
    """argmin ‖w − values‖ over w ≥ 0 with Σ w = 1, for every column.

    w = max(values − c, 0), where c is such that w sums to 1: if the m largest values are those above c, then c is their
    sum less 1, over m.

    Args:
        values: (n, …); each column along the first dimension is projected.

    Returns:
        The same shape.

    Source: Held, Wolfe and Crowder, Mathematical Programming 6, 1974.
    """
    ordered = values.sort(dim=0, descending=True).values
    counts = torch.arange(1, len(values) + 1, device=values.device).view(-1, *[1] * (values.dim() - 1))
    shifts = (ordered.cumsum(0) - 1) / counts
    count = (ordered > shifts).sum(0, keepdim=True).clamp(min=1)  # m; without finite values there is none
    return (values - shifts.gather(0, count - 1)).clamp(min=0)
