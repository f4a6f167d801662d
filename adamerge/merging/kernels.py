"""Both passes over the task vectors of one tensor at the speed of memory.

Large tensors on the CPU go through loops that torch.compile generates (no full-size temporary, narrow τ widened in
registers); small ones, other devices and machines without a C++ compiler take torch's own operations, which are
also the oracle of the tests. All are called on rows: a tensor is (R, C), R its first dimension, so that an
int8 τ, which has a scale per row, needs no path of its own.
"""

import logging
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from adamerge.bank.storage import Rows

SMALL = 1 << 18
"""Entries of τ below which a generated loop costs more to call than it saves."""

_BLOCK = 1 << 15
"""Entries of one task that are widened at a time: a float64 block of eight tasks stays in a CPU core's cache."""

_AT_ONCE = 8
"""Tasks per generated loop: as many streams as a core reads ahead."""


def add_task_vectors(out: Tensor, base: Tensor, task_vectors: Rows, weights: Tensor) -> None:
    """out ← base + Σ_k weights[k] · τ_k.

    Args:
        out: (n,), contiguous.
        base: (n,), of the same dtype.
        task_vectors: K tasks of n entries, whole rows or a part of one.
        weights: (K,), dtype of ``base``.
    """
    done = 0
    for some in task_vectors.split(_AT_ONCE, out.device):
        num_tasks, rows, columns = some.values.shape
        factors = weights[done : done + num_tasks]
        if loop := _generated(some.values):
            scaled = factors[:, None] if some.scales is None else factors[:, None] * some.scales  # (K, 1 or R)
            loop("add", num_tasks)(
                out.view(rows, columns),
                base.view(rows, columns),
                some.values,
                scaled.expand(num_tasks, rows).contiguous(),
            )
        else:
            block = rows * columns if some.values.dtype == base.dtype else _BLOCK
            for part, wide in some.widened(base.dtype, block):
                torch.addmv(base[part], wide.t(), factors, out=out[part])
        base, done = out, done + num_tasks


def contract_task_vectors(task_vectors: Rows, gradient: Tensor) -> Tensor:
    """Σ_p τ_k[p] · gradient[p] for every task.

    Args:
        task_vectors: K tasks of n entries.
        gradient: (n,).

    Returns:
        (K,), float64 (float32 on devices without). λ's gradient is a sum over up to millions of terms that nearly
        cancel, so it is added up in float64, by the generated loops from sums over single rows.
    """
    wide_dtype = torch.float32 if gradient.device.type == "mps" else torch.float64
    block = _BLOCK if gradient.device.type == "cpu" else 1 << 21
    sums = []
    for some in task_vectors.split(_AT_ONCE, gradient.device):
        if loop := _generated(some.values):
            rows = gradient.to(torch.float32).view(some.values.shape[1:])
            per_row = loop("contract", len(some.values))(some.values, rows).to(wide_dtype)  # (K, R)
            sums.append((per_row if some.scales is None else per_row * some.scales).sum(1))
        else:
            total = torch.zeros(len(some.values), dtype=wide_dtype, device=gradient.device)
            for part, wide in some.widened(wide_dtype, block):
                total.addmv_(wide, gradient[part].to(wide_dtype))
            sums.append(total)
    return torch.cat(sums)


def _generated(narrow: Tensor) -> Callable[[str, int], Callable] | None:
    """The factory of generated loops, if one should run on these task vectors (K, R, C)."""
    worthwhile = narrow.numel() >= SMALL and narrow.dtype != torch.float64 and narrow.shape[2] >= 64
    return _loop if worthwhile and narrow.device.type == "cpu" and can_generate() else None


@cache
def can_generate() -> bool:
    """Whether this machine can compile loops: tried once, on a loop of one task."""
    try:
        values = torch.ones(1, 2, 64)
        out = torch.empty(2, 64)
        _loop("add", 1)(out, torch.zeros(2, 64), values, torch.ones(1, 2))
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
