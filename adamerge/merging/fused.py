"""Both passes over τ for all tensors in one launch: by Triton on CUDA devices, in C on a CPU (native.py), where tensors
whose groups are drawn entry by entry have a launch of their own.

Whatever a launch cannot take (other devices and dtypes, on a GPU groups that are drawn entry by entry) is handed back,
to be done by torch's own operations (kernels.py), which are also the oracle of the tests. Before the first launch for a
dtype on a device small cases are computed both ways; what fails them is left alone. ADAMERGE_KERNELS=torch in the
environment does the same to all devices.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.bank.storage import Rows
from adamerge.merging import native
from adamerge.merging.kernels import add_task_vectors, contract_task_vectors
from adamerge.merging.partition import Partition
from adamerge.merging.tiles import ALIGN, BLOCK, Tiles, tiles_of

_AT_ONCE = 4
"""Tasks whose loads are in flight together."""

SMALL = 1 << 20
"""Entries of τ in all below which a launch on a CPU saves less than its compilation costs."""

_RECENT = 64
"""Tables of addresses that are kept, per table of tiles."""

_SUMS = 1024
"""How many a program adds up, in runs."""

_WARPS = {"add": 4, "contract": 2}
"""Of a program: the sums of fewer are sooner put together."""


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``device`` runs our kernels of task vectors in ``dtype`` and gets them right."""
    allowed = device.type in ("cuda", "cpu") and os.environ.get("ADAMERGE_KERNELS") != "torch"
    return allowed and dtype in native.KINDS and _works(device, dtype)


def add_all(
    out: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rows: Mapping[str, Rows],
    weights: Tensor,
    partition: Partition,
) -> Mapping[str, Rows]:
    """out[p] ← base[p] + Σ_k weights[k, g(p)] · τ_k[p] for every entry p of the tensors that a launch can take.

    Args:
        out: At least the tensors of ``rows``, contiguous; may be ``base`` itself.
        base: Likewise.
        rows: K task vectors of some tensors.
        weights: (K, G).
        partition: The map g.

    Returns:
        The tensors that were not taken.
    """
    mine = {
        key: part
        for key, part in _alike(rows, partition).items()
        if all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (base[key], out[key]))
    }
    for some in _launches(mine, partition):
        _add({key: (out[key], base[key]) for key in some}, some, weights, partition)
    return {key: part for key, part in rows.items() if key not in mine}


def contract_all(
    gradients: Mapping[str, Tensor], rows: Mapping[str, Rows], partition: Partition, total: Tensor
) -> Mapping[str, Rows]:
    """total[g, k] += Σ_{p: g(p) = g} τ_k[p] · gradient[p] over the tensors that a launch can take.

    Products are added up per tile in float32, and tiles per group in float64, always in the same order.

    Args:
        gradients: At least those of the tensors of ``rows``; any layout, at most float32.
        rows: K task vectors of some tensors.
        partition: The map g.
        total: (G, K), float64.

    Returns:
        The tensors that were not taken.
    """
    mine = {key: part for key, part in _alike(rows, partition).items() if gradients[key].dtype != torch.float64}
    for some in _launches(mine, partition):
        _contract({key: gradients[key] for key in some}, some, partition, total)
    return {key: part for key, part in rows.items() if key not in mine}


def _alike(rows: Mapping[str, Rows], partition: Partition) -> dict[str, Rows]:
    """The tensors that launches can take: on one device, of one dtype that kernels read, with groups that they know."""
    first = next(iter(rows.values()), None)
    if first is None:
        return {}
    small = first.values.device.type == "cpu" and sum(part.values.numel() for part in rows.values()) < SMALL
    if small or not available(first.values.device, first.values.dtype):
        return {}
    return {
        key: part
        for key, part in rows.items()
        if part.values.dtype == first.values.dtype
        and part.values.is_contiguous()
        and (part.scales is None or part.scales.is_contiguous())
        and (partition.segments.get(key) or (key in partition.scattered and _in_c(part.values.device)))
    }


def _launches(rows: dict[str, Rows], partition: Partition) -> list[dict[str, Rows]]:
    """Tensors whose groups are runs of entries, and those whose groups are drawn."""
    drawn = {key: part for key, part in rows.items() if key in partition.scattered}
    runs = {key: part for key, part in rows.items() if key not in drawn}
    return [some for some in (runs, drawn) if some]


def _add(
    targets: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, Rows], weights: Tensor, partition: Partition
) -> None:
    device = next(iter(rows.values())).values.device
    tiles = _tiles(rows, partition, device)
    factors = weights.to(device, torch.float32).contiguous()
    tensors = _tensors(tiles, _addresses(targets, rows), device)
    _launch("add", tiles, rows, tensors, factors, *factors.shape)


def _contract(gradients: Mapping[str, Tensor], rows: Mapping[str, Rows], partition: Partition, total: Tensor) -> None:
    device, num_tasks = total.device, total.shape[1]
    tiles = _tiles(rows, partition, device)
    wide = {key: gradient.to(torch.float32).contiguous() for key, gradient in gradients.items()}
    tensors = _tensors(tiles, _addresses({key: (gradient,) for key, gradient in wide.items()}, rows), device)
    sums = torch.empty(num_tasks, tiles.count * tiles.slots, device=device)
    _launch("contract", tiles, rows, tensors, sums, *sums.shape)
    if _in_c(device):
        places = tiles.table[:, 3, None] + torch.arange(tiles.slots)  # beyond a tensor's own groups sums are 0
        total.index_add_(0, places.flatten().clamp(max=len(total) - 1), sums.t().to(total.dtype))
        return
    for level, ((bounds, places), width) in enumerate(zip(tiles.levels, tiles.widths, strict=True), 1):
        last = level == len(tiles.levels)
        target = total if last else total.new_zeros(num_tasks, len(places)).t()  # (G or R, K)
        strides = sums.stride(0), target.stride(0), target.stride(1)
        runs = _SUMS // width
        grid = (-(-len(places) // runs), num_tasks)
        _kernel("add_runs", grid, device)(
            sums, target, bounds, places, len(places), *strides, RUNS=runs, WIDTH=width, num_warps=4
        )
        sums = target.t()


def _tiles(rows: Mapping[str, Rows], partition: Partition, device: torch.device) -> Tiles:
    return tiles_of(partition, rows, native.BLOCK if _in_c(device) else BLOCK, partial(_upload, device=device))


def _in_c(device: torch.device) -> bool:
    """Whether kernels of ``device`` are those in C; Triton's interpreter runs the others on a CPU, for the tests."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def _launch(name: Literal["add", "contract"], tiles: Tiles, rows: Mapping[str, Rows], *arguments: Any) -> None:
    """One program per tile."""
    if not tiles.count:
        return
    first = next(iter(rows.values()))
    if _in_c(first.values.device):
        native.run(name, first.values.dtype, tiles.table, tiles.draws, *arguments)
        return
    from adamerge.merging.triton_kernels import STORED

    _kernel(name, (tiles.count,), first.values.device)(
        tiles.table,
        *arguments,
        STORED=STORED[first.values.dtype],
        SCALED=first.scales is not None,
        UNROLL=min(_AT_ONCE, 1 << (len(first.values) - 1).bit_length()),
        BLOCK=BLOCK,
        num_warps=_WARPS[name],
    )


def _kernel(name: str, grid: Sequence[int], device: torch.device) -> Any:
    """A kernel of triton_kernels.py, to be called with its arguments; nothing happens where the grid is empty."""

    def call(*arguments: Any, **options: Any) -> None:
        if not all(grid):
            return
        from adamerge.merging import triton_kernels

        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            # Products are added unrounded, whatever this version of Triton does by default.
            getattr(triton_kernels, name)[tuple(grid)](*arguments, enable_fp_fusion=True, **options)

    return call


def _addresses(targets: Mapping[str, Sequence[Tensor]], rows: Mapping[str, Rows]) -> tuple[tuple[int, ...], ...]:
    """What kernels have to know of each tensor, seven numbers."""
    table = []
    for key, part in rows.items():
        size = part.values[0].numel()
        scales = 0 if part.scales is None else part.scales.data_ptr()
        out, base = [tensor.data_ptr() for tensor in targets[key]] + [0] * (2 - len(targets[key]))
        wide = [out, base, part.values.data_ptr()]
        aligned = size % ALIGN == 0 and not any(address % 16 for address in wide)
        table.append((*wide, scales, size, part.values.shape[1], int(aligned)))
    return tuple(table)


def _tensors(tiles: Tiles, addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """``addresses`` on the device, (tensors, 7) int64; most steps have those of the step before."""
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = tiles.recorded if recording else tiles.recent
    if (table := known.get(addresses)) is None:
        if not recording and len(known) >= _RECENT:
            known.pop(next(iter(known)))
        table = known[addresses] = _upload(torch.tensor(addresses, dtype=torch.int64), device)
    return table


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """A small table on the device; without waiting for it, but while a stream is recorded, which must not have it."""
    if device.type != "cuda":
        return table.to(device)
    if not torch.cuda.is_current_stream_capturing():
        return table.pin_memory().to(device, non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream(device, priority=-1)):  # never the one that is recorded
        return table.to(device)


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether both passes compile on this device and give what torch's operations give, on a small case."""
    try:
        check(device, dtype)
    except Exception as error:  # of a missing Triton, compiler or driver, or of a wrong result
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.getLogger(__name__).info("no kernels of %s on %s (%s)", dtype, device, reason)
        return False
    return True


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Compute small cases both ways.

    Raises:
        ArithmeticError: If they differ.
        Exception: Whatever Triton, a compiler or the loader raises where it cannot run.
    """
    shapes = {"matrix": (4, 1040), "vector": (33,)}  # with tiles that are aligned and tiles that are not
    for granularity in ("chunk(3)", "random(3)")[: 1 + _in_c(device)]:
        _check(device, dtype, shapes, Partition.build(granularity, shapes))


def _check(
    device: torch.device, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], partition: Partition
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, partition.num_groups, generator=generator).to(device)
    rows, pretrained = {}, {}
    for key, (*lead, columns) in shapes.items():
        count = lead[0] if lead else 1
        values = (50 * torch.randn(3, count, columns, generator=generator)).clamp(-127, 127).to(dtype)
        scales = torch.rand(3, count, generator=generator) if dtype == torch.int8 else None
        rows[key] = Rows(values, scales).to(device)
        pretrained[key] = torch.randn(count * columns, generator=generator).to(device)
    found = {key: torch.full_like(base, torch.nan) for key, base in pretrained.items()}
    totals = torch.zeros(2, partition.num_groups, 3, dtype=torch.float64, device=device)
    _add({key: (found[key], base) for key, base in pretrained.items()}, rows, weights, partition)
    _contract(pretrained, rows, partition, totals[0])
    for key, base in pretrained.items():
        expected = torch.empty_like(base)
        add_task_vectors(expected, base, rows[key], weights, partition.of(key))
        contract_task_vectors(rows[key], base, partition.of(key), totals[1])
        if not torch.allclose(found[key], expected, rtol=1e-5, atol=1e-3):
            raise ArithmeticError(f"the merge of {dtype} task vectors is wrong")
    if not torch.allclose(*totals, rtol=1e-5, atol=1e-2):
        raise ArithmeticError(f"the coefficient gradient of {dtype} task vectors is wrong")
