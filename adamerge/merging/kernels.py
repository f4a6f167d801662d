"""Both passes over the task vectors of one tensor at the speed of memory.

Large tensors on the CPU go through loops that torch.compile generates (no full-size temporary, narrow τ widened in
registers); small ones, other devices and machines without a C++ compiler take torch's own operations, which are
also the oracle of the tests. Generated loops work on rows: a tensor is (R, C), R its first dimension, with one factor
per row and task, so that groups of whole rows and an int8 τ, which has a scale per row, need no loop of their own.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from adamerge.bank.storage import Rows
from adamerge.merging.partition import Segment

SMALL = 1 << 20
"""Entries of τ below which a generated loop saves less than its compilation costs."""

_BLOCK = 1 << 15
"""Entries of one task that are widened at a time: a float64 block of eight tasks stays in a CPU core's cache."""

_AT_ONCE = 8
"""Tasks per generated loop: as many streams as a core reads ahead."""


def add_task_vectors(
    out: Tensor, base: Tensor, task_vectors: Rows, weights: Tensor, segments: Sequence[Segment]
) -> None:
    """out[p] ← base[p] + Σ_k weights[k, g(p)] · τ_k[p].

    Args:
        out: (n,), contiguous.
        base: (n,), of the same dtype.
        task_vectors: K tasks of n entries.
        weights: (K, G), dtype of ``base``.
        segments: The map g.
    """
    for some, factors in _by_tasks(task_vectors, weights, out.device):
        for run, part, groups in _runs(some, segments):
            if isinstance(groups, Tensor):
                rows, columns = part.values.shape[1:]
                scaled = factors[:, groups] if part.scales is None else factors[:, groups] * part.scales  # (K, R)
                views = out[run].view(rows, columns), base[run].view(rows, columns)
                _loop("add", len(factors))(*views, part.values, scaled)
            else:
                block = run.stop - run.start if part.values.dtype == base.dtype else _BLOCK
                for piece, wide in part.widened(base.dtype, block):
                    torch.addmv(base[run][piece], wide.t(), factors[:, groups], out=out[run][piece])
        base = out


def contract_task_vectors(task_vectors: Rows, gradient: Tensor, segments: Sequence[Segment], total: Tensor) -> None:
    """total[g, k] += Σ_{p: g(p) = g} τ_k[p] · gradient[p].

    Args:
        task_vectors: K tasks of n entries.
        gradient: (n,).
        segments: The map g.
        total: (G, K), float64 where the device has it: λ's gradient is a sum over up to millions of terms that nearly
            cancel. Generated loops hand over sums of single rows, in float32.
    """
    block = _BLOCK if gradient.device.type == "cpu" else 1 << 21
    for some, sums in _by_tasks(task_vectors, total.t(), gradient.device):
        for run, part, groups in _runs(some, segments):
            if isinstance(groups, Tensor):
                rows = gradient[run].to(torch.float32).view(part.values.shape[1:])
                per_row = _loop("contract", len(sums))(part.values, rows).to(total.dtype)  # (K, R)
                sums.index_add_(1, groups, per_row if part.scales is None else per_row * part.scales)
            else:
                for piece, wide in part.widened(total.dtype, block):
                    sums[:, groups] += wide.mv(gradient[run][piece].to(total.dtype))


def _by_tasks(task_vectors: Rows, columns: Tensor, device: torch.device) -> Iterator[tuple[Rows, Tensor]]:
    """A few tasks at a time on ``device``, each with its part of ``columns`` (K, …)."""
    for some, part in zip(task_vectors.split(_AT_ONCE), columns.split(_AT_ONCE), strict=True):
        yield some.to(device), part


def _runs(task_vectors: Rows, segments: Sequence[Segment]) -> Iterator[tuple[slice, Rows, Tensor | int]]:
    """Entries, their task vectors, and their groups: one group per row for a generated loop, else one for all."""
    values = task_vectors.values
    num_tasks, _, columns = values.shape
    if not _generated(values):
        if task_vectors.scales is None:  # rows mean nothing: take each segment in one piece
            task_vectors = Rows(values.reshape(num_tasks, 1, -1), None)
        for start, stop, group in segments:
            for run, part in task_vectors.cut(start, stop):
                yield run, part, group
        return
    waiting: list[tuple[slice, int]] = []  # whole rows, to be taken together with their neighbours
    for start, stop, group in segments:
        for run, part in task_vectors.cut(start, stop):
            if (run.stop - run.start) % columns == 0:
                waiting.append((run, group))
                continue
            if waiting:
                yield _together(task_vectors, waiting)
                waiting = []
            yield run, part, group
    if waiting:
        yield _together(task_vectors, waiting)


def _together(task_vectors: Rows, runs: Sequence[tuple[slice, int]]) -> tuple[slice, Rows, Tensor]:
    """Neighbouring runs of whole rows as one, with the group of each row."""
    ((run, part),) = task_vectors.cut(runs[0][0].start, runs[-1][0].stop)
    counts = torch.tensor([(run.stop - run.start) // task_vectors.values.shape[2] for run, _ in runs])
    return run, part, torch.tensor([group for _, group in runs]).repeat_interleave(counts)


def _generated(values: Tensor) -> bool:
    """Whether a generated loop should run on these task vectors (K, R, C)."""
    worthwhile = values.numel() >= SMALL and values.shape[2] >= 64 and values.dtype != torch.float64
    return worthwhile and values.device.type == "cpu" and can_generate()


@cache
def can_generate() -> bool:
    """Whether this machine can compile loops: tried once, on a loop of one task."""
    try:
        out = torch.empty(2, 64)
        _loop("add", 1)(out, torch.zeros(2, 64), torch.ones(1, 2, 64), torch.ones(1, 2))
    except Exception as error:  # inductor reports a missing compiler in many ways
        logging.getLogger(__name__).info("no generated loops on this machine (%s)", type(error).__name__)
        return False
    return bool((out == 1).all())


@cache
def _loop(name: str, num_tasks: int) -> Callable:
    """A compiled loop for a fixed number of tasks."""
    source = {"add": _add, "contract": _contract}[name]
    # A code object of its own, because torch limits the compiled variants (dtypes, aliases) of one.
    code = source.__code__.replace(co_name=f"{source.__name__}_{num_tasks}")
    compiled = torch.compile(type(source)(code, source.__globals__), dynamic=True)

    def call(*args: Tensor) -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.compile about itself
            return compiled(*args)

    return call


def _add(out: Tensor, base: Tensor, task_vectors: Tensor, weights: Tensor) -> None:
    """(R, C), (R, C), (K, R, C), (K, R)."""
    for factors, values in zip(weights, task_vectors, strict=True):
        base = base + factors[:, None] * values.to(base.dtype)
    out.copy_(base)


def _contract(task_vectors: Tensor, gradient: Tensor) -> Tensor:
    """(K, R, C), (R, C) → (K, R)."""
    return torch.stack([(values.to(gradient.dtype) * gradient).sum(1) for values in task_vectors])
