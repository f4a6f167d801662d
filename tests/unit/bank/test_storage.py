"""Where τ lives: narrow dtypes, files, and runs of rows."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.storage import DTYPES, Rows, StoredTaskVectors, dtype_named, row_count
from adamerge.errors import ConfigError
from adamerge.files import scratch_file

SHAPES = {"visual.conv": (6, 3, 2, 2), "visual.scale": (), "visual.bias": (9,), "visual.weight": (5, 7)}
ERROR = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "int8": 0.5 / 127}
"""Largest rounding error, of an entry for floating-point numbers, of its row's largest entry for int8."""


def random_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def build(dtype: str, file: Path | None = None) -> ParameterBank:
    experts = {f"task{seed}": random_tensors(seed) for seed in (1, 2, 3)}
    return ParameterBank.from_experts(random_tensors(0), experts, list(SHAPES), stored=dtype_named(dtype), file=file)


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_vectors_come_back_within_the_rounding_of_their_dtype(dtype: str) -> None:
    exact, stored = build("float32"), build(dtype)
    for key, shape in SHAPES.items():
        found, expected = stored.task_vectors[key], exact.task_vectors[key]
        assert found.dtype == torch.float32
        assert found.shape == (3, *shape)
        rows = expected.reshape(3, row_count(shape), -1)
        size = rows.abs().amax(-1, keepdim=True) if dtype == "int8" else rows.abs()
        assert ((found.view(rows.shape) - rows).abs() <= ERROR[dtype] * (1 + 1e-5) * size).all()
    key = "visual.weight"
    assert (dtype == "float32") == torch.equal(stored.task_vectors[key], exact.task_vectors[key])


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    stored = StoredTaskVectors.empty({"a": torch.Size((2, 3))}, 1, torch.int8, torch.float32, None)
    stored.store("a", 0, torch.tensor([[0.0, 0.0, 0.0], [1.0, -127.0, 2.0]]))
    assert torch.equal(stored["a"][0], torch.tensor([[0.0, 0.0, 0.0], [1.0, -127.0, 2.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transform_in_place_is_rounded_and_kept(dtype: str) -> None:
    bank = build(dtype)
    expected = {key: 2 * tensor for key, tensor in bank.task_vectors.items()}
    doubled = bank.transformed(lambda _, task_vectors: 2 * task_vectors, in_place=True)
    for key, tensor in expected.items():
        torch.testing.assert_close(doubled.task_vectors[key], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mapped_bank_equals_one_in_memory_and_leaves_no_file(dtype: str, tmp_path: Path) -> None:
    with scratch_file(tmp_path / "bank") as file:
        mapped = build(dtype, file)
        assert file.stat().st_size == 3 * sum(torch.Size(s).numel() for s in SHAPES.values()) * DTYPES[dtype].itemsize
    assert not list((tmp_path / "bank").iterdir())
    assert mapped.to("cpu").task_vectors is mapped.task_vectors
    assert mapped.to("meta").task_vectors is mapped.task_vectors  # only θ₀ goes to the device
    for key, tensor in build(dtype).task_vectors.items():
        assert torch.equal(mapped.task_vectors[key], tensor)


def test_a_bank_in_memory_moves_with_its_scales() -> None:
    there = build("int8").to("meta")
    assert there.task_vectors["visual.weight"].device.type == "meta"


@given(st.data())
def test_a_part_is_some_whole_rows_or_a_piece_of_one(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(SHAPES)))
    bank = build(data.draw(st.sampled_from(sorted(DTYPES))))
    rows = Rows.of(bank.task_vectors, key)
    count, columns = rows.values.shape[1:]
    first = data.draw(st.integers(0, count - 1))
    if data.draw(st.booleans()):
        run = slice(first * columns, data.draw(st.integers(first + 1, count)) * columns)
    else:
        start = data.draw(st.integers(0, columns - 1))
        run = slice(first * columns + start, first * columns + data.draw(st.integers(start + 1, columns)))
    wide = torch.cat([part for _, part in rows.part(run).widened(torch.float32, 4)], dim=1)
    torch.testing.assert_close(wide, bank.task_vectors[key].reshape(3, -1)[:, run], rtol=1e-6, atol=0)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown bank\.dtype 'int4'.*float32, bfloat16, float16, int8"):
        dtype_named("int4")
