"""Which group every entry belongs to."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import layerwise

from adamerge.errors import ConfigError
from adamerge.merging import Partition

SHAPES = {
    "visual.class_embedding": (4,),
    "visual.proj": (4, 3),
    "visual.conv1.weight": (4, 3, 2, 2),
    "visual.transformer.resblocks.1.ln_1.weight": (4,),
    "visual.transformer.resblocks.0.ln_1.weight": (4,),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (7, 4),
    "visual.transformer.resblocks.10.ln_1.bias": (1,),
    "visual.ln_post.weight": (4,),
}
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
granularities = st.one_of(st.sampled_from(["task", "tensor", "block"]), st.integers(1, 9).map("chunk({})".format))


def group_of_entries(partition: Partition, key: str) -> list[int]:
    """The group of every entry of the flattened tensor, in order."""
    if key in partition.scattered:
        return partition.scattered[key].groups(0, partition.sizes[key]).tolist()
    return [group for start, stop, group in partition.segments[key] for _ in range(start, stop)]


def test_task_is_one_group() -> None:
    partition = Partition.build("task", SHAPES)
    assert partition.num_groups == 1
    assert {group for key in SHAPES for group in group_of_entries(partition, key)} == {0}


def test_tensor_is_one_group_a_key_in_order() -> None:
    partition = Partition.build("tensor", SHAPES)
    assert partition.groups == tuple(SHAPES)
    assert [set(group_of_entries(partition, key)) for key in SHAPES] == [{i} for i in range(len(SHAPES))]


def test_block_groups_run_from_the_embeddings_to_the_output() -> None:
    partition = Partition.build("block", SHAPES)
    assert partition.groups == ("embedding", "block.0", "block.1", "block.10", "output")
    assert {key: partition.groups[group_of_entries(partition, key)[0]] for key in SHAPES} == {
        "visual.class_embedding": "embedding",
        "visual.proj": "output",
        "visual.conv1.weight": "embedding",
        "visual.transformer.resblocks.1.ln_1.weight": "block.1",
        "visual.transformer.resblocks.0.ln_1.weight": "block.0",
        "visual.transformer.resblocks.0.mlp.c_fc.weight": "block.0",
        "visual.transformer.resblocks.10.ln_1.bias": "block.10",
        "visual.ln_post.weight": "output",
    }


def test_chunks_of_a_tensor_differ_by_one_entry_at_most() -> None:
    partition = Partition.build("chunk(3)", {"long": (2, 4), "short": (2,), "scalar": ()})
    assert partition.segments == {
        "long": ((0, 2, 0), (2, 5, 1), (5, 8, 2)),
        "short": ((0, 1, 3), (1, 2, 4)),
        "scalar": ((0, 1, 5),),
    }
    assert partition.groups == ("long[0]", "long[1]", "long[2]", "short[0]", "short[1]", "scalar")


def test_one_chunk_is_the_tensor_granularity() -> None:
    assert Partition.build("chunk(1)", SHAPES).segments == Partition.build("tensor", SHAPES).segments


@given(sizes, granularities)
def test_segments_cover_every_entry_once(lengths: list[int], granularity: str) -> None:
    shapes = {f"visual.transformer.resblocks.{i}.weight": (length,) for i, length in enumerate(lengths)}
    partition = Partition.build(granularity, shapes)
    seen = set()
    for key, (length,) in shapes.items():
        end = 0
        for start, stop, group in partition.segments[key]:
            assert start == end < stop
            end = stop
            seen.add(group)
        assert end == length
    assert seen == set(range(partition.num_groups))
    assert len(set(partition.groups)) == partition.num_groups


@given(sizes, st.integers(1, 9))
def test_chunk_lengths_are_balanced(lengths: list[int], count: int) -> None:
    partition = Partition.build(f"chunk({count})", {str(i): (length,) for i, length in enumerate(lengths)})
    for i, length in enumerate(lengths):
        pieces = [stop - start for start, stop, _ in partition.segments[str(i)]]
        assert len(pieces) == min(count, length)
        assert max(pieces) - min(pieces) <= 1


def test_a_row_is_an_output_channel_and_a_vector_is_one_row() -> None:
    partition = Partition.build("row", {"matrix": (3, 4), "vector": (5,), "filters": (2, 3, 2, 2)})
    assert partition.segments == {
        "matrix": ((0, 4, 0), (4, 8, 1), (8, 12, 2)),
        "vector": ((0, 5, 3),),
        "filters": ((0, 12, 4), (12, 24, 5)),
    }
    assert partition.groups == ("matrix[0]", "matrix[1]", "matrix[2]", "vector", "filters[0]", "filters[1]")


def test_random_groups_are_equally_likely_and_depend_on_seed_and_key_alone() -> None:
    shapes = {"a": (200, 100), "b": (200, 100), "short": (2,)}
    partition = Partition.build("random(4)", shapes)
    found = {key: torch.tensor(group_of_entries(partition, key)) for key in shapes}
    assert torch.bincount(found["a"]).tolist() == pytest.approx([5000] * 4, rel=0.05)
    assert found["b"].unique().tolist() == [4, 5, 6, 7]
    pairs = torch.bincount(found["a"] * 4 + found["b"] - 4, minlength=16)
    assert pairs.tolist() == pytest.approx([1250] * 16, rel=0.15)  # independent of each other
    neighbours = torch.bincount(found["a"][1:] * 4 + found["a"][:-1], minlength=16)
    assert neighbours.tolist() == pytest.approx([1250] * 16, rel=0.15)
    assert set(found["short"].tolist()) <= {8, 9}
    other = Partition.build("random(4)", shapes, seed=1)
    assert torch.tensor(group_of_entries(other, "a")).ne(found["a"]).float().mean().item() == pytest.approx(
        0.75, abs=0.02
    )
    piece = partition.scattered["a"].groups(777, 1999)
    assert torch.equal(piece, found["a"][777:1999])


def test_random_groups_are_those_of_splitmix64() -> None:
    _, pieces = layerwise.groups_of({"a": torch.empty(4096)}, "random(1000)")
    assert group_of_entries(Partition.build("random(1000)", {"a": (4096,)}), "a") == [group for _, group in pieces["a"]]


@pytest.mark.parametrize("granularity", ["task", "tensor", "block", "chunk(3)", "row", "random(3)"])
def test_json_gives_back_an_equal_partition(granularity: str) -> None:
    partition = Partition.build(granularity, SHAPES)
    assert Partition.from_json(json.loads(json.dumps(partition.to_json()))) == partition


@pytest.mark.parametrize(
    "granularity", ["layer", "chunk", "chunk()", "random(-1)", "rows", "chunk(x)", "chunk(-1)", "tensor ", ""]
)
def test_unknown_granularity_lists_the_known_ones(granularity: str) -> None:
    with pytest.raises(ConfigError, match="task, block, tensor, row"):
        Partition.build(granularity, SHAPES)


def test_no_chunks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="n ≥ 1"):
        Partition.build("chunk(0)", SHAPES)
