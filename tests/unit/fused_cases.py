"""Cases that our kernels have to get right, measured against torch's own operations.

``python -m unit.fused_cases DEVICE`` prints the largest errors of every case, as JSON.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.storage import DTYPES, Rows, StoredTaskVectors
from adamerge.merging import Partition, contract, fused
from adamerge.merging.merge import merge_into

SHAPES = {
    "visual.conv1.weight": (4, 3, 5, 5),  # rows of 75
    "visual.transformer.resblocks.0.attn.in_proj_weight": (4, 96),
    "visual.transformer.resblocks.0.attn.in_proj_bias": (37,),
    "visual.transformer.resblocks.1.mlp.c_fc.weight": (2, 1040),  # rows of more than a tile
    "visual.scale": (),
    "visual.proj": (3, 300),
}
CASES = {
    f"{dtype}-{granularity}-{num_tasks}": (dtype, granularity, num_tasks)
    for dtype, granularity, num_tasks in [
        *product(DTYPES, ("task", "tensor", "block", "chunk(3)"), (1, 3, 9)),
        *product(DTYPES, ("row",), (3,)),
    ]
}
DRAWN = {
    f"{dtype}-random({count})-{num_tasks}": (dtype, f"random({count})", num_tasks)
    for dtype, count, num_tasks in product(DTYPES, (2, 30), (1, 3, 9))
}
"""Groups are drawn entry by entry, which kernels in C can do."""


def make_bank(dtype: str, num_tasks: int) -> ParameterBank:
    """Random weights and task vectors of the same size."""
    generator = torch.Generator().manual_seed(num_tasks)
    shapes = {key: torch.Size(shape) for key, shape in SHAPES.items()}
    task_vectors = StoredTaskVectors.empty(shapes, num_tasks, DTYPES[dtype], torch.float32, None)
    for key, shape in shapes.items():
        task_vectors.store(key, slice(None), torch.randn(num_tasks, *shape, generator=generator))
    pretrained = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return ParameterBank(pretrained, task_vectors, tuple(str(task) for task in range(num_tasks)))


def rows_of(bank: ParameterBank) -> dict[str, Rows]:
    return {key: Rows.of(bank.task_vectors, key) for key in bank.pretrained}


@contextmanager
def taken() -> Iterator[list[str]]:
    """All devices have kernels, for tensors of any size; collects the names of those that run."""
    names = []
    launch = fused._launch

    def counted(name: Literal["add", "contract"], *arguments: Any) -> None:
        names.append(name)
        launch(name, *arguments)

    with (
        patch.object(fused, "_launch", counted),
        patch.object(fused, "available", lambda *_: True),
        patch.object(fused, "SMALL", 0),
    ):
        yield names


def measure(case: str, device: torch.device) -> dict[str, float]:
    """Both passes of a whole bank, with kernels and in float64.

    Returns:
        ``merge`` and ``gradient``: the largest error, as a fraction of the sum of the magnitudes of all terms;
        ``launches`` of ``add`` and of ``contract``: one each, whatever the number of tensors, and one each for those
        whose groups are drawn.
    """
    dtype, granularity, num_tasks = (CASES | DRAWN)[case]
    bank = make_bank(dtype, num_tasks)
    partition = Partition.build(granularity, bank.shapes)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(num_tasks, partition.num_groups, generator=generator)
    gradients = {key: torch.randn(shape, generator=generator) for key, shape in bank.shapes.items()}
    columns = gradients["visual.proj"].t().contiguous().t()  # as a backward pass may leave it
    gradients["visual.proj"] = columns
    there = bank.to(device)
    out = {key: torch.full_like(base, torch.nan) for key, base in there.pretrained.items()}
    with taken() as names:
        merge_into(out, there, weights.to(device), partition)
        found = contract(there, {key: gradient.to(device) for key, gradient in gradients.items()}, partition)
    errors = {"launches": float(names.count("add") + names.count("contract")), "merge": 0.0}
    exact = torch.zeros(num_tasks, partition.num_groups, dtype=torch.float64)
    magnitude = exact.clone()
    for key, base in bank.pretrained.items():
        wide = bank.task_vectors[key].double().reshape(num_tasks, -1)
        if key in partition.scattered:
            groups = partition.scattered[key].groups(0, base.numel())
        else:
            groups = torch.cat([torch.full((stop - start,), group) for start, stop, group in partition.segments[key]])
        terms = weights.double()[:, groups] * wide
        size = base.double().abs().view(-1) + terms.abs().sum(0)
        difference = out[key].cpu().double().view(-1) - base.double().view(-1) - terms.sum(0)
        errors["merge"] = max(errors["merge"], float((difference.abs() / size).max()))
        products = wide * gradients[key].double().reshape(-1)
        exact.index_add_(1, groups, products)
        magnitude.index_add_(1, groups, products.abs())
    errors["gradient"] = float(((found.cpu().double() - exact).abs() / magnitude.clamp(min=1e-30)).max())
    return errors


def accepted(errors: dict[str, float], launches: int = 1) -> bool:
    """So many launches a pass, and float32 to 1e-6 (NaN is not)."""
    return errors["launches"] == 2 * launches and errors["merge"] <= 1e-6 and errors["gradient"] <= 1e-6


def gradient(dtype: str, device: torch.device, granularity: str = "task") -> Tensor:
    """∂L/∂λ of one large tensor, with thousands of tiles in a group."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((3000, 1024))
    task_vectors = StoredTaskVectors.empty({"a": shape}, 3, DTYPES[dtype], torch.float32, None)
    task_vectors.store("a", slice(None), torch.randn(3, *shape, generator=generator))
    bank = ParameterBank({"a": torch.zeros(shape)}, task_vectors, ("0", "1", "2")).to(device)
    random = torch.randn(shape, generator=generator).to(device)
    with taken() as names:
        found = contract(bank, {"a": random}, Partition.build(granularity, bank.shapes))
    assert names == ["contract"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({case: measure(case, torch.device(sys.argv[1])) for case in CASES}))  # noqa: T201
