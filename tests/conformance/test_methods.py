"""What every method of conf/method promises; a method that is listed there is tested here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import hydra.utils
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from unit.zoo import Zoo, make_zoo

from adamerge.bank import ParameterBank
from adamerge.cli import commands
from adamerge.cli.config import check_complete, compose_config, config_dir, options
from adamerge.merging import MergedModel, merge
from adamerge.methods import Context, StaticMethod
from adamerge.methods.static import Individual
from adamerge.models.hidden import HiddenStates
from adamerge.objectives import Objective, Outputs, Target
from adamerge.statistics import Expert

METHODS = sorted(file.stem for file in (config_dir() / "method").glob("*.yaml"))

# Options under which one task alone gives its expert. Learners are not listed: they all start there with λ = 1.
EXPERT_AT = {
    "average": [],
    "breadcrumbs": ["method.scaling=1", "method.transform.drop_low=0", "method.transform.drop_high=0"],
    "consensus_task_arithmetic": ["method.scaling=1", "method.transform.agreement=1"],
    "consensus_ties": ["method.scaling=1", "method.transform.agreement=1", "method.transform.before.density=1"],
    "dare_task_arithmetic": ["method.scaling=1", "method.transform.drop=0"],
    "dare_ties": ["method.scaling=1", "method.transform.drop=0", "method.density=1"],
    "delta_guided_fusion": [],
    "fisher_merging": [],
    "individual": [],
    "lines": ["method.scaling=0"],
    "lines_ties": ["method.scaling=0", "method.merging.density=1"],
    "low_rank_task_arithmetic": ["method.scaling=1", "method.transform.rank_share=1"],
    "magmax": ["method.scaling=1"],
    "metrics_weighted_averaging": [],
    "model_stock": [],
    "opcm": [],
    "opt_merge": [],
    "opt_merge_lora": [],
    "ota": ["method.transform.density=1"],
    "r_tsvm": ["method.outlier_weight=1"],
    "regmean": [],
    "regmean_pp": [],
    "slerp": [],
    "task_arithmetic": ["method.scaling=1"],
    "ties": ["method.scaling=1", "method.density=1"],
    "tsv_merge": [],
    "weighted_average": [],
    "widen": [],
    "wudi": [],
}
NEVER_THE_EXPERT = {
    "pretrained",
    "atlas_negation",  # scales one task vector of two or more
    "doge",  # gives every matrix of a task the same norm
    "iso_c",  # its matrices have a flat spectrum
    "iso_cts",  # likewise
    "pcb",  # its least important entry stays at θ₀
    "task_negation",  # goes away from one of two or more
}

# Learners that join the task vectors one after another: their start does not depend on the order, what they learn does.
IN_ORDER = {"self_positioning"}

# Static merges that take the tasks one after another.
ORDERED = {"slerp"}

# Options that a method must be given. Without a target aTLAS learns all tasks from all.
GIVEN = {
    "atlas_fewshot": ["method.target=null"],
    "atlas_negation": ["method.target=task0", "method.control=task1"],
    "atlas_partition": ["method.target=null"],
    "atlas_tta": ["method.target=null"],
    "task_negation": ["method.target=task0", "method.control=task1"],
}


@dataclass(frozen=True)
class Case:
    """A composed method and its name."""

    name: str
    config: DictConfig

    @property
    def method(self) -> Any:
        return hydra.utils.instantiate(self.config.method)

    @property
    def learns(self) -> bool:
        return hasattr(self.method, "prepare")

    def merged(self, bank: ParameterBank) -> list[dict[str, Tensor]]:
        """What the method makes of a bank before any learning; a method without a single model makes one per task."""
        method = self.method
        if isinstance(method, Individual):
            return [method(bank, task) for task in bank.task_names]
        if not self.learns:
            return [merged for _, merged in method.candidates(bank, context_of(method, bank))]
        seen = self.transformed(bank)
        partition, coefficients = method.prepare(seen)
        with torch.no_grad():
            return [merge(seen, coefficients(), partition)]

    def transformed(self, bank: ParameterBank) -> ParameterBank:
        transform = self.method.transform
        return bank.transformed(transform.fit(bank, context_of(self.method, bank))) if transform else bank


def context_of(method: StaticMethod, bank: ParameterBank) -> Context:
    """What the method asks to know about the experts, from the zoo's images of tasks by their numbers."""
    zoo = make_zoo(next(iter(bank.pretrained.values())).dtype, num_tasks=3)

    def gathered(
        replaced: Mapping[str, Tensor] | None = None, keys: Iterable[str] = tuple(bank.pretrained)
    ) -> dict[str, Tensor]:
        of_tasks = []
        for task in bank.task_names:
            number = int(task.removeprefix("task")) if task.startswith("task") else 0
            network = deepcopy(zoo.network)
            network.load_state_dict({**bank.expert(task), **(replaced or {})})
            images, head = torch.cat(zoo.batches[0][number]), zoo.heads[number]
            labels = torch.arange(len(images)) % len(head)
            of_tasks.append(
                method.statistic(Expert(task, network, head, images, labels, tuple(keys), head.device, "32-true", 4))
            )
        return {name: torch.stack([found[name] for found in of_tasks]) for name in of_tasks[0]}

    return Context(gathered(), gathered) if method.statistic else Context()


@cache
def compose(name: str, *overrides: str) -> Case:
    return Case(name, compose_unanswered(name, *GIVEN.get(name, []), *overrides))


def compose_unanswered(name: str, *overrides: str) -> DictConfig:
    """Without the options that the method must be given."""
    before = HydraConfig.instance().cfg
    config, _ = compose_config("train", [f"method={name}", "suite=folder", "suite.root=x", *overrides])
    HydraConfig.instance().cfg = before
    return config


LEARNERS = [name for name in METHODS if compose(name).learns]


@pytest.fixture(params=METHODS)
def case(request: pytest.FixtureRequest) -> Case:
    return compose(request.param)


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return make_zoo(num_tasks=3)


def permuted(bank: ParameterBank, order: Sequence[int]) -> ParameterBank:
    task_vectors = {key: tensor[list(order)].clone() for key, tensor in bank.task_vectors.items()}
    return ParameterBank(bank.pretrained, task_vectors, tuple(bank.task_names[index] for index in order))


def copied(bank: ParameterBank) -> ParameterBank:
    return permuted(bank, range(bank.num_tasks))


def assert_weights(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def test_there_are_methods() -> None:
    assert {"adamerging_layerwise", "average", "task_arithmetic", "ties"} <= set(METHODS)


def test_every_method_says_when_it_gives_the_expert() -> None:
    """Written down for every method that does not learn: under which options, or never."""
    silent = [name for name in METHODS if name not in {*LEARNERS, *EXPERT_AT, *NEVER_THE_EXPERT}]
    assert not silent, f"add {silent} to EXPERT_AT or NEVER_THE_EXPERT"
    assert EXPERT_AT.keys() | NEVER_THE_EXPERT <= set(METHODS)


def test_its_file_is_described(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    description = options("method")[case.name]
    assert len(description) > 10
    commands.list_methods([])
    assert f"{case.name}  {description}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_asks_for_what_it_must_be_given(name: str) -> None:
    """A default that it inherits would hide that it asks."""
    config = compose_unanswered(name)
    assert OmegaConf.missing_keys(config) == {option.partition("=")[0] for option in GIVEN.get(name, [])}


def test_composes_and_instantiates(case: Case) -> None:
    check_complete(case.config)
    method = case.method
    if case.learns:
        assert method.coefficients is None
        assert method.transform is None or method.transform.to_json()["name"]
    elif case.name != "individual":
        assert method.statistic is None or method.statistic.to_json()["name"]


@pytest.mark.parametrize("name", [name for name in METHODS if "scaling" in compose(name).config.method])
def test_a_search_offers_every_scaling_of_the_grid(name: str, zoo: Zoo) -> None:
    case = compose(name, "method.scaling=search")
    context = context_of(case.method, zoo.bank)
    candidates = list(case.method.candidates(zoo.bank, context))
    assert [candidate.scaling for candidate, _ in candidates] == list(case.config.method.grid)
    chosen, merged = candidates[1]
    fixed = compose(name, f"method.scaling={chosen.scaling}").method
    assert_weights(merged, fixed(zoo.bank, context), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_keys_shapes_and_dtypes(case: Case, zoo: Zoo, dtype: torch.dtype) -> None:
    experts = dict(zip(zoo.bank.task_names, zoo.experts, strict=True))
    bank = ParameterBank.from_experts(zoo.pretrained, experts, list(zoo.pretrained), dtype=dtype)
    for merged in case.merged(bank):
        assert list(merged) == list(bank.pretrained)
        assert {key: tensor.shape for key, tensor in merged.items()} == bank.shapes
        assert {tensor.dtype for tensor in merged.values()} == {dtype}
        assert all(tensor.isfinite().all() for tensor in merged.values())
        assert not any(tensor.requires_grad for tensor in merged.values())


def test_leaves_the_bank_untouched_and_shares_no_memory_with_it(case: Case, zoo: Zoo) -> None:
    pretrained = {key: tensor.clone() for key, tensor in zoo.pretrained.items()}
    bank = ParameterBank(pretrained, copied(zoo.bank).task_vectors, zoo.bank.task_names)
    for merged in case.merged(bank):
        for tensor in merged.values():
            tensor.fill_(7)
    assert_weights(dict(bank.pretrained), zoo.pretrained, rtol=0, atol=0)
    assert_weights(dict(bank.task_vectors), dict(zoo.bank.task_vectors), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if compose(name).config.method.get("transform")])
def test_an_in_place_transform_gives_what_the_lazy_one_gives(name: str, zoo: Zoo) -> None:
    method, bank = compose(name).method, copied(zoo.bank)
    context, transform = context_of(method, bank), method.transform
    assert transform.to_json()["name"]
    lazy = bank.transformed(transform.fit(bank, context))
    expected = {key: lazy.task_vectors[key].clone() for key in lazy.task_vectors}
    assert bank.transformed(transform.fit(bank, context), in_place=True) is bank
    assert_weights(dict(bank.task_vectors), expected, rtol=0, atol=0)


def test_gives_the_pretrained_model_for_experts_that_equal_it(case: Case, zoo: Zoo) -> None:
    bank = ParameterBank.from_experts(
        zoo.pretrained, dict.fromkeys(zoo.bank.task_names, zoo.pretrained), list(zoo.pretrained)
    )
    for merged in case.merged(bank):
        assert_weights(merged, zoo.pretrained, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NEVER_THE_EXPERT])
def test_gives_the_expert_for_one_task(name: str, zoo: Zoo) -> None:
    case = compose(name, *EXPERT_AT.get(name, []))
    if case.learns:
        transformed = ["method.transform.density=1"] if "density" in (case.config.method.transform or {}) else []
        case = compose(name, "method.init=1", *transformed)
    bank = ParameterBank.from_experts(zoo.pretrained, {"only": zoo.experts[1]}, list(zoo.pretrained))
    (merged,) = case.merged(bank)
    assert_expert(merged, zoo, 1)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name not in NEVER_THE_EXPERT])
def test_one_hot_coefficients_give_the_expert_that_the_method_sees(name: str, zoo: Zoo) -> None:
    case = compose(name, "method.init=[0,1,0]")
    (merged,) = case.merged(zoo.bank)
    if case.method.transform is None:
        assert_expert(merged, zoo, 1)
    else:
        assert_weights(merged, case.transformed(zoo.bank).expert(1), rtol=1e-6, atol=1e-7)


def assert_expert(merged: dict[str, Tensor], zoo: Zoo, task: int) -> None:
    """Within one float32 rounding of the larger of |θ₀| and |θ_k|."""
    for key, expert in zoo.experts[task].items():
        size = torch.maximum(zoo.pretrained[key].abs(), expert.abs())
        assert ((merged[key] - expert).abs() <= torch.finfo(torch.float32).eps * size).all(), key


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ORDERED])
def test_does_not_depend_on_task_order(name: str, zoo: Zoo, order: tuple[int, ...]) -> None:
    case = compose(name)
    found = case.merged(permuted(zoo.bank, order))
    expected = case.merged(zoo.bank)
    if isinstance(case.method, Individual):
        expected = [expected[index] for index in order]
    for merged, reference in zip(found, expected, strict=True):
        assert_weights(merged, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ORDERED))
def test_depends_on_task_order_and_says_so(name: str, zoo: Zoo) -> None:
    case = compose(name)
    (merged,), (found,) = case.merged(zoo.bank), case.merged(permuted(zoo.bank, (2, 0, 1)))
    assert any((merged[key] - found[key]).abs().max() > 1e-4 for key in merged)
    assert "order of the tasks" in " ".join((type(case.method).__doc__ or "").split())


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learning_step_does_not_depend_on_task_order(name: str, zoo: Zoo) -> None:
    case = compose(name, *(["optimizer.lr=0.1"] if name in IN_ORDER else []))  # far enough to tell orders apart
    order = (2, 0, 1)
    gradient, merged = step(case, zoo, range(3))
    found_gradient, found = step(case, zoo, order)
    torch.testing.assert_close(found_gradient, gradient[list(order)], rtol=1e-3, atol=1e-5)
    if name in IN_ORDER:
        assert any((merged[key] - found[key]).abs().max() > 1e-4 for key in merged)
        assert "order of the tasks" in (type(case.method).__doc__ or "")
    else:
        assert_weights(found, merged, rtol=1e-5, atol=1e-5)
    (start,) = case.merged(zoo.bank)
    assert any((merged[key] - start[key]).abs().max() > 1e-4 for key in start)


def outputs_of(call: Callable[[Tensor], Tensor], images: Tensor, head: Tensor, objective: Objective) -> Outputs:
    network = call.network if isinstance(call, MergedModel) else call
    hidden = HiddenStates(network, objective.layers)
    features = call(images)
    states = hidden.take()
    hidden.close()
    return Outputs.of(features, head, states)


def target_of(zoo: Zoo, task: int, objective: Objective) -> Target:
    """What the objective needs to know of a task's first batches."""
    images = torch.cat(zoo.batches[0][task])
    labels = torch.arange(len(images)) % len(zoo.heads[task])
    if objective.needs == "labels":
        return Target(labels=labels)
    if objective.needs == "views":
        with torch.no_grad():
            weak = outputs_of(zoo.network, images, zoo.heads[task], objective)
        return Target(weak=weak, trusted=labels)
    expert = deepcopy(zoo.network)
    expert.load_state_dict(zoo.experts[task])
    with torch.no_grad():
        return Target(expert=outputs_of(expert, images, zoo.heads[task], objective))


def step(case: Case, zoo: Zoo, order: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """λ's gradient (K, G) and the weights after one step of the configured optimiser on the configured objective."""
    bank = case.transformed(permuted(zoo.bank, order))
    objective = hydra.utils.instantiate(case.config.objective)
    partition, coefficients = case.method.prepare(bank)
    optimizer = hydra.utils.instantiate(case.config.optimizer)(coefficients.parameters())
    model = MergedModel(zoo.network, bank, partition)
    value = coefficients()
    model.update(value)
    for task in order:
        images = torch.cat(zoo.batches[0][task])
        objective(
            outputs_of(model, images, zoo.heads[task], objective), target_of(zoo, task, objective)
        ).mean().backward()
    gradient = model.coefficient_gradient()
    value.backward(gradient)
    optimizer.step()
    with torch.no_grad():
        return gradient, merge(bank, coefficients(), partition)


@pytest.mark.parametrize("name", sorted(options("objective")))
def test_an_objective_gives_one_loss_per_image(name: str, zoo: Zoo) -> None:
    config = compose("adamerging_layerwise", f"objective={name}").config
    objective = hydra.utils.instantiate(config.objective)
    images = torch.cat(zoo.batches[0][1])
    plain = outputs_of(zoo.network, images, zoo.heads[1], objective)
    outputs = Outputs(plain.logits.detach().requires_grad_(), plain.features, plain.hidden)
    losses = objective(outputs, target_of(zoo, 1, objective))
    losses.sum().backward()
    assert losses.shape == (len(images),)
    assert outputs.logits.grad is not None
    assert outputs.logits.grad.abs().amax(dim=1).min() > 0


@pytest.mark.parametrize("name", sorted(options("optimizer")))
def test_an_optimizer_moves_its_parameter(name: str) -> None:
    # (K, G), and above 1: Frank-Wolfe steps, which know experts from groups, end in an expert, where one λ is 1.
    parameter = torch.nn.Parameter(torch.full((2, 1), 2.0))
    config = compose("adamerging_layerwise", f"optimizer={name}").config
    optimizer = hydra.utils.instantiate(config.optimizer)([parameter])
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 2).all()
