"""The work of one launch, cut into pieces that a program of a GPU or a thread of a CPU does at once.

A tile is a run of a limited number of entries of one flattened tensor that share a group and, where τ has a scale per
row, a row. Of tensors whose groups are drawn entry by entry it is any run, a longer one where groups are many. Tables
of tiles depend on the partition and on the tensors' names and shapes alone, so they are made once.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adamerge.bank.storage import Rows
from adamerge.merging.partition import Partition, Segment

BLOCK = 1024
"""Entries of a GPU's tile at most: about one row of a ViT's matrices."""

ALIGN = 16
"""Entries: tiles begin at multiples of it where their segment allows, so that loads of any dtype can be wide."""

TILE_FIELDS = 5
"""Per tile: tensor, start and stop within it, group, row."""

PER_BLOCK = 8
"""Drawn groups: with more of them tiles are larger, so that sums take little memory beside τ."""

WIDTH = 64
"""Numbers that are added up at a time, at most, when the sums of tiles become those of groups."""

NARROW = 8
"""Where no group has more tiles than this, as rows have not, so many."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of some tensors, sorted by group.

    Attributes:
        table: (T, ``TILE_FIELDS``), int64. The group of a tile whose entries draw theirs is their tensor's first.
        draws: (tensors, 2), int64: of how many groups entries are drawn, and the draw's salt; None: nothing is drawn.
        slots: Sums of a tile: 1, or the largest number of groups.
        levels: How T sums become one per group. Per level the bounds of R runs of neighbours (R + 1) and the place of
            each run's sum (R): in the next level, and in the last one the group. int64.
        widths: Of the longest run of each level, rounded up to ``NARROW`` or ``WIDTH``.
        recent: Tables of addresses of recent launches, by what they hold; ``fused`` keeps them here.
        recorded: Those that a recorded launch reads, for as long as there are these tiles.
    """

    table: Tensor
    draws: Tensor | None
    slots: int
    levels: tuple[tuple[Tensor, Tensor], ...]
    widths: tuple[int, ...]
    recent: dict[tuple, Tensor] = field(default_factory=dict)
    recorded: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.table)


_KNOWN: dict[int, dict[tuple, Tiles]] = {}
"""By the identity of a partition (which holds a dict, so it has no hash); forgotten with it."""


def tiles_of(partition: Partition, rows: Mapping[str, Rows], block: int, upload: Callable[[Tensor], Tensor]) -> Tiles:
    """Tiles of the tensors of ``rows``, numbered in their order.

    Args:
        partition: Has segments for all of them, or draws the groups of all.
        rows: Task vectors of any number of tasks on one device.
        block: Entries of a tile at most, a multiple of ``ALIGN``; where groups are drawn, per ``PER_BLOCK`` of them.
        upload: Brings a table there.
    """
    if (known := _KNOWN.get(id(partition))) is None:
        known = _KNOWN[id(partition)] = {}
        weakref.finalize(partition, _KNOWN.pop, id(partition), None)
    draws = [drawn for key in rows if (drawn := partition.scattered.get(key))]
    columns = tuple(part.values.shape[2] if part.scales is not None and not draws else None for part in rows.values())
    device = next(iter(rows.values())).values.device
    if (tiles := known.get((device, block, columns, *rows))) is None:
        slots = max((drawn.count for drawn in draws), default=1)
        runs = [[(0, drawn.size, drawn.first)] for drawn in draws] or [partition.segments[key] for key in rows]
        size = block * -(-slots // PER_BLOCK)
        parts = [_cut(of_tensor, width, size) for of_tensor, width in zip(runs, columns, strict=True)]
        owners = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        table = torch.cat([owners[:, None], torch.cat(parts)], dim=1)
        table = table[table[:, 3].argsort(stable=True)]
        levels = _levels(table[:, 3])
        widths = tuple(NARROW if (bounds.diff() <= NARROW).all() else WIDTH for bounds, _ in levels)
        placed = tuple((upload(bounds), upload(places)) for bounds, places in levels)
        drawn = upload(torch.tensor([(d.count, d.salt) for d in draws], dtype=torch.int64)) if draws else None
        tiles = known[(device, block, columns, *rows)] = Tiles(upload(table), drawn, slots, placed, widths)
    return tiles


def _cut(segments: Sequence[Segment], columns: int | None, block: int) -> Tensor:
    """Tiles of one tensor: start, stop, group, row; (T, 4). Row by row if ``columns`` (of a row) are given."""
    starts, stops, groups = torch.tensor(segments, dtype=torch.int64).view(-1, 3).unbind(1)
    starts, stops, groups = (column[stops > starts] for column in (starts, stops, groups))
    if columns and len(starts):
        cuts = torch.cat([starts, torch.arange(0, int(stops[-1]), columns)]).unique()
        groups = groups[torch.searchsorted(starts, cuts, right=True) - 1]
        starts, stops = cuts, torch.cat([cuts[1:], stops[-1:]])
    origins = starts // ALIGN * ALIGN
    counts = (stops - origins + block - 1) // block
    owners, positions = _numbered(counts)
    first = origins[owners] + positions * block
    start = torch.maximum(first, starts[owners])
    stop = torch.minimum(first + block, stops[owners])
    row = start // columns if columns else torch.zeros_like(start)
    return torch.stack([start, stop, groups[owners], row], dim=1)


def _levels(groups: Tensor) -> list[tuple[Tensor, Tensor]]:
    """As ``Tiles.levels`` has them, for tiles of these groups, (T,), in ascending order."""
    names, counts = groups.unique_consecutive(return_counts=True)
    levels = []
    while len(counts) and counts.max() > WIDTH:
        pieces = (counts + WIDTH - 1) // WIDTH
        owners, positions = _numbered(pieces)
        starts = (counts.cumsum(0) - counts)[owners] + positions * WIDTH
        levels.append((torch.cat([starts, counts.sum()[None]]), torch.arange(len(starts))))
        counts = pieces
    return [*levels, (torch.cat([counts.new_zeros(1), counts.cumsum(0)]), names)]


def _numbered(counts: Tensor) -> tuple[Tensor, Tensor]:
    """``counts[i]`` copies of i in a row, and the number of each among its likes; both (Σ counts,)."""
    owners = torch.arange(len(counts)).repeat_interleave(counts)
    return owners, torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
