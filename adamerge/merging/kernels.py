"""Both passes over the task vectors of one tensor by torch's own operations.

They do what no launch takes (fused.py), on any device and in any dtype, and are the oracle of the tests. A tensor is
(R, C), R its first dimension, with one factor per row and task, so that groups of whole rows and an int8 τ, which has a
scale per row, need no loop of their own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adamerge.bank.storage import Rows
from adamerge.merging.partition import Scattered, Segments

_BLOCK = 1 << 15
"""A float64 block of eight tasks stays in a CPU core's cache."""

_AT_ONCE = 8
"""Tasks that are widened together."""


def add_task_vectors(
    out: Tensor, base: Tensor, task_vectors: Rows, weights: Tensor, groups: Segments | Scattered
) -> None:
    """out[p] ← base[p] + Σ_k weights[k, g(p)] · τ_k[p].

    Args:
        out: (n,), contiguous.
        base: (n,), of the same dtype.
        task_vectors: K tasks of n entries.
        weights: (K, G), dtype of ``base``.
        groups: The map g.
    """
    for some, factors in _by_tasks(task_vectors, weights, out.device):
        if isinstance(groups, Scattered):
            for piece, wide in some.widened(base.dtype, _block(out)):
                of_entry = factors[:, groups.groups(piece.start, piece.stop, out.device)]
                torch.add(base[piece], (of_entry * wide).sum(0), out=out[piece])
        else:
            for run, part, of_rows in _runs(some, groups):
                _add_rows(out[run], base[run], part, factors[:, of_rows])
        base = out


def contract_task_vectors(task_vectors: Rows, gradient: Tensor, groups: Segments | Scattered, total: Tensor) -> None:
    """total[g, k] += Σ_{p: g(p) = g} τ_k[p] · gradient[p].

    Args:
        task_vectors: K tasks of n entries.
        gradient: (n,).
        groups: The map g.
        total: (G, K), float64 where the device has it: λ's gradient is a sum over up to millions of terms that nearly
            cancel.
    """
    for some, sums in _by_tasks(task_vectors, total.t(), gradient.device):
        if isinstance(groups, Scattered):
            for piece, wide in some.widened(total.dtype, _block(gradient)):
                of_entry = groups.groups(piece.start, piece.stop, gradient.device)
                sums.index_add_(1, of_entry, wide * gradient[piece].to(total.dtype))
        else:
            for run, part, of_rows in _runs(some, groups):
                sums_of_rows = _contract_rows(part, gradient[run], total.dtype, one=isinstance(of_rows, int))
                if isinstance(of_rows, int):
                    sums[:, of_rows] += sums_of_rows[:, 0]
                else:
                    sums.index_add_(1, of_rows, sums_of_rows)


def _add_rows(out: Tensor, base: Tensor, part: Rows, factors: Tensor) -> None:
    """out ← base + Σ_k factors · τ_k, for whole rows or a piece of one; factors (K, R), or (K,) for all rows."""
    _, rows, columns = part.values.shape
    if factors.dim() == 1:
        block = len(out) if part.values.dtype == base.dtype else _block(out)
        for piece, wide in part.widened(base.dtype, block):
            torch.addmv(base[piece], wide.t(), factors, out=out[piece])
    else:
        factors = factors if part.scales is None else factors * part.scales.to(factors)
        torch.addcmul(
            base.view(rows, columns), factors[0, :, None], part.values[0].to(base.dtype), out=out.view(rows, columns)
        )
        for factor, values in zip(factors[1:], part.values[1:], strict=True):
            out.view(rows, columns).addcmul_(factor[:, None], values.to(base.dtype))


def _contract_rows(part: Rows, gradient: Tensor, dtype: torch.dtype, *, one: bool) -> Tensor:
    """Σ τ_k · gradient over the columns (K, R); with ``one`` over all entries, (K, 1)."""
    num_tasks, rows, columns = part.values.shape
    if one:
        total = gradient.new_zeros(num_tasks, 1, dtype=dtype)
        for piece, wide in part.widened(dtype, _block(gradient)):
            total[:, 0] += wide.mv(gradient[piece].to(dtype))
        return total
    wide = gradient.view(rows, columns).to(dtype)
    sums = torch.stack([(values.to(dtype) * wide).sum(1) for values in part.values])
    return sums if part.scales is None else sums * part.scales


def _block(tensor: Tensor) -> int:
    """Entries of one task that are widened at a time: on the CPU as many as stay in a core's cache."""
    return _BLOCK if tensor.device.type == "cpu" else 1 << 21


def _by_tasks(task_vectors: Rows, columns: Tensor, device: torch.device) -> Iterator[tuple[Rows, Tensor]]:
    """A few tasks at a time on ``device``, each with its part of ``columns`` (K, …)."""
    for some, part in zip(task_vectors.split(_AT_ONCE), columns.split(_AT_ONCE), strict=True):
        yield some.to(device), part


def _runs(task_vectors: Rows, segments: Segments) -> Iterator[tuple[slice, Rows, Tensor | int]]:
    """Entries, their task vectors and their groups: one for all of them, or one per row."""
    device, columns = task_vectors.values.device, task_vectors.values.shape[2]
    if (columns, device) not in segments.plans:
        segments.plans[columns, device] = list(_plan(segments, columns, device))
    for run, groups in segments.plans[columns, device]:
        yield run, task_vectors.part(run), groups


def _plan(segments: Segments, columns: int, device: torch.device) -> Iterator[tuple[slice, Tensor | int]]:
    """Cut segments into whole rows and pieces of rows; neighbouring segments of whole rows go together."""
    waiting: list[tuple[int, int, int]] = []
    for start, stop, group in segments:
        while start < stop:
            whole, offset = stop // columns * columns, start % columns
            end = whole if not offset and whole > start else min(stop, start - offset + columns)
            if not offset and end == whole:
                waiting.append((start, end, group))
            else:
                yield from _together(waiting, columns, device)
                waiting = []
                yield slice(start, end), group
            start = end
    yield from _together(waiting, columns, device)


def _together(
    runs: Sequence[tuple[int, int, int]], columns: int, device: torch.device
) -> Iterator[tuple[slice, Tensor | int]]:
    """Neighbouring runs of whole rows as one, with the group of each row."""
    if len(runs) == 1:
        ((start, stop, group),) = runs
        yield slice(start, stop), group
    elif runs:
        counts = torch.tensor([(stop - start) // columns for start, stop, _ in runs])
        groups = torch.tensor([group for _, _, group in runs]).repeat_interleave(counts)
        yield slice(runs[0][0], runs[-1][1]), groups.to(device)
