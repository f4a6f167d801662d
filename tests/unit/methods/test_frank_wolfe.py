"""Frank-Wolfe steps: choices by hand and from whole experts, the hull, the gap, and what is kept."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unit.zoo import Zoo

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.learning.fit import Learned, learn
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.merging import Coefficients, MergedModel, Partition, merge
from adamerge.methods.learned import FrankWolfe, gram
from adamerge.methods.learned.frank_wolfe import HardFrankWolfe, SoftFrankWolfe
from adamerge.objectives import Entropy, Outputs, Target, softmax_entropy
from adamerge.tasks.datamodule import TaskImages

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)

Weights = Mapping[str, Tensor]


def hard(**options: Any) -> Callable[..., HardFrankWolfe]:
    return partial(HardFrankWolfe, **({"lr": 1.0, "oracle": "inner_product", "tolerance": 0.0} | options))


def soft(**options: Any) -> Callable[..., SoftFrankWolfe]:
    defaults = {"lr": 0.1, "vertices": 2, "choose_every": 4, "shared": False}
    return partial(SoftFrankWolfe, **(defaults | {"oracle": "inner_product", "tolerance": 0.0} | options))


EITHER = pytest.mark.parametrize("make", [hard(), soft()], ids=["hard", "soft"])


class Loss(nn.Module):
    """A function of its parameters, as a network."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for key, tensor in weights.items():
            self.register_parameter(key, nn.Parameter(tensor.clone(), requires_grad=False))
        self.function: Callable[[Weights], Tensor]

    def forward(self) -> Tensor:
        return self.function(dict(self.named_parameters()))


class Problem:
    """A bank whose merged weights have a loss of their own, and an optimiser of its λ."""

    def __init__(
        self,
        pretrained: Weights,
        experts: Sequence[Weights],
        make: Callable[..., Any],
        *,
        granularity: str = "tensor",
        init: float | Sequence[float] = 0.0,
    ) -> None:
        vectors = {key: torch.stack([expert[key] - base for expert in experts]) for key, base in pretrained.items()}
        self.bank = ParameterBank(dict(pretrained), vectors, tuple("abcdefghijklmnop"[: len(experts)]))
        learner = FrankWolfe(granularity=granularity, init=init, transform=None, coefficients=None)
        self.partition, self.coefficients = learner.prepare(self.bank)
        self.coefficients.to(next(iter(pretrained.values())).dtype)
        self.start = self.value
        self.loss = Loss(pretrained)
        self.model = MergedModel(self.loss, self.bank, self.partition)
        self.optimizer = make(self.coefficients.parameters())

    @property
    def value(self) -> Tensor:
        """λ, (K, G)."""
        return self.coefficients().detach().clone()

    def step(self, function: Callable[[Weights], Tensor]) -> float:
        """One step, as the learner makes it; the loss before it."""
        self.loss.function = function
        self.model.update(self.coefficients())
        loss = self.model()
        loss.backward()
        self.coefficients.raw.grad = self.model.coefficient_gradient()
        if hasattr(self.optimizer, "observe"):
            self.optimizer.observe(self.model)
        self.optimizer.step()
        return float(loss.detach())

    @property
    def gap(self) -> float:
        return float(self.optimizer.gap)


def linear(slopes: Weights, sign: float = 1.0) -> Callable[[Weights], Tensor]:
    """⟨g, θ⟩, whose gradient is g everywhere."""
    return lambda weights: sign * sum((weights[key] * slope).sum() for key, slope in slopes.items())


def distance(target: Weights) -> Callable[[Weights], Tensor]:
    """½‖θ − target‖²."""
    return lambda weights: sum(0.5 * (weights[key] - tensor).square().sum() for key, tensor in target.items())


# By hand

PRETRAINED = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
X = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 1.0])}
Y = {"a": torch.tensor([-1.0, 0.0]), "b": torch.tensor([0.0, -3.0])}
SLOPES = {"a": torch.tensor([-1.0, 0.0]), "b": torch.tensor([1.0, 0.5])}
#                      a: X      Y    start     b: X      Y    start   a + b: X      Y    start
# ⟨g, θ_s⟩               -3      1     -1         1.5   -1.5    0.5       -1.5   -0.5   -0.5
# cos(g, θ_s)          -0.6      1     -1       0.949 -0.447  0.447      0.349  0.553 -0.553
# (‖g_b‖ = √5/2, ‖X_b‖ = √2, ‖X_a‖ = 5; the start is θ₀)


@pytest.mark.parametrize(
    ("oracle", "granularity", "expected"),
    [
        ("inner_product", "tensor", [[1, 0], [0, 1]]),  # X for a, Y for b
        ("inner_product", "task", [[1], [0]]),
        ("cosine", "tensor", [[0, 0], [0, 1]]),  # the start for a
        ("cosine", "task", [[0], [0]]),
    ],
)
def test_the_first_hard_step_ends_in_the_vertex_worked_out_by_hand(
    oracle: str, granularity: str, expected: list[list[float]]
) -> None:
    problem = Problem(PRETRAINED, [X, Y], hard(oracle=oracle), granularity=granularity)
    problem.step(linear(SLOPES))
    torch.testing.assert_close(problem.value, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0)
    # a: -1 + 3; b: 0.5 + 1.5; both at once, in which X is best: -0.5 + 1.5. The oracle is not asked.
    assert problem.gap == pytest.approx({"tensor": 4.0, "task": 1.0}[granularity])


def test_further_hard_steps_are_shorter() -> None:
    """With −g, Y is best for a (-1 against -3 · -1 = 3, gap 4) and X for b (-1.5 against 1.5, gap 3): two thirds of the
    way from X to Y and from Y to X. With lr = 0.3 the first step goes 0.3 of the way, the second 0.2."""
    problem = Problem(PRETRAINED, [X, Y], hard())
    problem.step(linear(SLOPES))
    problem.step(linear(SLOPES, -1))
    torch.testing.assert_close(problem.value, torch.tensor([[1 / 3, 2 / 3], [2 / 3, 1 / 3]]))
    assert problem.gap == pytest.approx(7.0)
    slow = Problem(PRETRAINED, [X, Y], hard(lr=0.3))
    slow.step(linear(SLOPES))
    slow.step(linear(SLOPES))
    torch.testing.assert_close(slow.value, torch.tensor([[0.3 + 0.2 * 0.7, 0.0], [0.0, 0.44]]))


def test_soft_steps_worked_out_by_hand() -> None:
    """⟨g, θ_s − θ₀⟩ is -2 for a at X and for b at Y, and 0 at the start. At rate 0.1, weights of start and vertex:
    (1, 0) − 0.1 · (0, -2) = (1, 0.2) → (0.9, 0.1), then (0.9, 0.3) → (0.8, 0.2). The third step chooses anew, at 0.2:
    (1, 0) − 0.1 · (-0.4, -2) = (1.04, 0.2) → (0.92, 0.08), which is 0.92 · 0.2 + 0.08 = 0.264 of the way."""
    problem = Problem(PRETRAINED, [X, Y], soft(vertices=1, choose_every=2))
    for done in (0.1, 0.2, 0.264):
        problem.step(linear(SLOPES))
        torch.testing.assert_close(problem.value, done * torch.eye(2))


def test_shared_vertices_are_those_of_the_least_sum() -> None:
    """With 1.2 g for b, ⟨g, θ_s − θ₀⟩ is -2 and 1.2 at X, 2 and -2.4 at Y: X by the sum, though Y has the least of all.
    So b, whose loss X raises, stays."""
    problem = Problem(PRETRAINED, [X, Y], soft(vertices=1, shared=True))
    problem.step(linear(SLOPES | {"b": 1.2 * SLOPES["b"]}))
    torch.testing.assert_close(problem.value, torch.tensor([[0.1, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("granularity", ["tensor", "task"])
@pytest.mark.parametrize("oracle", ["inner_product", "cosine"])
@pytest.mark.parametrize("make", [hard, soft])
def test_where_no_vertex_is_better_lambda_stays(make: Callable[..., Any], oracle: str, granularity: str) -> None:
    """g points from X and Y to the start, by ⟨g, start⟩ = -1 in a and b against positive ones."""
    slopes = {"a": torch.tensor([-1.0, 1.0]), "b": torch.tensor([1.0, -1.0])}
    problem = Problem(PRETRAINED, [X, Y], make(oracle=oracle), granularity=granularity)
    for _ in range(3):
        problem.step(linear(slopes))
        assert torch.equal(problem.value, problem.start)
        assert problem.gap == 0


@pytest.mark.parametrize(("tolerance", "moves"), [(3.9, True), (4.1, False)])
def test_a_hard_step_at_a_gap_within_the_tolerance_goes_nowhere(tolerance: float, moves: bool) -> None:
    problem = Problem(PRETRAINED, [X, Y], hard(tolerance=tolerance))
    problem.step(linear(SLOPES))
    assert problem.gap == pytest.approx(4.0)
    assert torch.equal(problem.value, problem.start) is not moves


# The cosine, from whole experts


def entropy(call: Callable[[Tensor], Tensor], zoo: Zoo) -> Tensor:
    return sum(
        softmax_entropy(F.normalize(call(torch.cat(images)), dim=-1) @ head.T).mean()
        for head, images in zip(zoo.heads, zoo.batches[0], strict=True)
    )


def chosen(zoo: Zoo, make: Callable[..., Any], granularity: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """λ at a start within the experts and after one step, and the weights' gradient at the start."""
    partition = Partition.build(granularity, zoo.bank.shapes)
    coefficients = Coefficients(3, partition.num_groups, init=[0.1, 0.2, 0.4], constraint="identity").double()
    start = coefficients().detach().clone()
    optimizer = make(coefficients.parameters())
    model = MergedModel(zoo.network, zoo.bank, partition)
    model.update(start)
    entropy(model, zoo).backward()
    gradients = {key: gradient.clone() for key, gradient in model.gradients.items() if gradient is not None}
    coefficients.raw.grad = model.coefficient_gradient()
    optimizer.observe(model)
    optimizer.step()
    return start, coefficients().detach(), gradients


@pytest.mark.parametrize("granularity", ["tensor", "block", "task"])
def test_the_cosine_is_that_of_whole_experts(zoo64: Zoo, granularity: str) -> None:
    """Every vertex built in full: its tensors, not its task vectors, against the gradient."""
    start, found, gradients = chosen(zoo64, hard(oracle="cosine"), granularity)
    partition = Partition.build(granularity, zoo64.bank.shapes)
    corners = [*torch.eye(3, dtype=torch.float64)[..., None].expand(-1, -1, partition.num_groups), start]
    weights = [*zoo64.experts, merge(zoo64.bank, start, partition)]

    def best(subtracted: Weights) -> list[int]:
        scores = torch.zeros(4, partition.num_groups, dtype=torch.float64)
        for key, gradient in gradients.items():
            ((_, _, group),) = partition.of(key)
            for vertex, of_vertex in enumerate(weights):
                seen = (of_vertex[key] - subtracted[key]).flatten()
                scores[vertex, group] += F.cosine_similarity(gradient.flatten(), seen, dim=0, eps=0)
        return scores.argmin(0).tolist()

    expected = best({key: torch.zeros_like(tensor) for key, tensor in zoo64.pretrained.items()})
    slopes = torch.stack([sum_of_groups(gradients, vertex, partition) for vertex in weights])  # (4, G)
    for group, vertex in enumerate(expected):
        moved = slopes[3, group] - slopes[:, group].min() > 1e-12
        goal = corners[vertex][:, group] if moved else start[:, group]
        torch.testing.assert_close(found[:, group], goal, rtol=0, atol=1e-12)
    if granularity == "tensor":  # other rules choose otherwise
        assert expected != best(zoo64.pretrained)
        assert expected != slopes.argmin(0).tolist()
        assert len(set(expected)) > 2


def sum_of_groups(gradients: Weights, weights: Weights, partition: Partition) -> Tensor:
    """⟨g, θ⟩ of every group, (G,)."""
    total = torch.zeros(partition.num_groups, dtype=torch.float64)
    for key, gradient in gradients.items():
        ((_, _, group),) = partition.of(key)
        total[group] += (gradient * weights[key]).sum()
    return total


@pytest.mark.parametrize("make", [hard, soft])
def test_tensors_without_length_or_gradient_have_no_say(make: Callable[..., Any]) -> None:
    """Zero in the base and all experts; zero in one expert; without a gradient: each would be 0 / 0."""
    zero, one = torch.zeros(2), torch.ones(2)
    more = {"nowhere": zero, "lost": one, "unused": one}
    plain = Problem(PRETRAINED, [X, Y], make(oracle="cosine"), granularity="task", init=[0.3, 0.3])
    extended = Problem(
        PRETRAINED | more,
        [X | more, Y | more | {"lost": zero, "unused": 2 * one}],
        make(oracle="cosine"),
        granularity="task",
        init=[0.3, 0.3],
    )
    slopes = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 0.5])}
    for _ in range(3):
        plain.step(linear(slopes))
        extended.step(linear(slopes | {"nowhere": one, "lost": 1e-6 * torch.tensor([1.0, -1.0])}))
    assert not torch.equal(plain.value, plain.start)
    torch.testing.assert_close(extended.value, plain.value, rtol=1e-4, atol=1e-5)


# The hull and the gap


def shares_of(value: Tensor, start: Tensor) -> Tensor:
    """The weights (K + 1, G) of experts and start that sum to one and give λ, of which there is one choice only:
    Σ_k λ_k = (1 − w) + w Σ_k start_k for w, that of the start."""
    of_start = (1 - value.sum(0)) / (1 - start.sum(0))
    return torch.cat([value - of_start * start, of_start[None]])


def drawn(seed: int, *sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{index}": torch.randn(size, generator=generator, dtype=torch.float64) for index, size in enumerate(sizes)
    }


@pytest.mark.parametrize("granularity", ["tensor", "task"])
@pytest.mark.parametrize("oracle", ["inner_product", "cosine"])
@pytest.mark.parametrize(
    "make",
    [hard, partial(hard, lr=0.3), soft, partial(soft, lr=10.0, vertices=9), partial(soft, shared=True, vertices=1)],
)
def test_iterates_stay_in_the_hull(make: Callable[..., Any], oracle: str, granularity: str) -> None:
    sizes = (4, 6, 3)
    experts = [drawn(seed, *sizes) for seed in range(1, 4)]
    problem = Problem(drawn(0, *sizes), experts, make(oracle=oracle), granularity=granularity, init=0.2)
    seen = []
    for seed in range(40):
        problem.step(linear(drawn(100 + seed, *sizes)))  # wherever it is drawn to
        shares = shares_of(problem.value, problem.start)
        assert shares.min() > -1e-12
        torch.testing.assert_close(shares.sum(0), torch.ones_like(shares[0]), rtol=0, atol=1e-12)
        seen.append(problem.value)
    assert (torch.stack(seen).std(0) > 1e-3).all()  # and do move


def least_by_search(pretrained: Weights, experts: Sequence[Weights], start: Tensor, target: Weights) -> float:
    """Least ½‖θ − target‖² over the triangle of two experts and the start, tried point by point, 1/400 apart."""
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    inside = first + second <= 1 + 1e-12
    shares = torch.stack([first[inside], second[inside], 1 - first[inside] - second[inside]])  # (3, N)
    lambdas = shares[:2] + shares[2] * start
    total = torch.zeros(shares.shape[1], dtype=torch.float64)
    for key, base in pretrained.items():
        vectors = torch.stack([expert[key] - base for expert in experts])
        total += 0.5 * (base + lambdas.T @ vectors - target[key]).square().sum(1)
    return float(total.min())


@EITHER
def test_the_gap_bounds_what_the_loss_can_fall_and_tends_to_nothing(make: Callable[..., Any]) -> None:
    """A target outside of the hull; the least loss is known by search, to its resolution."""
    pretrained, experts = drawn(0, 4, 6), [drawn(1, 4, 6), drawn(2, 4, 6)]
    target = drawn(7, 4, 6)
    problem = Problem(pretrained, experts, make, granularity="task", init=0.1)
    least = least_by_search(pretrained, experts, problem.start, target)
    losses, gaps = [], []
    for _ in range(400):
        losses.append(problem.step(distance(target)))
        gaps.append(problem.gap)
    assert all(loss - least <= gap + 1e-4 for loss, gap in zip(losses, gaps, strict=True))
    assert losses[0] - least > 0.5
    assert gaps[0] > 0.5
    assert losses[-1] - least < 0.01 * (losses[0] - least)
    assert min(gaps[-20:]) < 0.02 * gaps[0]


def test_hard_steps_reach_the_loss_that_theory_promises() -> None:
    """L(λ_t) − L* ≤ 2 C / (t + 2), and the least gap of T steps ≤ 27 C / (4 (T + 2)), with C for ½‖·‖² the hull's
    squared diameter (Jaggi, ICML 2013). Every tensor walks through its own hull, so diameters add up."""
    sizes = (5, 3, 8)
    pretrained, experts = drawn(0, *sizes), [drawn(seed, *sizes) for seed in range(1, 6)]
    problem = Problem(pretrained, experts, hard(), init=0.3)
    corners = [*experts, merge(problem.bank, problem.start, problem.partition)]
    target = {key: torch.stack([expert[key] for expert in experts[:3]]).mean(0) for key in pretrained}  # so L* = 0
    diameters = [max(float((s[key] - r[key]).square().sum()) for s in corners for r in corners) for key in pretrained]
    constant = sum(diameters)
    gaps = []
    for step in range(200):
        loss = problem.step(distance(target))
        gaps.append(problem.gap)
        assert problem.gap >= loss
        assert step == 0 or loss <= 2 * constant / (step + 2)
    assert min(gaps) <= 27 * constant / (4 * 202)
    assert min(gaps[150:]) < min(gaps[:20]) / 5


def test_soft_steps_never_raise_a_smooth_loss() -> None:
    """Projected gradient at a rate below 1 / L in the weights, and every choice starts where the last one ended."""
    sizes = (5, 3, 8)
    pretrained, experts = drawn(0, *sizes), [drawn(seed, *sizes) for seed in range(1, 6)]
    target = {key: torch.stack([expert[key] for expert in experts[:3]]).mean(0) for key in pretrained}
    problem = Problem(pretrained, experts, soft(lr=0.02, vertices=2, choose_every=5), init=0.3)
    losses, gaps = [], []
    for _ in range(1500):
        losses.append(problem.step(distance(target)))
        gaps.append(problem.gap)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses))
    assert losses[-1] < 1e-2 * losses[0]
    assert max(gaps[-5:]) < 0.05 * gaps[0]


# What is kept


@pytest.mark.parametrize("oracle", ["inner_product", "cosine"])
@pytest.mark.parametrize("make", [hard, soft])
def test_a_saved_state_goes_on_bit_by_bit(make: Callable[..., Any], oracle: str) -> None:
    """Saved between two choices of the soft steps (every four), and read as a checkpoint is."""

    def run(problem: Problem, seeds: range) -> list[Tensor]:
        found = []
        for seed in seeds:
            problem.step(linear({key: tensor.float() for key, tensor in drawn(50 + seed, 4, 6).items()}))
            found.append(problem.value)
        return found

    weights = [{key: tensor.float() for key, tensor in drawn(seed, 4, 6).items()} for seed in range(4)]
    build = partial(Problem, weights[0], weights[1:], make(oracle=oracle), init=0.2)
    unbroken = build()
    expected = run(unbroken, range(15))
    broken, resumed = build(), build()
    run(broken, range(6))
    file = BytesIO()
    torch.save([broken.coefficients.state_dict(), broken.optimizer.state_dict()], file)
    file.seek(0)
    coefficients, optimizer = torch.load(file, weights_only=True)
    resumed.coefficients.load_state_dict(coefficients)
    resumed.optimizer.load_state_dict(optimizer)
    found = run(resumed, range(6, 15))
    assert all(torch.equal(a, b) for a, b in zip(found, expected[6:], strict=True))
    assert resumed.gap == unbroken.gap
    fresh = build()
    fresh.coefficients.load_state_dict(coefficients)
    assert not torch.equal(run(fresh, range(6, 15))[-1], expected[-1])  # the state is needed


class Peak(TorchDispatchMode):
    """The most values of floating point alive at once, of storages that came into being within it."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)
        }
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage()).data_ptr() not in known:
                self._alive += storage.nbytes() // tensor.element_size()
                self.most = max(self.most, self._alive)
                weakref.finalize(storage, self._freed, storage.nbytes() // tensor.element_size())
        return made

    def _freed(self, values: int) -> None:
        self._alive -= values


@pytest.mark.parametrize("oracle", ["inner_product", "cosine"])
@pytest.mark.parametrize("make", [hard, partial(soft, vertices=8)])
def test_a_step_holds_no_expert_whatever_their_number(
    make: Callable[..., Any], oracle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what it has at its start: the gradients, and τ, of which 64 entries are widened at a time."""
    monkeypatch.setattr(gram, "_BLOCK", 64)
    size, most = 1 << 14, {}
    for count in (2, 16):
        weights = [drawn(seed, size, size) for seed in range(count + 1)]
        problem = Problem(weights[0], weights[1:], make(oracle=oracle), granularity="task", init=0.1)
        problem.loss.function = linear(drawn(99, size, size))
        problem.model.update(problem.coefficients())
        problem.model().backward()
        problem.coefficients.raw.grad = problem.model.coefficient_gradient()
        with Peak() as peak:
            if hasattr(problem.optimizer, "observe"):
                problem.optimizer.observe(problem.model)
            problem.optimizer.step()
        assert not torch.equal(problem.value, problem.start)
        most[count] = peak.most
    assert most[2] > 0
    assert most[16] < size / 2


# Under the learner


class Pixels(nn.Module):
    """uint8 images → features of the toy tower."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.visual = network.visual

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images.float() / 64 - 2)


class Stop(Exception):  # noqa: N818
    """Ends a run as abruptly as a test can within its process."""


class StopsAfter(Entropy):
    """Entropy of so many tasks' batches."""

    def __init__(self, batches: float) -> None:
        self.left = batches

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Stop
        return super().__call__(outputs, target)


def trained(
    zoo: Zoo,
    run_dir: Path,
    make: Callable[..., Any],
    steps: int,
    *,
    granularity: str = "tensor",
    init: float = 0.3,
    stop: float = torch.inf,
    per_batch: int = 16,
    log_every: int = 1,
) -> tuple[Learned, Coefficients]:
    """Learned by entropy; continues what it finds in the folder."""
    learner = FrankWolfe(granularity=granularity, init=init, transform=None, coefficients=None)
    partition, coefficients = learner.prepare(zoo.bank)
    generator = torch.Generator().manual_seed(5)
    size = (16, 3, 8, 8)
    images = {task: torch.randint(256, size, generator=generator, dtype=torch.uint8) for task in zoo.bank.task_names}
    rows = {task: torch.arange(16) for task in images}
    heads = dict(zip(zoo.bank.task_names, zoo.heads, strict=True))
    found = learn(
        MergedModel(Pixels(zoo.network), zoo.bank, partition),
        coefficients,
        TaskLosses(StopsAfter(stop), heads, dict.fromkeys(heads, 1.0), fuse_tasks=True),
        TaskImages(images, rows, images_per_batch=per_batch, batches_per_step=1, seed=0),
        run_dir=run_dir,
        make_trainer=partial(
            pl.Trainer,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=steps,
            log_every_n_steps=log_every,
        ),
        optimizer=make,
        schedule=Schedule(steps=steps, decay="constant", average=0, patience=0),
        resume=True,
    )
    return found, coefficients


@pytest.mark.parametrize("granularity", ["task", "tensor"])
@pytest.mark.parametrize("oracle", ["inner_product", "cosine"])
@pytest.mark.parametrize("make", [hard, partial(soft, lr=1.0)])
def test_the_loss_falls_while_lambda_alone_learns(
    zoo: Zoo, tmp_path: Path, make: Callable[..., Any], oracle: str, granularity: str
) -> None:
    before = {name: tensor.clone() for name, tensor in zoo.network.state_dict().items()}
    vectors = {key: tensor.clone() for key, tensor in zoo.bank.task_vectors.items()}
    found, coefficients = trained(zoo, tmp_path, make(oracle=oracle), 20, granularity=granularity, init=0.1)
    losses = found.losses[: found.steps].sum(1)
    assert losses[-1] < losses[0] - 0.02  # of the same images at every step
    assert [name for name, _ in coefficients.named_parameters()] == ["raw"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in zoo.network.state_dict().items())
    assert all(torch.equal(tensor, vectors[key]) for key, tensor in zoo.bank.task_vectors.items())
    assert shares_of(found.coefficients, torch.full_like(found.coefficients, 0.1)).min() > -1e-5


@EITHER
def test_a_killed_run_resumes_bit_by_bit(zoo: Zoo, tmp_path: Path, make: Callable[..., Any]) -> None:
    unbroken, _ = trained(zoo, tmp_path / "unbroken", make, 25, per_batch=4)
    with pytest.raises(Stop):
        trained(zoo, tmp_path / "broken", make, 25, per_batch=4, stop=17 * 3)
    resumed, _ = trained(zoo, tmp_path / "broken", make, 25, per_batch=4, stop=15 * 3)  # 10 are in the checkpoint
    assert resumed.steps == unbroken.steps == 25
    assert torch.equal(resumed.coefficients, unbroken.coefficients)
    assert torch.equal(resumed.losses, unbroken.losses)


@EITHER
@pytest.mark.parametrize(("log_every", "steps"), [(1, 1), (50, 10)])
def test_the_run_ends_where_the_gap_is_within_the_tolerance(
    zoo: Zoo, tmp_path: Path, make: Callable[..., Any], log_every: int, steps: int
) -> None:
    """Where the host looks, which it does as often as it logs, and every ten steps."""
    ended, coefficients = trained(zoo, tmp_path, partial(make, tolerance=1e9), 30, log_every=log_every)
    assert ended.steps == steps
    assert torch.equal(ended.coefficients, coefficients().detach())
    again, _ = trained(zoo, tmp_path, partial(make, tolerance=1e9), 30, log_every=log_every, stop=0)
    assert torch.equal(again.coefficients, ended.coefficients)
    assert trained(zoo, tmp_path / "on", partial(make, tolerance=-1e9), 12, log_every=log_every)[0].steps == 12


# Options


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (hard, {"lr": 0.0}, r"optimizer\.lr lies in \(0, 1\] .* found 0"),
        (hard, {"lr": 1.5}, r"optimizer\.lr lies in \(0, 1\] .* found 1\.5"),
        (hard, {"oracle": "random"}, "optimizer.oracle is 'inner_product' or 'cosine', found 'random'"),
        (soft, {"oracle": "random"}, "optimizer.oracle is 'inner_product' or 'cosine', found 'random'"),
        (soft, {"lr": 0.0}, "at least 1, found 0, 2 and 4"),
        (soft, {"vertices": 0}, "at least 1, found 0.1, 0 and 4"),
        (soft, {"choose_every": 0}, "at least 1, found 0.1, 2 and 0"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)([nn.Parameter(torch.zeros(2, 1))])


def test_the_cosine_takes_tensors_whole() -> None:
    problem = Problem(PRETRAINED, [X, Y], hard(oracle="cosine"), granularity="chunk(2)")
    with pytest.raises(ConfigError, match="divides tensors"):
        problem.step(linear(SLOPES))
    Problem(PRETRAINED, [X, Y], hard(), granularity="chunk(2)").step(linear(SLOPES))  # the inner product need not


def test_a_cosine_step_must_have_seen_the_gradients() -> None:
    parameter = nn.Parameter(torch.zeros(2, 1))
    optimizer = hard(oracle="cosine")([parameter])
    parameter.grad = torch.ones(2, 1)
    with pytest.raises(ConfigError, match=r"Call observe\(model\) before every step"):
        optimizer.step()
