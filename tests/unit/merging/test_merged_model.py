"""The merged model and, through it, λ's gradient and trajectory against an independent implementation."""

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from reference import layerwise
from torch import Tensor, nn
from torch.func import functional_call
from unit.zoo import Zoo

from adamerge.errors import ConfigError, KeyMismatchError, ShapeError
from adamerge.merging import CONSTRAINTS, Coefficients, MergedModel, Partition, merge
from adamerge.objectives import softmax_entropy

GRANULARITIES = ["task", "tensor", "block", "chunk(3)", "row", "random(3)"]
MATHEMATICALLY_ZERO = ("resblocks.0.in_proj.bias[1]", "resblocks.1.in_proj.bias[1]")
"""The key third of a packed bias: it adds the same to all of a query's attention logits, so softmax does not see it."""


def seeing(partition: Partition) -> Tensor:
    """Which groups can have a gradient at all, (G,)."""
    in_runs = partition.granularity.startswith("chunk")
    return torch.tensor([not (in_runs and name.endswith(MATHEMATICALLY_ZERO)) for name in partition.groups])


def entropy_loss(call: Callable[[Tensor], Tensor], zoo: Zoo, step: int = 0) -> Tensor:
    return sum(
        softmax_entropy(F.normalize(call(images), dim=-1) @ head.T).mean()
        for head, of_task in zip(zoo.heads, zoo.batches[step], strict=True)
        for images in of_task
    )


def gradient_by_leaves(zoo: Zoo, raw: Tensor, constraint: str, partition: Partition) -> Tensor:
    """∂loss/∂raw by one accumulation in the merged weights and one contraction; tasks one after another."""
    raw = raw.detach().clone().requires_grad_()
    coefficients = CONSTRAINTS[constraint].forward(raw)
    model = MergedModel(zoo.network, zoo.bank, partition)
    model.update(coefficients)
    for head, of_task in zip(zoo.heads, zoo.batches[0], strict=True):
        sum(softmax_entropy(F.normalize(model(images), dim=-1) @ head.T).mean() for images in of_task).backward()
    coefficients.backward(model.coefficient_gradient())
    return raw.grad


def gradient_by_graph(zoo: Zoo, raw: Tensor, constraint: str, partition: Partition) -> Tensor:
    """∂loss/∂raw through ``merge``'s own backward."""
    raw = raw.detach().clone().requires_grad_()
    weights = merge(zoo.bank, CONSTRAINTS[constraint].forward(raw), partition)
    entropy_loss(lambda images: functional_call(zoo.network, weights, (images,)), zoo).backward()
    return raw.grad


def raw_values(name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    values = {
        "zero": torch.zeros(shape),
        "one-hot": torch.eye(shape[0])[:, :1].expand(shape),
        "0.3": torch.full(shape, 0.3),
        "random": torch.rand(shape, generator=generator),
        "outside": 0.5 + torch.randn(shape, generator=generator),
    }
    return values[name].to(dtype).clone()


# Against the reference, float32


@pytest.mark.parametrize("gradient", [gradient_by_leaves, gradient_by_graph])
@pytest.mark.parametrize("where", ["zero", "one-hot", "0.3", "random", "outside"])
def test_layerwise_gradient_equals_the_reference_in_float32(
    zoo: Zoo, where: str, gradient: Callable[..., Tensor]
) -> None:
    partition = Partition.build("tensor", zoo.bank.shapes)
    raw = raw_values(where, (3, partition.num_groups), torch.float32)
    expected = zoo.reference_gradient(raw, "clamp", "tensor")
    found = gradient(zoo, raw, "clamp", partition)
    clipped = (raw < 0) | (raw > 1)
    assert torch.equal(found == 0, clipped)
    assert torch.equal(expected == 0, clipped)
    assert clipped.any() == (where == "outside")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # No group was left out as "mathematically zero": such a sum cancels to the rounding of its terms.
    size = magnitudes(zoo, raw.clamp(0, 1), partition)
    assert (expected.abs() * 150 > size)[~clipped].all()
    assert ((found - expected).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


def magnitudes(zoo: Zoo, coefficients: Tensor, partition: Partition) -> Tensor:
    """Σ |∂L/∂θ[p]| |τ_k[p]| of every group (K, G): what the terms of the gradient's sum add up to without signs."""
    weights = {key: tensor.requires_grad_() for key, tensor in merge(zoo.bank, coefficients, partition).items()}
    entropy_loss(lambda images: functional_call(zoo.network, weights, (images,)), zoo).backward()
    columns = [
        (zoo.bank.task_vectors[key].flatten(1) * tensor.grad.flatten()).abs().sum(1) for key, tensor in weights.items()
    ]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_freed_as_they_arrive_contract_to_the_same(zoo: Zoo, granularity: str) -> None:
    partition = Partition.build(granularity, zoo.bank.shapes)
    coefficients = raw_values("random", (3, partition.num_groups), torch.float32)
    found, alive = {}, {}
    for single in (False, True):
        model = MergedModel(zoo.network, zoo.bank, partition)
        for _ in range(2):  # the second time into leaves that exist
            model.update(coefficients, single_backward=single)
            entropy_loss(model, zoo).backward()
        found[single] = model.coefficient_gradient()
        alive[single] = [leaf.grad is not None for leaf in model._leaves.values()]
    torch.testing.assert_close(found[True], found[False], rtol=1e-6, atol=0)
    assert all(alive[False])
    assert not any(alive[True])


@pytest.mark.parametrize("granularity", ["tensor", "task", "block"])
def test_coefficients_after_20_steps_equal_the_reference_in_float32(zoo: Zoo, granularity: str) -> None:
    partition = Partition.build(granularity, zoo.bank.shapes)
    coefficients = Coefficients(3, partition.num_groups, init=0.3, constraint="clamp")
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=1e-3)
    model = MergedModel(zoo.network, zoo.bank, partition)
    for step in range(20):
        optimizer.zero_grad()
        value = coefficients()
        model.update(value)
        entropy_loss(model, zoo, step).backward()
        value.backward(model.coefficient_gradient())
        optimizer.step()
    expected = layerwise.learn(
        zoo.network, zoo.pretrained, zoo.experts, zoo.heads, zoo.batches, 20, granularity=granularity
    )
    torch.testing.assert_close(coefficients.raw.detach(), expected, rtol=1e-5, atol=0)
    assert (coefficients.raw - 0.3).abs().max() > 0.015


# Against the reference and finite differences, float64


@pytest.mark.parametrize("gradient", [gradient_by_leaves, gradient_by_graph])
@pytest.mark.parametrize("constraint", sorted(CONSTRAINTS))
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradient_equals_the_reference_in_float64(
    zoo64: Zoo, granularity: str, constraint: str, gradient: Callable[..., Tensor]
) -> None:
    partition = Partition.build(granularity, zoo64.bank.shapes)
    raw = raw_values("outside", (3, partition.num_groups), torch.float64)
    expected = zoo64.reference_gradient(raw, constraint, granularity)
    found = gradient(zoo64, raw, constraint, partition)
    seen = seeing(partition)
    assert expected[:, ~seen].abs().le(1e-12).all()
    torch.testing.assert_close(found[:, seen], expected[:, seen], rtol=1e-9, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("constraint", sorted(CONSTRAINTS))
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradient_equals_finite_differences(zoo_of: Callable[..., Zoo], granularity: str, constraint: str) -> None:
    zoo = zoo_of(torch.float64, num_tasks=2)
    partition = Partition.build(granularity, zoo.bank.shapes)
    shape = (2, partition.num_groups)
    generator = torch.Generator().manual_seed(12)
    raw = 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)  # away from the clamp's kinks
    raw[0, -1] = 1.2
    found = gradient_by_leaves(zoo, raw, constraint, partition)

    @torch.no_grad()
    def loss(at: Tensor) -> Tensor:
        model = MergedModel(zoo.network, zoo.bank, partition)
        model.update(CONSTRAINTS[constraint].forward(at))
        return entropy_loss(model, zoo)

    entries = [(k, g) for k in range(2) for g in range(partition.num_groups) if seeing(partition)[g]]
    picked = torch.randperm(len(entries), generator=generator)[:16].tolist()
    step = 2e-3
    for task, group in [entries[i] for i in picked] + [(0, partition.num_groups - 1)]:
        unit = torch.zeros(shape, dtype=torch.float64)
        unit[task, group] = step
        # Central, fourth order: the error of the formula and that of rounding are both below 1e-11 of the loss.
        near, far = loss(raw + unit) - loss(raw - unit), loss(raw + 2 * unit) - loss(raw - 2 * unit)
        slope = (8 * near - far) / (12 * step)
        torch.testing.assert_close(found[task, group], slope, rtol=1e-6, atol=1e-10)


# The model itself


@pytest.fixture
def model(zoo: Zoo) -> MergedModel:
    return MergedModel(zoo.network, zoo.bank, Partition.build("tensor", zoo.bank.shapes))


def test_output_is_the_networks_with_merged_weights(zoo: Zoo, model: MergedModel) -> None:
    coefficients = raw_values("random", (3, model.partition.num_groups), torch.float32)
    model.update(coefficients)
    images = zoo.batches[0][0][0]
    weights = dict(layerwise.merged_weights(zoo.pretrained, zoo.experts, coefficients, "tensor"))
    torch.testing.assert_close(model(images), functional_call(zoo.network, weights, (images,)), rtol=1e-5, atol=1e-5)
    assert (model(images) - zoo.network(images)).abs().max() > 1e-2


def test_one_hot_output_is_the_experts(zoo: Zoo, model: MergedModel) -> None:
    images = zoo.batches[0][0][0]
    model.update(raw_values("one-hot", (3, model.partition.num_groups), torch.float32))
    torch.testing.assert_close(
        model(images), functional_call(zoo.network, zoo.experts[0], (images,)), rtol=1e-4, atol=1e-5
    )


def test_network_and_bank_stay_as_they_are(zoo: Zoo, model: MergedModel) -> None:
    model.update(torch.full((3, model.partition.num_groups), 0.3))
    entropy_loss(model, zoo).backward()
    model.coefficient_gradient()
    torch.testing.assert_close(dict(zoo.network.state_dict()), zoo.pretrained, rtol=0, atol=0)
    torch.testing.assert_close(dict(zoo.bank.pretrained), zoo.pretrained, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in zoo.network.parameters())


def test_backward_passes_add_up_until_the_next_update(zoo: Zoo, model: MergedModel) -> None:
    coefficients = torch.full((3, model.partition.num_groups), 0.3)
    model.update(coefficients)
    entropy_loss(model, zoo, 0).backward()
    first = model.coefficient_gradient()
    entropy_loss(model, zoo, 1).backward()
    both = model.coefficient_gradient()
    model.update(coefficients)
    assert not model.coefficient_gradient().any()
    entropy_loss(model, zoo, 1).backward()
    torch.testing.assert_close(first + model.coefficient_gradient(), both, rtol=1e-4, atol=1e-6)


def test_updates_reuse_the_memory_of_the_weights(model: MergedModel) -> None:
    shape = (3, model.partition.num_groups)
    model.update(torch.zeros(shape))
    addresses = {key: tensor.data_ptr() for key, tensor in model.weights().items()}
    model.update(torch.ones(shape))
    assert addresses == {key: tensor.data_ptr() for key, tensor in model.weights().items()}


def test_weights_are_the_merged_ones_without_a_graph(zoo: Zoo, model: MergedModel) -> None:
    coefficients = torch.full((3, model.partition.num_groups), 0.3, requires_grad=True)
    model.update(coefficients)
    weights = model.weights()
    assert not any(tensor.requires_grad for tensor in weights.values())
    torch.testing.assert_close(weights, merge(zoo.bank, coefficients.detach(), model.partition), rtol=0, atol=0)


def test_learning_goes_on_after_an_update_in_inference_mode(zoo: Zoo, model: MergedModel) -> None:
    # Lightning validates in inference mode, also before the first step.
    coefficients = torch.full((3, model.partition.num_groups), 0.3)
    with torch.inference_mode():
        model.update(coefficients)
        model(zoo.batches[0][0][0])
    model.update(coefficients)
    entropy_loss(model, zoo).backward()
    assert model.coefficient_gradient().any()


def test_other_shapes_are_refused(model: MergedModel) -> None:
    with pytest.raises(ShapeError, match=r"expected \(3, 32\)"):
        model.update(torch.zeros(3, 1))


def test_a_network_without_the_banks_parameters_is_refused(zoo: Zoo) -> None:
    # functional_call ignores names it does not know: the merge would go unseen.
    with pytest.raises(KeyMismatchError, match=r"visual\."):
        MergedModel(nn.Linear(2, 2), zoo.bank, Partition.build("tensor", zoo.bank.shapes))


def test_a_call_before_the_first_update_is_refused(zoo: Zoo, model: MergedModel) -> None:
    with pytest.raises(RuntimeError, match="update"):
        model(zoo.batches[0][0][0])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_gives_the_same_gradient(zoo64: Zoo) -> None:
    partition = Partition.build("tensor", zoo64.bank.shapes)
    found = []
    for compiled in (None, "default"):
        model = MergedModel(zoo64.network, zoo64.bank, partition, compiled=compiled)
        for factor in (0.1, 0.3):  # the second with other weights in the same tensors
            model.update(torch.full((zoo64.bank.num_tasks, partition.num_groups), factor, dtype=torch.float64))
            entropy_loss(model, zoo64).backward()
            found.append(model.coefficient_gradient())
    eager, compiled = found[:2], found[2:]
    torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(*eager)


def test_an_unknown_mode_of_compilation_is_refused(zoo: Zoo) -> None:
    partition = Partition.build("tensor", zoo.bank.shapes)
    with pytest.raises(ConfigError, match=r"model\.compile: expected null or one of default, .*found 'fast'"):
        MergedModel(zoo.network, zoo.bank, partition, compiled="fast")
