"""Tiles: every entry once, with its group and row; sums of tiles become sums of groups."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamerge.bank.storage import Rows, row_count
from adamerge.merging import Partition, tiles
from adamerge.merging.tiles import ALIGN, BLOCK, NARROW, WIDTH, Tiles, tiles_of

SHAPES = {"visual.w": (3, 1500), "visual.scale": (), "visual.b": (70,), "visual.conv": (5, 3, 7, 7)}
GRANULARITIES = ["task", "tensor", "block", "chunk(3)", "row"]


def make(partition: Partition, shapes: dict[str, tuple[int, ...]], *, scaled: bool) -> Tiles:
    rows = {}
    for key, shape in shapes.items():
        count = row_count(shape)
        values = torch.zeros(1, *shape, dtype=torch.int8).reshape(1, count, -1)
        rows[key] = Rows(values, torch.ones(1, count) if scaled else None)
    return tiles_of(partition, rows, BLOCK, lambda table: table)


def check_cover(made: Tiles, partition: Partition, shapes: dict[str, tuple[int, ...]], *, scaled: bool) -> None:
    groups = {key: torch.full((torch.Size(shape).numel(),), -1) for key, shape in shapes.items()}
    for tensor, start, stop, group, row in made.table.tolist():
        key = list(shapes)[tensor]
        columns = len(groups[key]) // row_count(shapes[key])
        assert 0 < stop - start <= BLOCK
        assert (groups[key][start:stop] == -1).all()
        groups[key][start:stop] = group
        if scaled:
            assert start // columns == row == (stop - 1) // columns
    for key, found in groups.items():
        for start, stop, group in partition.segments[key]:
            assert (found[start:stop] == group).all()


def summed(made: Tiles, sums: Tensor, groups: int) -> Tensor:
    """As the kernel ``add_runs`` does it, level by level; (T,) → (groups,)."""
    for level, ((bounds, places), width) in enumerate(zip(made.levels, made.widths, strict=True), 1):
        target = torch.zeros(groups if level == len(made.levels) else len(places), dtype=torch.float64)
        assert len(places.unique()) == len(places)
        for start, stop, place in zip(bounds[:-1].tolist(), bounds[1:].tolist(), places.tolist(), strict=True):
            assert 0 < stop - start <= width
            target[place] += sums[start:stop].sum()
        sums = target
    return sums


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tiles_cover_every_entry_once(granularity: str, scaled: bool) -> None:
    partition = Partition.build(granularity, SHAPES)
    made = make(partition, SHAPES, scaled=scaled)
    check_cover(made, partition, SHAPES, scaled=scaled)
    sums = torch.arange(1.0, made.count + 1, dtype=torch.float64)
    expected = torch.zeros(partition.num_groups, dtype=torch.float64).index_add_(0, made.table[:, 3], sums)
    assert torch.equal(summed(made, sums, partition.num_groups), expected)


@given(st.data())
def test_tiles_cover_any_segments(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2500))
    shapes = {"visual.w": (rows, columns)}
    count = data.draw(st.integers(1, min(40, rows * columns)))
    partition = Partition.build(f"chunk({count})", shapes)
    scaled = data.draw(st.booleans())
    check_cover(make(partition, shapes, scaled=scaled), partition, shapes, scaled=scaled)


def test_a_segment_that_begins_anywhere_has_aligned_tiles_inside() -> None:
    shapes = {"visual.w": (7777,)}
    made = make(Partition.build("chunk(2)", shapes), shapes, scaled=False)
    aligned = (made.table[:, 1] % ALIGN == 0) & (made.table[:, 2] % ALIGN == 0)
    assert aligned.float().mean() >= 0.6
    assert not aligned.all()


@pytest.mark.parametrize("tiles_in_group", [1, NARROW, NARROW + 1, WIDTH, WIDTH + 1, WIDTH**2 + 5])
def test_many_tiles_of_one_group_are_added_up_in_levels(tiles_in_group: int) -> None:
    shapes = {"visual.a": (tiles_in_group * BLOCK,), "visual.b": (3,)}
    made = make(Partition.build("tensor", shapes), shapes, scaled=False)
    sums = torch.ones(made.count, dtype=torch.float64)
    assert summed(made, sums, 2).tolist() == [tiles_in_group, 1]
    assert len(made.levels) == 1 + (tiles_in_group > WIDTH) + (tiles_in_group > WIDTH**2)
    assert made.widths[0] == (NARROW if tiles_in_group <= NARROW else WIDTH)


def test_tensors_without_entries_have_no_tiles() -> None:
    shapes = {"visual.none": (3, 0), "visual.empty": (0,)}
    assert make(Partition.build("tensor", shapes), shapes, scaled=True).count == 0


def test_tables_are_made_once_and_forgotten_with_the_partition() -> None:
    partition, same = Partition.build("row", SHAPES), Partition.build("row", SHAPES)
    first = make(partition, SHAPES, scaled=False)
    assert make(partition, SHAPES, scaled=False) is first
    assert make(same, SHAPES, scaled=False) is not first
    assert make(partition, SHAPES, scaled=True) is not first
    assert make(partition, {"visual.b": SHAPES["visual.b"]}, scaled=False).count == 1
    identity = id(partition)
    assert identity in tiles._KNOWN
    del partition
    gc.collect()
    assert identity not in tiles._KNOWN
