"""Self Positioning: a learned SLERP of task vectors under the learner's own step, and what its options do."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from reference import layerwise
from reference import slerp as reference
from torch import Tensor
from torch.func import functional_call
from unit.zoo import Zoo, make_bank, make_zoo

from adamerge.errors import ConfigError
from adamerge.learning.fit import Learned, learn
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.merging import Coefficients, MergedModel, merge
from adamerge.methods.learned import SelfPositioning
from adamerge.objectives import Entropy
from adamerge.tasks.datamodule import TaskImages, split_indices

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)


make_trainer = partial(pl.Trainer, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False)


def method(**options: Any) -> SelfPositioning:
    defaults = {"granularity": "task", "init": 0.3, "norm_cost": 0.01, "transform": None, "coefficients": None}
    return SelfPositioning(**(defaults | options))


def flat(weights: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in weights.values()]).double().numpy()


def blocks_of(zoo: Zoo, granularity: str) -> list[list[str]]:
    """Keys by group, in the groups' order."""
    _, pieces = layerwise.groups_of(zoo.pretrained, granularity)
    groups = [pieces[key][0][1] for key in pieces]
    return [[key for key, group in zip(pieces, groups, strict=True) if group == g] for g in range(max(groups) + 1)]


def reference_merge(zoo: Zoo, granularity: str, raw: np.ndarray) -> dict[str, Tensor]:
    """θ₀ plus each group's SLERP of flattened task vectors, by raw (K + 1, G)."""
    merged = {}
    for group, keys in enumerate(blocks_of(zoo, granularity)):
        vectors = np.stack([flat({key: expert[key] - zoo.pretrained[key] for key in keys}) for expert in zoo.experts])
        vector = torch.from_numpy(reference.joined(vectors, np.exp(raw[:-1, group]), raw[-1, group]))
        for key, part in zip(keys, vector.split([zoo.pretrained[key].numel() for key in keys]), strict=True):
            merged[key] = zoo.pretrained[key] + part.view_as(zoo.pretrained[key])
    return merged


@pytest.fixture
def wide() -> Iterator[Zoo]:
    """A zoo in float64, which λ and inner products then are in, too."""
    torch.set_default_dtype(torch.float64)
    yield make_zoo(torch.float64)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_merges_the_slerp_of_the_flattened_task_vectors(wide: Zoo, granularity: str) -> None:
    partition, coefficients = method(granularity=granularity).prepare(wide.bank)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        coefficients.raw.copy_(torch.randn(coefficients.raw.shape, generator=generator))
    found = merge(wide.bank, coefficients().detach(), partition)
    expected = reference_merge(wide, granularity, coefficients.raw.detach().numpy())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("granularity", ["task", "block"])
def test_gradient_of_weights_and_norm_against_finite_differences_of_the_reference(wide: Zoo, granularity: str) -> None:
    """Loss(raw) along random directions, with no code of the package in it."""

    def loss(raw: np.ndarray) -> float:
        merged = reference_merge(wide, granularity, raw)
        total = 0.0
        for head, images in zip(wide.heads, wide.batches[0], strict=True):
            features = functional_call(wide.network, merged, (torch.cat(images),))
            features = features / features.norm(dim=1, keepdim=True)
            total += float(layerwise.mean_entropy(features @ head.T))
        return total

    partition, coefficients = method(granularity=granularity, init=[0.2, 0.5, 0.3]).prepare(wide.bank)
    model = MergedModel(wide.network, wide.bank, partition)
    value = coefficients()
    model.update(value)
    names = [f"task{k}" for k in range(3)]
    losses = TaskLosses(Entropy(), dict(zip(names, wide.heads, strict=True)), dict.fromkeys(names, 1.0), True)
    images = {name: torch.cat(of_task) for name, of_task in zip(names, wide.batches[0], strict=True)}
    weights = {name: torch.full((len(part),), 1 / len(part)) for name, part in images.items()}
    losses.backward(model, {"images": images, "weights": weights, "targets": {name: {} for name in names}})
    (slope,) = torch.autograd.grad(value, coefficients.raw, model.coefficient_gradient())
    at, width = coefficients.raw.detach().numpy(), 1e-5
    for seed in range(4):
        way = np.random.default_rng(seed).standard_normal(at.shape)
        expected = (loss(at + width * way) - loss(at - width * way)) / (2 * width)
        assert float((slope.numpy() * way).sum()) == pytest.approx(expected, rel=1e-5)


def trained(
    zoo: Zoo, run_dir: Path, chosen: SelfPositioning, steps: int, optimizer: Any = torch.optim.Adam, lr: float = 3e-2
) -> tuple[Learned, Coefficients]:
    """Learned on a probe set of four of thirty images of each task."""
    partition, coefficients = chosen.prepare(zoo.bank)
    model = MergedModel(Pixels(zoo.network), zoo.bank, partition)
    generator = torch.Generator().manual_seed(5)
    size = (30, 3, 8, 8)
    images = {task: torch.randint(256, size, generator=generator, dtype=torch.uint8) for task in zoo.bank.task_names}
    options = {"adapt": "all", "split_seed": 0, "fraction": 1.0, "images_per_task": 4}
    probe = {task: split_indices(len(of_task), task, **options)[0] for task, of_task in images.items()}
    data = TaskImages(images, probe, images_per_batch=16, batches_per_step=1, seed=0)
    assert {task: len(drawn) for task in images for drawn in data.draw(task, 0)} == dict.fromkeys(images, 4)
    heads = dict(zip(zoo.bank.task_names, zoo.heads, strict=True))
    found = learn(
        model,
        coefficients,
        TaskLosses(Entropy(), heads, dict.fromkeys(heads, 1.0), "auto"),
        data,
        run_dir=run_dir,
        make_trainer=partial(make_trainer, max_steps=steps),
        optimizer=partial(optimizer, lr=lr),
        schedule=Schedule(steps=steps, decay="constant", average=0, patience=0),
        penalty=chosen.penalty,
        resume=False,
    )
    return found, coefficients


class Pixels(torch.nn.Module):
    """uint8 images → features of the toy tower."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.visual = network.visual

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images.float() / 64 - 2)


@pytest.mark.parametrize("granularity", ["task", "tensor"])
def test_the_loss_falls_while_weights_and_norms_alone_learn(zoo: Zoo, tmp_path: Path, granularity: str) -> None:
    before = {name: tensor.clone() for name, tensor in zoo.network.state_dict().items()}
    found, coefficients = trained(zoo, tmp_path, method(granularity=granularity), 30)
    losses = found.losses.sum(1)
    assert losses[-1] < losses[0] - 0.02  # of the same probe images at every step
    assert [name for name, _ in coefficients.named_parameters()] == ["raw"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in zoo.network.state_dict().items())
    groups = found.partition.num_groups
    assert tuple(coefficients.raw.shape) == (4, groups)
    assert tuple(found.coefficients.shape) == (3, groups)  # λ, which any merge and export takes
    torch.testing.assert_close(found.coefficients, coefficients().detach())
    start = method(granularity=granularity).prepare(zoo.bank)[1]
    assert (coefficients.raw - start.raw).abs().amax(1).min() > 1e-3  # every weight and the norm


def test_starts_at_init_in_any_order(zoo: Zoo) -> None:
    for granularity in ("task", "tensor"):
        coefficients = method(granularity=granularity, init=[0.1, 0.2, 0.4]).prepare(zoo.bank)[1]
        expected = torch.tensor([[0.1], [0.2], [0.4]]).expand_as(coefficients())
        torch.testing.assert_close(coefficients().detach(), expected, rtol=1e-5, atol=0)


def test_a_step_takes_the_cost_off_the_norm_and_off_nothing_else(zoo: Zoo, tmp_path: Path) -> None:
    free, dear = (
        trained(zoo, tmp_path / str(cost), method(norm_cost=cost), 1, torch.optim.SGD, lr=0.1)[1].raw.detach()
        for cost in (0, 0.2)
    )
    expected = torch.tensor([[0.0], [0.0], [0.0], [0.1 * 3 * 0.2]])
    torch.testing.assert_close(free - dear, expected, rtol=0, atol=1e-6)


def test_the_cost_is_the_published_one_of_a_mean_over_tasks() -> None:
    raw = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.5, 0.7]], requires_grad=True)  # K = 2, G = 2; the norms last
    cost = method(norm_cost=0.05).penalty(torch.ones(2, 2), raw)
    assert cost is not None
    assert cost.item() == pytest.approx(0.05 * 2 * 0.6)
    cost.backward()
    torch.testing.assert_close(raw.grad, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.05, 0.05]]))
    assert method(norm_cost=0).penalty(torch.ones(2, 2), raw) is None


def test_learns_from_a_narrow_bank(zoo: Zoo) -> None:
    """Inner products of what is stored: the start is exact, whatever that rounds."""
    bank = make_bank(zoo.pretrained, zoo.experts, stored=torch.int8)
    coefficients = method(granularity="tensor").prepare(bank)[1]
    torch.testing.assert_close(coefficients().detach(), torch.full_like(coefficients(), 0.3), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_cost": -1.0}, r"method\.norm_cost is at least 0, found -1"),
        ({"granularity": "row"}, r"granularity 'row' divides tensors"),
        ({"init": -0.1}, r"at least 0, found -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(zoo: Zoo, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options).prepare(zoo.bank)
