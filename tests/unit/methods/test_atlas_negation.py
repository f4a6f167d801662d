"""aTLAS for negation: one vector, two losses of opposite signs, and the rule that keeps the control."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import atlas as reference
from torch import Tensor
from unit.labelled import Labelled
from unit.zoo import Zoo, make_zoo

from adamerge.errors import ConfigError
from adamerge.learning.selection import Selection
from adamerge.merging import MergedModel, merge
from adamerge.methods.learned import AtlasNegation

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)

TARGET, CONTROL = "task2", "task0"
OTHERS = [0, 1]


def method(**options: Any) -> AtlasNegation:
    defaults = {
        "granularity": "tensor",
        "init": 0.0,
        "target": TARGET,
        "control": CONTROL,
        "keep": 0.95,
        "select_every": 10,
        "transform": None,
        "coefficients": None,
    }
    return AtlasNegation(**(defaults | options))


def test_starts_at_the_pretrained_model(zoo: Zoo) -> None:
    partition, coefficients = method().prepare(zoo.bank)
    merged = merge(zoo.bank, coefficients().detach(), partition)
    assert all(torch.equal(merged[key], tensor) for key, tensor in zoo.pretrained.items())


@pytest.mark.parametrize("start", [0.0, -0.5])
def test_a_step_climbs_the_targets_loss_and_descends_the_controls(zoo: Zoo, tmp_path: Path, start: float) -> None:
    """In float64 and against a gradient by autograd of the formula."""
    torch.set_default_dtype(torch.float64)
    try:
        wide = make_zoo(torch.float64)
        labelled = Labelled(wide, wide.bank)
        descent = partial(torch.optim.SGD, lr=1.0)
        found, coefficients = labelled.run(method(init=start), tmp_path, 1, optimizer=descent)
        at = torch.zeros(3, found.partition.num_groups)
        at[2] = start
        at.requires_grad_()
        images = [of_task.double() / 64 - 2 for of_task in labelled.images.values()]
        labels = list(labelled.labels.values())
        of_control, _, of_target = reference.cross_entropies(
            wide.network, wide.pretrained, wide.experts, wide.heads, images, labels, at
        )
        (slope,) = torch.autograd.grad(of_control - of_target, at)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.tasks == (TARGET, CONTROL)
    torch.testing.assert_close(found.losses[0], torch.stack([-of_target, of_control]).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close((at - coefficients().detach())[2], slope[2], rtol=1e-8, atol=1e-11)
    assert (found.coefficients[OTHERS] == 0).all()


def test_the_target_is_forgotten_and_its_vector_alone_learns(zoo: Zoo, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in zoo.network.state_dict().items()}
    found, coefficients = Labelled(zoo, zoo.bank).run(method(), tmp_path, 40)
    of_target, of_control = -found.losses[:, 0], found.losses[:, 1]
    assert of_target[-1] > 1.2 * of_target[0]
    assert of_target[-1] - of_target[0] > of_control[-1] - of_control[0]
    assert (coefficients.raw[OTHERS] == 0).all()
    assert (coefficients.raw[2] != 0).all()
    assert (found.coefficients[OTHERS] == 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in zoo.network.state_dict().items())


def test_losses_have_opposite_signs() -> None:
    assert [method().factor(task) for task in (TARGET, CONTROL)] == [-1, 1]
    assert list(method().learns_from(("task0", "task1", "task2"))) == [TARGET, CONTROL]


# What a candidate is worth

PRETRAINED = {TARGET: 0.7, CONTROL: 0.6}


@pytest.mark.parametrize(
    ("target", "control", "expected"),
    [
        (0.7, 0.6, -0.7),  # the pretrained model itself
        (0.2, 0.9, -0.2),  # more of the control is no merit
        (0.2, 0.571, -0.2),  # 0.95 · 0.6 = 0.57
        (0.1, 0.569, None),
    ],
)
def test_the_least_accuracy_on_the_target_while_the_control_is_kept(
    target: float, control: float, expected: float | None
) -> None:
    assert method().merit({TARGET: target, CONTROL: control}, PRETRAINED, {}) == expected


@pytest.mark.parametrize(("keep", "fit"), [(1.0, False), (0.9, True), (0.0, True)])
def test_keep_is_the_share_of_the_pretrained_models_accuracy(keep: float, fit: bool) -> None:
    found = method(keep=keep).merit({TARGET: 0.5, CONTROL: 0.55}, PRETRAINED, {})
    assert found == (-0.5 if fit else None)


def selection(scores: list[tuple[float, float]], seen: list[Tensor], every: int = 2) -> Selection:
    """Gives made-up accuracies (target, control) to one candidate after another, and notes their weights."""
    coming = iter(scores)

    def score(model: MergedModel) -> dict[str, float]:
        seen.append(torch.cat([tensor.flatten() for tensor in model.weights().values()]).clone())
        return dict(zip((TARGET, CONTROL), next(coming), strict=True))

    chosen = method()
    return Selection(every, score, lambda merged: chosen.merit(merged, PRETRAINED, {}))


def test_the_run_ends_where_the_control_is_lost_and_gives_the_best_before(zoo: Zoo, tmp_path: Path) -> None:
    """The candidates are the start and the iterates after 2, 4, 6 and 8 steps; that of 4 steps is made the best."""
    seen: list[Tensor] = []
    scores = [(0.7, 0.6), (0.5, 0.6), (0.3, 0.58), (0.4, 0.6), (0.1, 0.5), (0.0, 0.6)]
    found, _ = Labelled(zoo, zoo.bank).run(method(), tmp_path / "run", 20, selection=selection(scores, seen))
    assert found.steps == 8
    assert len(seen) == 5
    assert found.losses[:8].isfinite().all()
    assert found.losses[8:].isnan().all()
    expected, _ = Labelled(zoo, zoo.bank).run(method(), tmp_path / "four", 4)
    assert torch.equal(found.coefficients, expected.coefficients)


def test_a_control_that_is_lost_at_once_leaves_the_pretrained_model(zoo: Zoo, tmp_path: Path) -> None:
    scores = [(0.7, 0.6), (0.1, 0.2)]
    found, _ = Labelled(zoo, zoo.bank).run(method(), tmp_path, 20, selection=selection(scores, []))
    assert found.steps == 2
    assert torch.equal(found.coefficients, torch.zeros_like(found.coefficients))


def test_a_start_that_has_lost_the_control_is_not_learned_from(zoo: Zoo, tmp_path: Path) -> None:
    chosen = method(init=-2.0)
    found, _ = Labelled(zoo, zoo.bank).run(chosen, tmp_path, 20, selection=selection([(0.1, 0.2)], []))
    assert found.steps == 0
    expected = torch.zeros_like(found.coefficients)
    expected[2] = -2
    assert torch.equal(found.coefficients, expected)


def test_candidates_come_as_often_as_asked() -> None:
    assert method(select_every=7).candidates_every == 7


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": TARGET}, r"method\.target and method\.control are both 'task2'"),
        ({"select_every": 0}, r"method\.select_every is at least 1, found 0"),
        ({"keep": 1.5}, r"method\.keep lies in \[0, 1\], found 1\.5"),
        ({"keep": -0.1}, r"method\.keep lies in \[0, 1\], found -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options)


@pytest.mark.parametrize("option", ["target", "control"])
def test_tasks_that_are_not_merged_are_refused(zoo: Zoo, option: str) -> None:
    chosen = method(**{option: "mnist"})
    with pytest.raises(ConfigError, match=rf"method\.{option}=mnist is not among the tasks"):
        chosen.learns_from(zoo.bank.task_names)


def test_a_target_that_is_not_merged_has_no_vector(zoo: Zoo) -> None:
    with pytest.raises(ConfigError, match=r"method\.target=mnist is not among the tasks"):
        method(target="mnist").prepare(zoo.bank)
