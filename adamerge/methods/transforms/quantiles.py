"""Exact quantiles of very many numbers, by counting: nothing is sorted, nothing concatenated."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

_BUCKETS = 1 << 16
_ZERO = 1 << 15  # the upper bucket that holds 0, which is the first of its lower ones


def kth_smallest(read: Callable[[], Iterable[Tensor]], ranks: Sequence[int], *, zeros: int = 0) -> Tensor:
    """Order statistics per task, over all entries of many tensors together.

    The bits of float32 numbers, those of negative ones inverted, order like the numbers: two histograms of 16 bits each
    find any rank.

    Args:
        read: Yields the tensors (K, …), at least one, each rounded to float32 here; called twice, and both times it
            must yield the same numbers.
        ranks: R of them, counted from one, up to the number d of a task's entries and ``zeros``.
        zeros: How many zeros to count besides.

    Returns:
        The numbers of these ranks, (R, K), float32.
    """
    tensors = iter(read())
    first = next(tensors)
    upper = torch.zeros(len(first), _BUCKETS, dtype=torch.int64, device=first.device)  # (K, 65536)
    for values in chain([first], tensors):
        for task, row in enumerate(values):
            upper[task] += torch.bincount((_ordered(row) >> 16) + _ZERO, minlength=_BUCKETS)
    upper[:, _ZERO] += zeros
    wanted = torch.tensor(ranks, device=first.device).expand(len(first), -1).contiguous()  # (K, R)
    high, wanted = _locate(upper, wanted)

    lower = torch.zeros(*high.shape, _BUCKETS, dtype=torch.int64, device=high.device)  # (K, R, 65536)
    lower[..., 0] += zeros * (high == _ZERO)
    for values in read():
        for task, row in enumerate(values):
            ordered = _ordered(row)
            bucket = (ordered >> 16) + _ZERO
            for index in range(len(ranks)):
                inside = ordered[bucket == high[task, index]] & 0xFFFF
                lower[task, index] += torch.bincount(inside, minlength=_BUCKETS)
    low, _ = _locate(lower.flatten(0, 1), wanted.reshape(-1, 1))
    ordered = ((high - _ZERO) << 16 | low.view_as(high)).to(torch.int32)
    return _swapped(ordered).view(torch.float32).T.contiguous()


def _ordered(row: Tensor) -> Tensor:
    """Integers that order like the numbers, int32 (n,), -0 right below 0."""
    return _swapped(row.reshape(-1).float().view(torch.int32))


def _swapped(bits: Tensor) -> Tensor:
    """Bits with all but the sign inverted where it is set, and back again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The buckets (N, R) of ``ranks`` (N, R), counted from one, in histograms (N, B), and the ranks within them."""
    until = counts.cumsum(1)
    index = torch.searchsorted(until, ranks)
    return index, ranks - until.gather(1, index) + counts.gather(1, index)
