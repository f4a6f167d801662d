"""Recorded steps against the same steps launched kernel by kernel."""

import pytest
import torch
from torch import Tensor

from adamerge.learning.recorded import Recorded

pytestmark = pytest.mark.gpu


def slope(weight: Tensor, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    leaf = weight.detach().requires_grad_()
    losses = torch.stack([(image.float() @ leaf).square().mean() for image in batch["images"].values()])
    losses.sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def batch_of(size: int, seed: int) -> dict[str, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return {"images": {task: torch.randn(size, 64, generator=random).cuda() for task in "ab"}}


def test_gives_what_the_function_gives() -> None:
    recorded = Recorded(slope, torch.device("cuda", torch.cuda.current_device()))
    for seed in range(6):
        weight, batch = torch.randn(64, 32, device="cuda"), batch_of(8 if seed % 2 else 16, seed)
        found = [tensor.clone() for tensor in recorded(weight, batch)]
        for tensor, expected in zip(found, slope(weight, batch), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_records_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(weight: Tensor, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, ...]:
        calls.append(weight.shape)
        return slope(weight, batch)

    recorded = Recorded(counted, torch.device("cuda", torch.cuda.current_device()))
    for seed in range(5):
        recorded(torch.randn(64, 32, device="cuda"), batch_of(8, seed))
    assert len(calls) == 3  # two runs and the recording


def test_what_cannot_be_recorded_runs_as_it_stands(caplog: pytest.LogCaptureFixture) -> None:
    def looks(weight: Tensor) -> tuple[Tensor, ...]:
        return (weight * float(weight.sum()),)

    recorded = Recorded(looks, torch.device("cuda", torch.cuda.current_device()))
    for seed in range(5):
        weight = torch.full((3,), float(seed), device="cuda")
        assert recorded(weight)[0].tolist() == [3.0 * seed * seed] * 3
    assert len(caplog.records) == 1
    assert "one kernel at a time" in caplog.text
    assert slope(torch.randn(64, 32, device="cuda"), batch_of(8, 0))[0].isfinite().all()  # the device is well
