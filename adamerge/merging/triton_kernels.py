"""Both passes over τ in Triton: the kernels themselves. Imported where they run, since Triton may be absent.

A program works on one tile (see tiles.py): entries of one tensor that share a group, and a row where rows have scales.
What differs between tensors (addresses, sizes) is in a table that one launch reads for all of them. τ is widened
in registers and added up in float32.

Loads are as wide as the hardware has them only where the compiler knows addresses and lengths to be multiples of
``ALIGN`` entries, so a tile takes one of two copies of the same code. The hints stand on values that are computed
inside each copy: on a shared value they would hold for both.
"""
# Triton writes its compile-time arguments in capitals, and passes plain values for them.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from adamerge.merging.tiles import ALIGN, TILE_FIELDS

STORED = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}
"""In which τ may lie."""

TENSOR_FIELDS = tl.constexpr(7)
"""Per tensor: address of the output or gradient, of θ₀, of τ, of τ's scales; entries; rows; whether all is aligned."""

_TILE_FIELDS = tl.constexpr(TILE_FIELDS)
_ALIGN = tl.constexpr(ALIGN)


@triton.jit(do_not_specialize=["num_tasks", "num_groups"])
def add(
    tiles, tensors, weights, num_tasks, num_groups, STORED: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[p] ← base[p] + Σ_k weights[k, g] · τ_k[p] for the entries of one tile; weights (K, G) in float32."""
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_FIELDS
    tensor = tensors + tl.load(tile) * TENSOR_FIELDS
    start, stop = tl.load(tile + 1), tl.load(tile + 2)
    if (tl.load(tensor + 6) != 0) & (start % _ALIGN == 0) & (stop % _ALIGN == 0):
        _add(tile, tensor, weights, num_tasks, num_groups, start, stop, STORED, SCALED, UNROLL, BLOCK, True)
    else:
        _add(tile, tensor, weights, num_tasks, num_groups, start, stop, STORED, SCALED, UNROLL, BLOCK, False)


@triton.jit
def _add(
    tile, tensor, weights, num_tasks, num_groups, start, stop, STORED: tl.constexpr, SCALED: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    group, row = tl.load(tile + 3), tl.load(tile + 4)
    length = (stop - start).to(tl.int32)
    out = tl.load(tensor).to(tl.pointer_type(tl.float32)) + start
    base = tl.load(tensor + 1).to(tl.pointer_type(tl.float32)) + start
    values = tl.load(tensor + 2).to(tl.pointer_type(STORED)) + start
    scales = tl.load(tensor + 3).to(tl.pointer_type(tl.float32)) + row
    size, rows = tl.load(tensor + 4), tl.load(tensor + 5)
    if ALIGNED:
        length = tl.multiple_of(length, _ALIGN)
        out, base = tl.multiple_of(out, 16), tl.multiple_of(base, 16)
    lane = tl.arange(0, BLOCK)
    inside = lane < length
    total = tl.load(base + lane, mask=inside, other=0.0)
    for first in range(0, num_tasks, UNROLL):
        for step in tl.static_range(UNROLL):
            task = first + step  # times a size, which is int64
            factor = tl.load(weights + task * num_groups + group, mask=task < num_tasks, other=0.0)
            if SCALED:
                factor *= tl.load(scales + task * rows, mask=task < num_tasks, other=0.0)
            source = values + task * size
            if ALIGNED:
                source = tl.multiple_of(source, 16)
            there = lane < tl.where(task < num_tasks, length, 0)
            total += factor * tl.load(source + lane, mask=there, other=0).to(tl.float32)
    tl.store(out + lane, total, mask=inside)


@triton.jit(do_not_specialize=["num_tasks", "num_tiles"])
def contract(
    tiles, tensors, sums, num_tasks, num_tiles, STORED: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[k, t] ← Σ_p τ_k[p] · gradient[p] over the entries of tile t; sums (K, T) in float32."""
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_FIELDS
    tensor = tensors + tl.load(tile) * TENSOR_FIELDS
    start, stop = tl.load(tile + 1), tl.load(tile + 2)
    if (tl.load(tensor + 6) != 0) & (start % _ALIGN == 0) & (stop % _ALIGN == 0):
        _contract(tile, tensor, sums, num_tasks, num_tiles, start, stop, STORED, SCALED, UNROLL, BLOCK, True)
    else:
        _contract(tile, tensor, sums, num_tasks, num_tiles, start, stop, STORED, SCALED, UNROLL, BLOCK, False)


@triton.jit
def _contract(
    tile, tensor, sums, num_tasks, num_tiles, start, stop, STORED: tl.constexpr, SCALED: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.load(tile + 4)
    length = (stop - start).to(tl.int32)
    gradient = tl.load(tensor).to(tl.pointer_type(tl.float32)) + start
    values = tl.load(tensor + 2).to(tl.pointer_type(STORED)) + start
    scales = tl.load(tensor + 3).to(tl.pointer_type(tl.float32)) + row
    size, rows = tl.load(tensor + 4), tl.load(tensor + 5)
    if ALIGNED:
        length = tl.multiple_of(length, _ALIGN)
        gradient = tl.multiple_of(gradient, 16)
    lane = tl.arange(0, BLOCK)
    inside = lane < length
    factors = tl.load(gradient + lane, mask=inside, other=0.0)
    for first in range(0, num_tasks, UNROLL):
        steps = tl.arange(0, UNROLL)
        found = tl.zeros([UNROLL], tl.float32)
        for step in tl.static_range(UNROLL):
            task = first + step  # times a size, which is int64
            source = values + task * size
            if ALIGNED:
                source = tl.multiple_of(source, 16)
            there = lane < tl.where(task < num_tasks, length, 0)
            products = factors * tl.load(source + lane, mask=there, other=0).to(tl.float32)
            found = tl.where(steps == step, tl.sum(products, axis=0), found)
        tasks = first + steps
        if SCALED:
            found *= tl.load(scales + tasks * rows, mask=tasks < num_tasks, other=0.0)
        tl.store(sums + tasks * num_tiles + tl.program_id(0), found, mask=tasks < num_tasks)


@triton.jit(do_not_specialize=["num_runs", "source_stride", "place_stride", "task_stride"])
def add_runs(
    source, target, bounds, places, num_runs, source_stride, place_stride, task_stride, RUNS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """target[place of run r, k] += Σ source[k, t] over bounds[r] ≤ t < bounds[r + 1], at most WIDTH, in float64.

    No two runs have one place, so nothing is added twice at a time and the result is the same every time.
    """
    runs = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    task = tl.program_id(1).to(tl.int64)
    some = runs < num_runs
    start = tl.load(bounds + runs, mask=some, other=0)
    stop = tl.load(bounds + runs + 1, mask=some, other=0)
    columns = start[:, None] + tl.arange(0, WIDTH)[None, :]
    found = tl.load(source + task * source_stride + columns, mask=columns < stop[:, None], other=0.0)
    place = target + tl.load(places + runs, mask=some, other=0) * place_stride + task * task_stride
    tl.store(place, tl.load(place, mask=some, other=0.0) + tl.sum(found.to(tl.float64), axis=1), mask=some)
