"""The kernels in C against torch's own operations."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from unit import fused_cases

from adamerge.bank.storage import DTYPES, Rows
from adamerge.merging import Partition, fused, native
from adamerge.merging.merge import merge_into

CPU = torch.device("cpu")


def compiles() -> bool:
    try:
        native._library(native.BLOCK)
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return False
    return True


needs_compiler = pytest.mark.skipif(not compiles(), reason="needs a C compiler")


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Nothing compiled is known before a test or after it."""
    caches = (native._library, fused._works)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=["-mno-avx512f", "-mno-avx2"])
def shorter_vectors(request: pytest.FixtureRequest, forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is compiled for an x86-64 CPU that lacks something."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("needs an x86-64 CPU")
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} {request.param}")


@needs_compiler
@pytest.mark.parametrize("case", sorted(fused_cases.CASES))
def test_a_launch_equals_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BLOCK", 512)  # so that some tensors have several tiles
    assert fused_cases.accepted(fused_cases.measure(case, CPU))


@needs_compiler
@pytest.mark.parametrize("case", sorted(fused_cases.DRAWN))
def test_so_it_does_where_groups_are_drawn(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BLOCK", 512)
    assert fused_cases.accepted(fused_cases.measure(case, CPU), launches=2)  # the scalar has a single group


@needs_compiler
@pytest.mark.usefixtures("shorter_vectors")
def test_cpus_with_shorter_vectors_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BLOCK", 512)
    for cases, launches in ((fused_cases.CASES, 1), (fused_cases.DRAWN, 2)):
        assert not [
            case for case in sorted(cases) if not fused_cases.accepted(fused_cases.measure(case, CPU), launches)
        ]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["task", "random(5)"])
def test_the_last_bit_does_not_depend_on_the_number_of_threads(granularity: str, dtype: str) -> None:
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(fused_cases.gradient(dtype, CPU, granularity))
    torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 5])
def test_all_numbers_of_two_bytes_are_widened_exactly(dtype: torch.dtype, offset: int) -> None:
    widen_all(dtype, offset)


@needs_compiler
@pytest.mark.usefixtures("shorter_vectors")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_so_they_are_in_shorter_vectors(dtype: torch.dtype) -> None:
    widen_all(dtype, 5)


def widen_all(dtype: torch.dtype, offset: int) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).roll(offset)
    rows = {"a": Rows(values.view(1, 1, -1)[..., offset:].contiguous(), None)}
    expected = values[offset:].float()
    base = {"a": torch.zeros_like(expected)}
    out = {"a": torch.full_like(expected, 7)}
    with fused_cases.taken() as names:
        partition = Partition.build("tensor", {"a": expected.shape})
        assert not fused.add_all(out, base, rows, torch.ones(1, 1), partition)
    assert names == ["add"]
    number = ~expected.isnan()
    assert torch.equal(out["a"][number], expected[number])
    assert out["a"][~number].isnan().all()


@needs_compiler
@pytest.mark.parametrize("granularity", ["chunk(3)", "random(3)"])
def test_nothing_beside_a_tensor_is_read_or_written(granularity: str) -> None:
    shape = (1, 37)
    room = torch.full((3, 5 + 37 + 5), torch.nan)
    base, out, values = room[:, 5:-5].unbind()
    base.copy_(torch.arange(37.0))
    values.fill_(1)
    rows = {"a": Rows(values.view(1, *shape), None)}
    with fused_cases.taken():
        partition = Partition.build(granularity, {"a": shape})
        assert not fused.add_all({"a": out}, {"a": base}, rows, torch.full((1, 3), 2.0), partition)
        total = torch.zeros(3, 1, dtype=torch.float64)
        assert not fused.contract_all({"a": base}, rows, partition, total)
    assert torch.equal(out, torch.arange(37.0) + 2)
    assert total.sum() == base.sum()
    assert room[:, :5].isnan().all()
    assert room[:, -5:].isnan().all()


def test_small_merges_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda _: pytest.fail("compiled"))
    bank = fused_cases.make_bank("bfloat16", 3)
    partition = Partition.build("tensor", bank.shapes)
    out = {key: torch.empty_like(base) for key, base in bank.pretrained.items()}
    merge_into(out, bank, torch.zeros(3, partition.num_groups), partition)
    assert all(torch.equal(out[key], base) for key, base in bank.pretrained.items())


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("compiler", [f"{sys.executable} -c 'raise SystemExit(1)'", "no-such-compiler", None])
def test_without_a_compiler_that_works_torch_does_it(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(fused, "SMALL", 0)
    bank = fused_cases.make_bank("float32", 1)
    partition = Partition.build("tensor", bank.shapes)
    out = {key: torch.empty_like(base) for key, base in bank.pretrained.items()}
    with caplog.at_level("INFO", logger=fused.__name__):
        merge_into(out, bank, torch.ones(1, partition.num_groups), partition)
    for key, base in bank.pretrained.items():
        torch.testing.assert_close(out[key], base + bank.task_vectors[key][0])
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "no kernels of torch.float32 on cpu"
    ]


@needs_compiler
@pytest.mark.usefixtures("forgetful")
def test_a_library_that_is_wrong_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.available(CPU, torch.float32)
    fused._works.cache_clear()
    monkeypatch.setattr(native, "run", lambda *_: None)
    assert not fused.available(CPU, torch.float32)
    assert not fused.available(CPU, torch.float64)


def test_the_environment_can_ask_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGE_KERNELS", "torch")
    assert not fused.available(CPU, torch.float32)
