"""Task vectors that come through two buffers: the same values, in order, one piece ahead."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamerge.bank import ParameterBank, streaming
from adamerge.bank.storage import DTYPES, Rows, StoredTaskVectors
from adamerge.bank.streaming import prefetched, streamed
from adamerge.errors import ConfigError
from adamerge.files import scratch_file
from adamerge.merging import Partition, contract, merge
from adamerge.merging.merge import Contraction, merge_into

SHAPES = {"visual.conv": (6, 3, 2, 2), "visual.scale": (), "visual.bias": (9,), "visual.weight": (50, 7)}
TASKS = 5
CPU = torch.device("cpu")


def make_bank(dtype: str, file: Path | None = None, *, num_tasks: int = TASKS) -> ParameterBank:
    generator = torch.Generator().manual_seed(0)
    shapes = {key: torch.Size(shape) for key, shape in SHAPES.items()}
    task_vectors = StoredTaskVectors.empty(shapes, num_tasks, DTYPES[dtype], torch.float32, file)
    for key, shape in shapes.items():
        task_vectors.store(key, slice(None), torch.randn(num_tasks, *shape, generator=generator))
    pretrained = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return ParameterBank(pretrained, task_vectors, tuple(str(task) for task in range(num_tasks)))


def widened(rows: Rows) -> Tensor:
    """(K, n)."""
    return torch.cat([wide for _, wide in rows.widened(torch.float32, 1 << 20)], dim=1)


@pytest.fixture(params=["by a thread", "at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of filling a buffer: as from a file, and as from page-locked memory."""
    if request.param == "at once":
        monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    return request.param


@pytest.fixture(params=[1, 2048, 1 << 20])
def buffer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One task at a time; a few tasks or tensors; all of it."""
    monkeypatch.setattr(streaming, "BUFFER", request.param)
    return request.param


@pytest.fixture
def always_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging takes τ through the buffers even where it need not be copied."""
    monkeypatch.setattr(sys.modules[merge_into.__module__], "streamed", prefetched)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_task_of_every_tensor_comes_once_and_in_order(dtype: str, buffer: int) -> None:
    bank = make_bank(dtype)
    found: dict[str, list[Tensor]] = {}
    for tasks, batch in prefetched(bank.task_vectors, SHAPES, CPU):
        for key, rows in batch.items():
            assert (tasks.start or 0) == sum(map(len, found.get(key, [])))
            found.setdefault(key, []).append(widened(rows).clone())
    assert list(found) == list(SHAPES)
    for key, parts in found.items():
        torch.testing.assert_close(
            torch.cat(parts), bank.task_vectors[key].view(TASKS, -1), rtol=1e-7 if dtype == "int8" else 0, atol=0
        )
    assert (len(found["visual.weight"]) > 1) == (buffer < 1 << 20)


@pytest.mark.usefixtures("way")
def test_there_are_two_buffers_of_the_size_that_was_set(buffer: int) -> None:
    bank = make_bank("float32", num_tasks=40)
    single = max(torch.Size(shape).numel() for shape in SHAPES.values()) * 4
    storages = set()
    for _, batch in prefetched(bank.task_vectors, SHAPES, CPU):
        for rows in batch.values():
            storages.add(rows.values.untyped_storage().data_ptr())
            assert rows.values.untyped_storage().nbytes() <= max(buffer, single + 256)
    assert len(storages) == (1 if buffer == 1 << 20 else 2)


def test_a_piece_is_on_its_way_while_the_one_before_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 1)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    log: list[str] = []
    fill, release = streaming._Lane.fill, streaming._Lane.release

    def logged_fill(lane: streaming._Lane, rows: Mapping[str, Rows]) -> Mapping[str, Rows]:
        log.append("fill")
        return fill(lane, rows)

    def logged_release(lane: streaming._Lane) -> None:
        log.append("release")
        release(lane)

    monkeypatch.setattr(streaming._Lane, "fill", logged_fill)
    monkeypatch.setattr(streaming._Lane, "release", logged_release)
    for _ in prefetched(make_bank("float32", num_tasks=2).task_vectors, ["visual.conv", "visual.bias"], CPU):
        log.append("work")
    middle = ["work", "release", "fill"]
    assert log == ["fill", "fill", *middle, *middle, "work", "release", "work", "release"]


@pytest.mark.usefixtures("way", "buffer", "always_prefetched")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "chunk(3)", "random(2)"])
def test_both_passes_are_the_same(dtype: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(dtype)
    partition = Partition.build(granularity, bank.shapes)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(TASKS, partition.num_groups, generator=generator)
    gradients = {key: torch.randn(shape, generator=generator) for key, shape in bank.shapes.items()}
    merged, gradient = merge(bank, weights, partition), contract(bank, gradients, partition)
    apart = Contraction(bank, partition)
    for key in reversed(gradients):
        apart.add(key, gradients[key])
    monkeypatch.setattr(sys.modules[merge_into.__module__], "streamed", streamed)
    torch.testing.assert_close(merged, merge(bank, weights, partition), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, contract(bank, gradients, partition), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apart.result(), gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("way", "buffer", "always_prefetched")
def test_inference_mode_makes_no_difference() -> None:
    bank = make_bank("bfloat16")
    partition = Partition.build("tensor", bank.shapes)
    weights = torch.ones(TASKS, partition.num_groups)
    with torch.inference_mode():
        inside = merge(bank, weights, partition)
    outside = merge(bank, weights, partition)
    assert all(torch.equal(inside[key], outside[key]) for key in SHAPES)


def test_what_lies_on_the_device_is_not_copied() -> None:
    bank = make_bank("int8")
    ((tasks, batch),) = streamed(bank.task_vectors, SHAPES, CPU)
    assert tasks == slice(None)
    assert list(batch) == list(SHAPES)
    for key, rows in batch.items():
        assert rows.values.data_ptr() == bank.task_vectors.stored(key)[0].data_ptr()


def test_what_is_computed_when_it_is_read_comes_one_at_a_time() -> None:
    read: list[str] = []

    def double(key: str, task_vectors: Tensor) -> Tensor:
        read.append(key)
        return 2 * task_vectors

    bank = make_bank("float32")
    for number, (_, batch) in enumerate(streamed(bank.transformed(double).task_vectors, SHAPES, CPU), 1):
        assert read == list(SHAPES)[:number]
        ((key, rows),) = batch.items()
        assert torch.equal(widened(rows), 2 * bank.task_vectors[key].view(TASKS, -1))


def test_nothing_comes_where_nothing_is_asked_for() -> None:
    assert not list(prefetched(make_bank("float32").task_vectors, [], CPU))


@pytest.mark.usefixtures("way")
def test_an_error_in_reading_ends_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: Mapping[str, Rows], buffer: Tensor) -> dict[str, Rows]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(streaming, "_copied", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetched(make_bank("float32").task_vectors, SHAPES, CPU))


@pytest.mark.usefixtures("way")
def test_an_iteration_may_be_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 1)
    pieces = prefetched(make_bank("float32").task_vectors, SHAPES, CPU)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not list(pieces)


def test_without_cuda_page_locking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bank = make_bank("int8")
    before = {key: bank.task_vectors.stored(key)[0].data_ptr() for key in SHAPES}
    bank.task_vectors.pin()
    assert before == {key: bank.task_vectors.stored(key)[0].data_ptr() for key in SHAPES}
    assert bank.to("meta").task_vectors["visual.weight"].device.type == "meta"


class FakeRuntime:
    """The driver's registration of page-locked memory, written down."""

    def __init__(self, error: int) -> None:
        self.error, self.registered = error, []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.registered.append((address, size, flags))
        return self.error

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        self.registered = [entry for entry in self.registered if entry[0] != address]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return fake


def test_page_locked_memory_is_one_block_that_is_unlocked_with_the_bank(runtime: FakeRuntime) -> None:
    bank, other = make_bank("int8"), make_bank("int8")
    task_vectors = bank.task_vectors
    task_vectors.pin()
    ((address, size, _),) = runtime.registered
    for key in SHAPES:
        for tensor in task_vectors.stored(key):
            assert address <= tensor.data_ptr() < tensor.data_ptr() + tensor.nbytes <= address + size
        assert torch.equal(task_vectors[key], other.task_vectors[key])
    assert bank.to("meta").task_vectors is task_vectors
    del bank, task_vectors, tensor
    assert not runtime.registered


def test_memory_that_cannot_be_locked_is_an_error(runtime: FakeRuntime) -> None:
    runtime.error = 2
    with pytest.raises(ConfigError, match=r"bank\.device=host.*CUDA error 2.*bank\.device=disk"):
        make_bank("float32").task_vectors.pin()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("granularity", ["tensor", "chunk(3)", "random(2)"])
@pytest.mark.usefixtures("buffer")
def test_streaming_to_a_gpu_gives_what_lies_there(dtype: str, where: str, granularity: str, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    with scratch_file(tmp_path / "bank") as file:
        bank = make_bank(dtype, file if where == "disk" else None)
    if where == "host":
        bank.task_vectors.pin()
        assert all(
            tensor.is_pinned() for key in SHAPES for tensor in bank.task_vectors.stored(key) if tensor is not None
        )
    there, resident = bank.to(device), make_bank(dtype).to(device)
    assert there.task_vectors is bank.task_vectors
    partition = Partition.build(granularity, bank.shapes)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(TASKS, partition.num_groups, generator=generator).to(device)
    gradients = {key: torch.randn(shape, generator=generator).to(device) for key, shape in bank.shapes.items()}
    for _ in range(3):
        torch.testing.assert_close(
            merge(there, weights, partition), merge(resident, weights, partition), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            contract(there, gradients, partition), contract(resident, gradients, partition), rtol=1e-6, atol=1e-5
        )


@pytest.mark.gpu
def test_device_memory_does_not_grow_with_the_number_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 4096)
    device, peaks = torch.device("cuda", 0), []
    for num_tasks in (8, 8, 256):  # the first compiles kernels
        bank = make_bank("float32", num_tasks=num_tasks)
        bank.task_vectors.pin()
        there = bank.to(device)
        partition = Partition.build("tensor", bank.shapes)
        weights = torch.ones(num_tasks, partition.num_groups, device=device)
        out = {key: torch.empty_like(base) for key, base in there.pretrained.items()}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        merge_into(out, there, weights, partition)
        contract(there, out, partition)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= peaks[1] + 64 * 256 * partition.num_groups  # λ's gradient itself has a row per expert
