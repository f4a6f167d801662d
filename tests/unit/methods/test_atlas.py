"""aTLAS: λ from zero by labels, what a target never sees, budgets and regularisers against an independent account."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import atlas as reference
from torch import Tensor
from unit.labelled import Labelled
from unit.zoo import Zoo, make_bank, make_zoo

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.learning.selection import Selection
from adamerge.merging import merge
from adamerge.methods.learned import Atlas
from adamerge.methods.transforms import Ties

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)

TARGET = "task1"
OTHERS = [0, 2]  # rows of λ that are not its
DESCENT = partial(torch.optim.SGD, lr=1.0)


def method(**options: Any) -> Atlas:
    defaults = {
        "granularity": "tensor",
        "seed": 0,
        "others": "tensor",
        "init": 0.0,
        "target": None,
        "budget": None,
        "norm": None,
        "select_every": None,
        "transform": None,
        "coefficients": None,
    }
    return Atlas(**(defaults | options))


@pytest.fixture
def wide() -> Iterator[Zoo]:
    """A zoo in float64, which λ is then in, too."""
    torch.set_default_dtype(torch.float64)
    yield make_zoo(torch.float64)
    torch.set_default_dtype(torch.float32)


def reference_losses(labelled: Labelled, coefficients: Tensor, granularity: str = "tensor") -> list[Tensor]:
    """By task, of all images."""
    zoo = labelled.zoo
    images = [labelled.images[name].to(zoo.heads[0].dtype) / 64 - 2 for name in labelled.images]
    labels = list(labelled.labels.values())
    return reference.cross_entropies(
        zoo.network, zoo.pretrained, zoo.experts, zoo.heads, images, labels, coefficients, granularity
    )


def reference_gradient(labelled: Labelled, at: Tensor, tasks: list[int], granularity: str = "tensor") -> Tensor:
    """∂/∂λ (K, G) of the sum over some tasks."""
    at = at.clone().requires_grad_()
    losses = reference_losses(labelled, at, granularity)
    (found,) = torch.autograd.grad(sum(losses[task] for task in tasks), at)
    return found


# From zero


@pytest.mark.parametrize("options", [{}, {"granularity": "random(3)"}, {"target": TARGET}, {"granularity": "task"}])
def test_starts_at_the_pretrained_model(zoo: Zoo, options: dict[str, Any]) -> None:
    partition, coefficients = method(**options).prepare(zoo.bank)
    value = coefficients().detach()
    assert torch.equal(value, torch.zeros_like(value))
    merged = merge(zoo.bank, value, partition)
    assert all(torch.equal(merged[key], tensor) for key, tensor in zoo.pretrained.items())


@pytest.mark.parametrize("granularity", ["tensor", "random(3)"])
@pytest.mark.parametrize("norm", [None, 1, 2])
def test_a_step_follows_the_references_gradient(wide: Zoo, tmp_path: Path, granularity: str, norm: int | None) -> None:
    """From where every p-norm is smooth, unbounded: some λ start below 0 or above 1."""
    labelled, start = Labelled(wide, wide.bank), [-0.4, 0.3, 1.2]
    chosen = method(granularity=granularity, others="random", norm=norm, init=start)
    found, coefficients = labelled.run(chosen, tmp_path, 1, optimizer=DESCENT)
    at = torch.tensor(start)[:, None].repeat(1, found.partition.num_groups)
    losses = reference_losses(labelled, at, granularity)
    torch.testing.assert_close(found.losses[0], torch.stack(losses), rtol=1e-9, atol=0)
    slope = reference_gradient(labelled, at, [0, 1, 2], granularity)
    if norm == 1:
        slope += 0.5 * torch.tensor([-1.0, 1, 1])[:, None] / found.partition.num_groups
    elif norm == 2:
        slope += 0.5 * torch.tensor([-0.4, 0.3, 1.2])[:, None] / 1.3 / found.partition.num_groups  # 1.3² = .16+.09+1.44
    torch.testing.assert_close(at - coefficients.raw.detach(), slope, rtol=1e-8, atol=1e-11)


def test_the_loss_falls_while_coefficients_alone_learn(zoo: Zoo, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in zoo.network.state_dict().items()}
    task_vectors = {key: tensor.clone() for key, tensor in zoo.bank.task_vectors.items()}
    found, coefficients = Labelled(zoo, zoo.bank).run(method(), tmp_path, 40)
    totals = found.losses.sum(1)  # of the same images at every step
    assert totals[-1] < 0.9 * totals[0]
    assert [name for name, _ in coefficients.named_parameters()] == ["raw"]
    assert (coefficients.raw != 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in zoo.network.state_dict().items())
    assert all(torch.equal(zoo.bank.task_vectors[key], tensor) for key, tensor in task_vectors.items())


# A target and the other tasks' vectors


def with_expert(zoo: Zoo, task: int, expert: dict[str, Tensor]) -> ParameterBank:
    names = zoo.bank.task_names
    experts = dict(zip(names, zoo.experts, strict=True)) | {names[task]: expert}
    return ParameterBank.from_experts(zoo.pretrained, experts, list(zoo.pretrained))


@pytest.mark.parametrize(
    "options", [{}, {"budget": 2}, {"norm": 2, "init": 0.1}, {"granularity": "random(3)"}, {"granularity": "task"}]
)
def test_a_target_is_learned_from_its_own_images_and_never_from_its_own_vector(
    zoo: Zoo, tmp_path: Path, options: dict[str, Any]
) -> None:
    chosen = method(target=TARGET, **options)
    gradients: list[Tensor] = []

    class Watched(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            (parameter,) = self.param_groups[0]["params"]
            gradients.append(parameter.grad.clone())
            return super().step(closure)

    found, coefficients = Labelled(zoo, zoo.bank).run(
        chosen, tmp_path, 5, optimizer=partial(Watched, lr=0.1, weight_decay=0.1)
    )
    assert found.tasks == (TARGET,)
    assert tuple(found.losses.shape) == (5, 1)
    learned = torch.stack(gradients)
    assert (learned[:, 1] == 0).all()
    assert (learned[:, OTHERS] != 0).all()
    for value in (found.coefficients, coefficients.raw.detach()):
        assert (value[1] == 0).all()
        assert (value[OTHERS] != 0).all()
    stranger = {key: 3 * tensor.flip(0) + 1 for key, tensor in zoo.experts[0].items()}
    again, _ = Labelled(zoo, with_expert(zoo, 1, stranger)).run(
        chosen, tmp_path / "again", 5, optimizer=partial(Watched, lr=0.1, weight_decay=0.1)
    )
    assert torch.equal(again.coefficients, found.coefficients)
    assert torch.equal(again.losses, found.losses)
    other, _ = Labelled(zoo, with_expert(zoo, 0, stranger)).run(chosen, tmp_path / "other", 5)
    assert not torch.equal(other.losses, found.losses)  # another's vector is seen


def test_a_targets_loss_is_its_cross_entropy_alone(wide: Zoo, tmp_path: Path) -> None:
    labelled = Labelled(wide, wide.bank)
    found, coefficients = labelled.run(method(target=TARGET), tmp_path, 1, optimizer=DESCENT)
    zero = torch.zeros_like(found.coefficients)
    slope = reference_gradient(labelled, zero, [1])
    slope[1] = 0
    torch.testing.assert_close(-coefficients.raw.detach(), slope, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(found.losses[0, 0], reference_losses(labelled, zero)[1], rtol=1e-9, atol=0)


# Budgets


@pytest.mark.parametrize("granularity", ["tensor", "block", "random(3)"])
@pytest.mark.parametrize("budget", [1, 2])
def test_a_budget_keeps_the_vectors_of_the_largest_gradient_at_zero(
    zoo: Zoo, tmp_path: Path, granularity: str, budget: int
) -> None:
    labelled = Labelled(zoo, zoo.bank)
    chosen = method(granularity=granularity, others="random", budget=budget)
    found, _ = labelled.run(chosen, tmp_path, 2)
    groups = found.partition.num_groups
    slope = reference_gradient(labelled, torch.zeros(3, groups), [0, 1, 2], granularity)
    kept = reference.best(slope.tolist(), budget)
    assert [set(column.nonzero()[:, 0].tolist()) for column in found.coefficients.T] == kept
    assert len({frozenset(tasks) for tasks in kept}) > 1  # not the same choice everywhere


def test_a_budget_chooses_among_the_vectors_that_a_target_may_use(zoo: Zoo, tmp_path: Path) -> None:
    labelled = Labelled(zoo, zoo.bank)
    found, _ = labelled.run(method(target=TARGET, budget=1), tmp_path, 2)
    slope = reference_gradient(labelled, torch.zeros_like(found.coefficients), [1])
    assert slope.abs().argmax(0).eq(1).any()  # its own would be chosen somewhere
    kept = reference.best(slope[OTHERS].tolist(), 1)
    assert [found.coefficients[:, g].nonzero().tolist() for g in range(len(kept))] == [
        [[OTHERS[task]] for task in tasks] for tasks in kept
    ]


@pytest.mark.parametrize("budget", [3, 9])
def test_a_budget_of_all_vectors_leaves_none_out(zoo: Zoo, tmp_path: Path, budget: int) -> None:
    free, bounded = (
        Labelled(zoo, zoo.bank).run(method(budget=b), tmp_path / str(b), 3)[0].coefficients for b in (None, budget)
    )
    assert torch.equal(free, bounded)


def test_what_a_budget_leaves_out_keeps_its_start(zoo: Zoo) -> None:
    chosen = method(budget=1, init=[0.1, 0.2, 0.3])
    _, coefficients = chosen.prepare(zoo.bank)
    gradient = torch.zeros(coefficients().shape)
    gradient[2] = -1.0
    kept = chosen.restrict(coefficients, lambda: gradient)
    assert kept.fixed is not None
    assert kept.fixed[:2].all()
    assert not kept.fixed[2].any()
    assert torch.equal(kept().detach(), coefficients().detach())


def test_without_a_budget_no_gradient_is_computed(zoo: Zoo) -> None:
    def never() -> Tensor:
        raise AssertionError("the gradient at the start was asked for")

    _, coefficients = method().prepare(zoo.bank)
    assert method().restrict(coefficients, never) is coefficients


# The regulariser

SIGNED = torch.tensor([[3.0, 0.0, -1.0], [-4.0, 2.0, 1.0]], dtype=torch.float64)  # K = 2, G = 3


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (1, 0.5 * (7 + 2 + 2) / 3),  # Σ_k |λ| by group: 7, 2, 2
        (2, 0.5 * (5 + 2 + 2**0.5) / 3),  # √(9 + 16), √4, √2
    ],
)
def test_the_regulariser_by_hand_and_by_the_reference(norm: int, expected: float) -> None:
    found = method(norm=norm).penalty(SIGNED, SIGNED)
    assert found is not None
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert reference.regulariser(SIGNED.tolist(), norm) == pytest.approx(expected, rel=1e-12)


def test_no_norm_adds_nothing() -> None:
    assert method().penalty(SIGNED, SIGNED) is None


@pytest.mark.parametrize("norm", [1, 2])
def test_slope_of_the_regulariser_against_finite_differences(norm: int) -> None:
    at = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    penalty = method(norm=norm).penalty(at, at)
    assert penalty is not None
    penalty.backward()
    width = 1e-6
    for row, column in ((0, 0), (1, 3), (2, 4)):
        step = torch.zeros_like(at)
        step[row, column] = width
        above, below = (reference.regulariser((at.detach() + sign * step).tolist(), norm) for sign in (1, -1))
        assert float(at.grad[row, column]) == pytest.approx((above - below) / (2 * width), rel=1e-6)


@pytest.mark.parametrize("norm", [1, 2])
def test_slope_of_the_regulariser_at_zero_is_zero(norm: int) -> None:
    """Where λ starts, and where that of a target's own vector stays."""
    at = torch.zeros(3, 5, requires_grad=True)
    penalty = method(norm=norm).penalty(at, at)
    assert penalty is not None
    penalty.backward()
    assert torch.equal(at.grad, torch.zeros_like(at))


# Random groups and tensors that are no matrices


def moved(zoo: Zoo, tmp_path: Path, **options: Any) -> tuple[dict[str, bool], dict[str, int]]:
    """By key whether learning moved it, and how many λ scale each task's tensor."""
    chosen = method(granularity="random(3)", **options)
    found, _ = Labelled(zoo, zoo.bank).run(chosen, tmp_path, 2)
    merged = merge(zoo.bank, found.coefficients, found.partition)
    runs = found.partition.segments
    counts = {key: len(runs[key]) if key in runs else found.partition.scattered[key].count for key in zoo.pretrained}
    return {key: not torch.equal(merged[key], tensor) for key, tensor in zoo.pretrained.items()}, counts


def test_random_groups_of_all_tensors(zoo: Zoo, tmp_path: Path) -> None:
    changed, counts = moved(zoo, tmp_path, others="random")
    assert all(changed.values())
    assert set(counts.values()) == {3}


def test_random_groups_of_matrices_and_one_for_any_other_tensor(zoo: Zoo, tmp_path: Path) -> None:
    changed, counts = moved(zoo, tmp_path, others="tensor")
    assert all(changed.values())
    assert counts == {key: 3 if tensor.dim() == 2 else 1 for key, tensor in zoo.pretrained.items()}


def test_random_groups_of_matrices_alone(zoo: Zoo, tmp_path: Path) -> None:
    changed, counts = moved(zoo, tmp_path, others="none")
    matrices = {key: tensor.dim() == 2 for key, tensor in zoo.pretrained.items()}
    assert changed == matrices
    assert set(matrices.values()) == {True, False}
    assert {counts[key] for key in counts if matrices[key]} == {3}


def test_others_says_nothing_where_groups_are_not_random(zoo: Zoo) -> None:
    for others in ("random", "tensor", "none"):
        partition, coefficients = method(others=others).prepare(zoo.bank)
        assert partition.granularity == "tensor"
        assert coefficients.fixed is not None
        assert not coefficients.fixed.any()


def test_random_groups_are_those_of_the_seed(zoo: Zoo) -> None:
    first, again, other = (method(granularity="random(3)", seed=seed).prepare(zoo.bank)[0] for seed in (0, 0, 1))
    assert first == again
    keys = [key for key in first.scattered if first.scattered[key].size > 50]
    assert keys
    for key in keys:
        size = first.scattered[key].size
        assert not torch.equal(first.scattered[key].groups(0, size), other.scattered[key].groups(0, size))


# The result


def test_the_result_is_the_best_candidate_by_labels(zoo: Zoo, tmp_path: Path) -> None:
    """Every second iterate and the start are candidates; the third of them is made the best."""
    chosen = method(select_every=2)
    assert chosen.candidates_every == 2
    merits = iter([0.1, 0.2, 0.9, 0.3])
    scored: list[Tensor] = []

    def score(model: Any) -> dict[str, float]:
        scored.append(torch.cat([tensor.flatten() for tensor in model.weights().values()]).clone())
        return {"task0": next(merits)}

    best, _ = Labelled(zoo, zoo.bank).run(
        chosen, tmp_path / "best", 6, selection=Selection(2, score, lambda scores: scores["task0"])
    )
    assert len(scored) == 4
    expected, _ = Labelled(zoo, zoo.bank).run(method(), tmp_path / "four", 4)
    assert torch.equal(best.coefficients, expected.coefficients)


def test_a_candidate_is_worth_its_accuracy_relative_to_the_experts() -> None:
    merged, experts = {"a": 0.3, "b": 0.8}, {"a": 0.6, "b": 1.0}
    assert method().merit(merged, {"a": 0.1, "b": 0.1}, experts) == pytest.approx((0.5 + 0.8) / 2)


def test_a_targets_candidates_are_judged_without_its_expert() -> None:
    scores = [method(target="a").merit({"a": 0.3}, {"a": 0.1}, {"a": expert}) for expert in (0.0, 0.5, 0.9)]
    assert scores == [0.3] * 3


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"others": "all"}, r"method\.others is 'random', 'tensor' or 'none', found 'all'"),
        ({"norm": 3}, r"method\.norm is null, 1 or 2, found 3"),
        ({"budget": 0}, r"method\.budget is null or at least 1, found 0"),
        ({"select_every": 0}, r"method\.select_every is null or at least 1, found 0"),
        ({"target": TARGET, "transform": Ties(0.2, "global", 0)}, r"method\.target=task1 leaves .*method\.transform"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options)


def test_a_target_that_is_not_merged_is_refused(zoo: Zoo) -> None:
    chosen = method(target="mnist")
    expected = r"method\.target=mnist is not among the tasks that are merged: task0, task1, task2"
    with pytest.raises(ConfigError, match=expected):
        chosen.prepare(zoo.bank)
    with pytest.raises(ConfigError, match=expected):
        chosen.learns_from(zoo.bank.task_names)


def test_a_target_alone_is_refused(zoo: Zoo) -> None:
    bank = make_bank(zoo.pretrained, zoo.experts[:1])
    with pytest.raises(ConfigError, match=r"no task but 'a' to learn it from.*suite\.tasks"):
        method(target="a").prepare(bank)
