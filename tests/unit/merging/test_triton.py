"""The Triton kernels against torch's own operations: here in Triton's interpreter, on a GPU compiled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unit import fused_cases

from adamerge.bank.storage import DTYPES, Rows
from adamerge.merging import Partition, contract, fused, kernels
from adamerge.merging.merge import Contraction

CASES = sorted(fused_cases.CASES)
TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Largest errors by case; in a process of its own, because Triton looks at the variable when it is imported."""
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, "-W", "error", "-m", "unit.fused_cases", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernels_equal_torch(interpreted: dict[str, dict[str, float]], case: str) -> None:
    assert fused_cases.accepted(interpreted[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_kernels_equal_torch(case: str) -> None:
    assert fused.available(torch.device("cuda", 0), torch.bfloat16)
    assert fused_cases.accepted(fused_cases.measure(case, torch.device("cuda", 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_the_same_to_the_last_bit_every_time(dtype: str) -> None:
    found = [fused_cases.gradient(dtype, torch.device("cuda", 0)) for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("together", [0, 4000, 1 << 26])
def test_gradients_that_come_one_by_one_give_the_same(
    together: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules[Contraction.__module__]._TOGETHER, device, together)
    bank = fused_cases.make_bank("bfloat16", 3).to(torch.device(device))
    partition = Partition.build("chunk(3)", bank.shapes)
    gradients = {key: torch.randn_like(base) for key, base in bank.pretrained.items()}
    contraction = Contraction(bank, partition)
    for key in [*reversed(gradients), "visual.proj"]:
        contraction.add(key, gradients[key])
    expected = contract(bank, gradients, partition) + contract(
        bank, {"visual.proj": gradients["visual.proj"]}, partition
    )
    torch.testing.assert_close(contraction.result(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stored", DTYPES)
def test_aligned_tiles_are_read_in_as_wide_words_as_there_are(stored: str) -> None:
    # Compiled for a GPU without having one. Narrow loads would be correct, and slow.
    triton = pytest.importorskip("triton")
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("needs Triton's compiler for CUDA")
    from adamerge.merging import triton_kernels

    names = {"add": ("weights", "num_groups"), "contract": ("sums", "num_tiles")}
    for kernel, (third, last) in names.items():
        signature = {"tiles": "*i64", "tensors": "*i64", third: "*fp32", "num_tasks": "i32", last: "i32"}
        constants = {
            "STORED": triton_kernels.STORED[DTYPES[stored]],
            "SCALED": stored == "int8",
            "UNROLL": fused._AT_ONCE,
            "BLOCK": 1024,
        }
        source = compiler.ASTSource(
            getattr(triton_kernels, kernel), signature | dict.fromkeys(constants, "constexpr"), constants
        )
        target = backends.GPUTarget("cuda", 90, 32)
        made = triton.compile(
            source, target=target, options={"num_warps": fused._WARPS[kernel], "enable_fp_fusion": True}
        )
        loads = re.findall(r"ld\.global\.([.\w]+)", made.asm["ptx"])
        words = 1024 // (32 * fused._WARPS[kernel]) * DTYPES[stored].itemsize // 4  # of a thread, of one task
        wide = [load for load in loads if load == f"v{min(words, 4)}.b32"]
        assert len(wide) >= fused._AT_ONCE * max(words // 4, 1)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, adamerge.merging.merge; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_devices_without_kernels_and_devices_that_fail_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> None:
        raise RuntimeError(f"no driver\nfor {device}")

    dtype = torch.bfloat16
    assert not fused.available(torch.device("meta"), dtype)
    monkeypatch.setattr(fused, "check", fail)
    fused._works.cache_clear()
    try:
        with caplog.at_level("INFO", logger=fused.__name__):
            assert not fused.available(torch.device("cuda", 0), dtype)
            assert not fused.available(torch.device("cuda", 0), dtype)
        assert [record.getMessage() for record in caplog.records] == [
            "no kernels of torch.bfloat16 on cuda:0 (RuntimeError: no driver)"
        ]
        monkeypatch.setattr(fused, "check", lambda device, dtype: None)
        assert fused.available(torch.device("cuda", 0), torch.float32)
        assert not fused.available(torch.device("cuda", 0), torch.float64)
        assert fused.available(torch.device("cuda", 1), dtype)
        monkeypatch.setenv("ADAMERGE_KERNELS", "torch")
        assert not fused.available(torch.device("cuda", 1), dtype)
    finally:
        fused._works.cache_clear()


@pytest.mark.parametrize("broken", ["_add", "_contract"])
@pytest.mark.parametrize("stored", DTYPES)
def test_a_wrong_result_does_not_pass_the_check(broken: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(targets, rows, weights, partition) -> None:
        for key, (out, base) in targets.items():
            kernels.add_task_vectors(out, base, rows[key], weights, partition.of(key))

    def contract(gradients, rows, partition, total) -> None:
        for key, gradient in gradients.items():
            kernels.contract_task_vectors(rows[key], gradient, partition.of(key), total)

    monkeypatch.setattr(fused, "_add", add)
    monkeypatch.setattr(fused, "_contract", contract)
    fused.check(torch.device("cpu"), DTYPES[stored])
    monkeypatch.setattr(fused, broken, lambda *_: None)
    with pytest.raises(ArithmeticError, match=f"{stored} task vectors is wrong"):
        fused.check(torch.device("cpu"), DTYPES[stored])


def test_what_has_no_segments_is_handed_back_by_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "available", lambda *_: True)
    monkeypatch.setattr(fused, "_in_c", lambda _: False)
    monkeypatch.setattr(fused, "SMALL", 0)
    bank = fused_cases.make_bank("float32", 2)
    partition = Partition.build("random(3)", bank.shapes)
    rows = {key: part for key, part in fused_cases.rows_of(bank).items() if key not in partition.segments}
    assert len(rows) > 1
    out = {key: torch.empty_like(base) for key, base in bank.pretrained.items()}
    assert fused.add_all(out, bank.pretrained, rows, torch.zeros(2, partition.num_groups), partition) == rows
    total = torch.zeros(partition.num_groups, 2, dtype=torch.float64)
    assert fused.contract_all(bank.pretrained, rows, partition, total) == rows


def test_float64_is_handed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "available", lambda *_: True)
    monkeypatch.setattr(fused, "SMALL", 0)
    bank = fused_cases.make_bank("float32", 2)
    partition = Partition.build("tensor", bank.shapes)
    rows = fused_cases.rows_of(bank)
    wide = {key: base.double() for key, base in bank.pretrained.items()}
    weights = torch.zeros(2, partition.num_groups)
    total = torch.zeros(partition.num_groups, 2, dtype=torch.float64)
    assert fused.add_all(wide, wide, rows, weights, partition) == rows
    assert fused.contract_all(wide, rows, partition, total) == rows


def test_empty_tensors_merge_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "available", lambda *_: True)
    monkeypatch.setattr(fused, "SMALL", 0)
    base = {"visual.none": torch.empty(0)}
    partition = Partition.build("tensor", {"visual.none": (0,)})
    rows = {"visual.none": Rows(torch.empty(2, 1, 0), None)}
    total = torch.zeros(1, 2, dtype=torch.float64)
    assert not fused.add_all(base, base, rows, torch.ones(2, 1), partition)
    assert not fused.contract_all(base, rows, partition, total)
    assert total.tolist() == [[0, 0]]
