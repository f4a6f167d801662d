"""RegMean and RegMean++ against normal equations in numpy, on matrices and through a small network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import regmean as reference
from torch import Tensor, nn

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods import Context
from adamerge.methods.static import RegMean
from adamerge.statistics import Expert, InputGrams

KEY = "visual.layer.weight"


def regmean(**options: Any) -> RegMean:
    given = {"non_diagonal": 0.9, "ridge": 0.0, "preceding": "own"} | options
    return RegMean(scaling=1, grid=(), transform=None, inputs=InputGrams(None, ()), **given)


def merge(weights: Sequence[np.ndarray], grams: Sequence[np.ndarray], *, key: str = KEY, **options: Any) -> np.ndarray:
    """One matrix, from a θ₀ of zero."""
    stack = torch.from_numpy(np.stack(weights)).double()
    bank = ParameterBank({key: torch.zeros_like(stack[0])}, {key: stack}, tuple(map(str, range(len(stack)))))
    context = Context({KEY: torch.zeros(len(stack), 1, 1), key: torch.from_numpy(np.stack(grams)).double()})
    return regmean(**options)(bank, context)[key].numpy()


def draw(seed: int, tasks: int, out: int, n: int, tokens: int = 20) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights, and Gram matrices of correlated inputs of different sizes."""
    random = np.random.default_rng(seed)
    weights = [random.normal(size=(out, n)) for _ in range(tasks)]
    fed = [(random.normal(size=(tokens, n)) @ random.normal(size=(n, n))) * 10.0 ** random.normal() for _ in weights]
    return weights, [reference.gram(states) for states in fed]


# One matrix


@pytest.mark.parametrize("non_diagonal", [0.0, 0.5, 1.0])
def test_an_example_worked_by_hand(non_diagonal: float) -> None:
    example = reference.CORRELATED
    weights, grams = map(np.array, (example["weights"], example["grams"]))
    expected = [example["merged"][non_diagonal]]
    np.testing.assert_allclose(merge(weights, grams, non_diagonal=non_diagonal), expected, rtol=1e-14)
    np.testing.assert_allclose(reference.solve(weights, grams, non_diagonal), expected, rtol=1e-14)


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
def test_each_input_follows_the_task_that_uses_it(ridge: float) -> None:
    weights, grams = map(np.array, (reference.DISJOINT["weights"], reference.DISJOINT["grams"]))
    found = merge(weights, grams, non_diagonal=1.0, ridge=ridge)
    np.testing.assert_allclose(found, [reference.DISJOINT["merged"]], rtol=1e-11)


def test_the_ridge_pulls_towards_the_mean() -> None:
    weights, grams = map(np.array, (reference.RIDGE["weights"], reference.RIDGE["grams"]))
    found = merge(weights, grams, ridge=reference.RIDGE["ridge"])
    np.testing.assert_allclose(found, [reference.RIDGE["merged"]], rtol=1e-15)
    far = merge(*draw(0, 3, 4, 5), ridge=1e9)
    np.testing.assert_allclose(far, np.mean(draw(0, 3, 4, 5)[0], axis=0), rtol=1e-6, atol=1e-6)


@given(
    seed=st.integers(0, 99),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    non_diagonal=st.floats(0, 0.99),
    ridge=st.sampled_from([0.0, 1e-6, 0.3]),
)
def test_equals_the_normal_equations(seed: int, sizes: tuple[int, int, int], non_diagonal: float, ridge: float) -> None:
    weights, grams = draw(seed, *sizes)
    found = merge(weights, grams, non_diagonal=non_diagonal, ridge=ridge)
    expected = reference.solve(weights, grams, non_diagonal, ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("non_diagonal", "ridge"), [(1.0, 0.0), (0.7, 0.0), (0.95, 0.2)])
def test_is_the_minimum_of_its_objective(non_diagonal: float, ridge: float) -> None:
    weights, grams = draw(3, 3, 2, 4)
    options = {"non_diagonal": non_diagonal, "ridge": ridge}
    found = merge(weights, grams, **options)

    def value(at: np.ndarray) -> float:
        return reference.objective(at, weights, grams, **options)

    scale = value(np.mean(weights, axis=0))
    for entry in np.ndindex(found.shape):
        step = np.zeros_like(found)
        step[entry] = 1e-4
        up, down, here = value(found + step), value(found - step), value(found)
        assert abs(up - down) / 2e-4 < 1e-7 * scale  # the gradient vanishes
        assert up > here < down
    assert value(found) < 0.9 * scale  # and the mean, whose gradient does not, is worse


def test_without_a_ridge_it_minimises_what_the_outputs_differ_by() -> None:
    random = np.random.default_rng(0)
    weights = [random.normal(size=(2, 3)) for _ in range(2)]
    fed = [random.normal(size=(50, 3)), 2 * random.normal(size=(50, 3))]
    found = merge(weights, [reference.gram(states) for states in fed], non_diagonal=1.0)
    stacked = np.concatenate(fed)
    outputs = np.concatenate([states @ weight.T for states, weight in zip(fed, weights, strict=True)])
    np.testing.assert_allclose(found.T, np.linalg.lstsq(stacked, outputs, rcond=None)[0], rtol=1e-10)


def test_equal_gram_matrices_give_the_mean() -> None:
    weights, grams = draw(1, 3, 4, 5)
    np.testing.assert_allclose(merge(weights, grams[:1] * 3), np.mean(weights, axis=0), rtol=1e-13, atol=1e-13)


def test_one_task_gives_that_task_and_no_task_vector_nothing() -> None:
    weights, grams = draw(2, 1, 4, 5, tokens=2)  # of rank two
    np.testing.assert_array_equal(merge(weights, grams, non_diagonal=1.0, ridge=1e-6), weights[0])
    np.testing.assert_array_equal(merge([0 * weights[0]] * 2, grams * 2), 0 * weights[0])


def test_where_no_task_has_inputs_is_the_mean() -> None:
    """Fewer tokens than inputs: beside the span of all tokens nothing is known."""
    random = np.random.default_rng(4)
    weights = [random.normal(size=(2, 9)) for _ in range(2)]
    fed = [random.normal(size=(3, 9)), random.normal(size=(2, 9))]
    found = merge(weights, [reference.gram(states) for states in fed], non_diagonal=1.0, ridge=1e-9)
    for states, weight in zip(fed, weights, strict=True):  # few enough tokens for both to be met
        np.testing.assert_allclose(states @ found.T, states @ weight.T, atol=1e-6)
    size = np.sqrt(np.diag(sum(map(reference.gram, fed))))
    beside = np.linalg.svd(np.concatenate(fed) / size)[2][5:] / size  # (4, 9), of the inputs as the ridge weighs them
    away = (found - np.mean(weights, axis=0)) * size**2
    np.testing.assert_allclose(away @ beside.T, 0, atol=1e-6)


def test_zero_inputs_give_the_mean() -> None:
    weights, grams = draw(5, 2, 3, 4)
    zeros = [0 * gram for gram in grams]
    np.testing.assert_array_equal(merge(weights, zeros), np.mean(weights, axis=0))


def test_what_is_stored_input_major_is_turned() -> None:
    for out, n in ((3, 5), (4, 4)):
        weights, grams = draw(6, 3, out, n)
        turned = merge([weight.T for weight in weights], grams, key="visual.proj")
        np.testing.assert_allclose(turned.T, merge(weights, grams), rtol=1e-12)


def test_singular_gram_matrices_are_refused() -> None:
    weights, equal_inputs = [np.array([[1.0, 2.0]]), np.array([[3.0, 1.0]])], [np.ones((2, 2))] * 2
    with pytest.raises(ConfigError, match=rf"of '{KEY}' are singular\. Raise method\.ridge \(found 0"):
        merge(weights, equal_inputs, non_diagonal=1.0, ridge=0.0)
    np.testing.assert_allclose(merge(weights, equal_inputs, non_diagonal=1.0, ridge=1e-6), [[2.0, 1.5]])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1), (2, 3, 1, 1), (3, 5)])
def test_tensors_without_a_gram_matrix_take_the_mean(shape: tuple[int, ...]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    bank = ParameterBank({"visual.other": torch.zeros(shape)}, {"visual.other": stack}, ("a", "b", "c"))
    found = regmean()(bank, Context({KEY: torch.ones(3, 1, 1)}))["visual.other"]
    torch.testing.assert_close(found, stack.mean(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"non_diagonal": 1.1}, r"non_diagonal .* in \[0, 1\]; found 1\.1"),
        ({"non_diagonal": -0.1}, r"non_diagonal .* in \[0, 1\]; found -0\.1"),
        ({"ridge": -1e-6}, r"ridge is at least 0, found -1e-06"),
        ({"ridge": float("nan")}, r"ridge is at least 0, found nan"),
        ({"preceding": "after"}, r"preceding is 'own' or 'merged', found 'after'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        regmean(**options)


def test_statistics_are_needed() -> None:
    bank = ParameterBank({KEY: torch.zeros(2, 2)}, {KEY: torch.ones(1, 2, 2)}, ("a",))
    with pytest.raises(ConfigError, match="RegMean needs Gram matrices"):
        regmean()(bank)
    with pytest.raises(ConfigError, match=r"RegMean\+\+ needs a context that recomputes"):
        regmean(preceding="merged")(bank)


# Through the reference's network

WIDTH, HIDDEN, OUTPUT, TASKS = 4, 6, 3, 3


class Layers(nn.Module):
    """h + W_down · relu(W_up · h + b_up)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.down(self.up(tokens).relu())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.resblocks = nn.Sequential(Layers(), Layers())
        self.visual.proj = nn.Parameter(torch.zeros(WIDTH, OUTPUT))
        self.passes = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        return self.visual.resblocks(tokens) @ self.visual.proj


class Suite:
    """Experts of the network and their tokens, (N, 4) by task, more of them for later ones."""

    def __init__(self) -> None:
        self.network = Network().double().requires_grad_(False)
        random = np.random.default_rng(0)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        self.pretrained = {name: random.normal(size=shape) for name, shape in shapes.items()}
        self.experts = [
            {name: base + random.normal(size=base.shape) for name, base in self.pretrained.items()}
            for _ in range(TASKS)
        ]
        self.tokens = [(1 + task) * random.normal(size=(20 + 10 * task, WIDTH)) + task for task in range(TASKS)]
        self.asked: list[tuple[str, ...]] = []

    def bank(self, tasks: Iterable[int] = range(TASKS)) -> ParameterBank:
        experts = {f"{task}": {k: torch.from_numpy(v) for k, v in self.experts[task].items()} for task in tasks}
        pretrained = {key: torch.from_numpy(value) for key, value in self.pretrained.items()}
        return ParameterBank.from_experts(pretrained, experts, list(pretrained), dtype=torch.float64)

    def context(self, bank: ParameterBank) -> Context:
        def gathered(
            replaced: Mapping[str, Tensor] | None = None, keys: Iterable[str] = tuple(self.pretrained)
        ) -> dict[str, Tensor]:
            self.asked.append(tuple(keys))
            of_tasks = []
            for task in bank.task_names:
                self.network.load_state_dict({**bank.expert(task), **(replaced or {})})
                images, cpu = torch.from_numpy(self.tokens[int(task)]), torch.device("cpu")
                expert = Expert(task, self.network, torch.eye(1), images, None, self.asked[-1], cpu, "32-true", 100)
                of_tasks.append(InputGrams(None, ())(expert))
            return {name: torch.stack([found[name] for found in of_tasks]) for name in of_tasks[0]}

        return Context(gathered(), gathered)


@pytest.fixture
def suite() -> Suite:
    return Suite()


@pytest.mark.parametrize(
    ("preceding", "expected"), [("own", reference.regmean), ("merged", reference.regmean_pp)], ids=["own", "merged"]
)
@pytest.mark.parametrize(("non_diagonal", "ridge"), [(1.0, 0.0), (0.95, 1e-6), (0.5, 0.1)])
def test_of_a_network_equals_the_reference(
    suite: Suite, preceding: str, expected: Callable[..., dict[str, np.ndarray]], non_diagonal: float, ridge: float
) -> None:
    bank = suite.bank()
    found = regmean(non_diagonal=non_diagonal, ridge=ridge, preceding=preceding)(bank, suite.context(bank))
    wanted = expected(suite.experts, suite.tokens, non_diagonal, ridge)
    assert set(found) == set(wanted)
    for key, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), wanted[key], rtol=1e-7, atol=1e-7, err_msg=key)


def test_the_walk_changes_all_but_the_first_block(suite: Suite) -> None:
    bank = suite.bank()
    own = regmean()(bank, suite.context(bank))
    walked = regmean(preceding="merged")(bank, suite.context(bank))
    for key in own:
        same = ".0." in key or key.endswith("bias")
        assert torch.allclose(own[key], walked[key], rtol=1e-9) == same, key


def test_the_walk_passes_every_experts_images_once_a_block(suite: Suite) -> None:
    bank = suite.bank()
    context = suite.context(bank)
    suite.asked, suite.network.passes = [], 0
    regmean(preceding="merged")(bank, context)
    blocks = [{key for key in suite.pretrained if f".{block}." in key} for block in (0, 1)]
    assert [set(keys) for keys in suite.asked] == [*blocks, {"visual.proj"}]
    assert suite.network.passes == 3 * TASKS


@pytest.mark.parametrize("preceding", ["own", "merged"])
def test_of_one_expert_is_that_expert(suite: Suite, preceding: str) -> None:
    bank = suite.bank([1])
    found = regmean(preceding=preceding)(bank, suite.context(bank))
    for key, tensor in bank.expert(0).items():
        assert torch.equal(found[key], tensor)


@pytest.mark.parametrize("preceding", ["own", "merged"])
def test_a_scaling_stretches_the_vector(suite: Suite, preceding: str) -> None:
    bank = suite.bank()
    context = suite.context(bank)
    method = regmean(preceding=preceding)
    whole = method.vector(bank, context)
    half = RegMean(**{**vars(method), "scaling": 0.5})(bank, context)
    for key, tensor in half.items():
        torch.testing.assert_close(tensor, bank.pretrained[key] + 0.5 * whole[key])
