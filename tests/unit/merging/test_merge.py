"""The differentiable merge and the contraction that is its gradient."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import layerwise, literals
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ShapeError
from adamerge.merging import Partition, contract, merge
from adamerge.merging.merge import merge_into

GRANULARITIES = ["task", "tensor", "block", "chunk(3)", "row", "random(3)"]
EPSILON = torch.finfo(torch.float32).eps
SHAPES = {
    "visual.conv1.weight": (3, 2, 1, 2),
    "visual.transformer.resblocks.0.weight": (4, 3),
    "visual.transformer.resblocks.0.bias": (2,),
    "visual.proj": (5,),
}

MakeBank = Callable[..., ParameterBank]
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
"""Of any magnitude and both signs, subnormal ones among them; the difference of two is finite."""


def random_tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator, dtype=dtype) for key, shape in SHAPES.items()}


@pytest.fixture
def bank(make_bank: MakeBank) -> ParameterBank:
    """Three tasks in float64."""
    return make_bank(random_tensors(0), [random_tensors(seed) for seed in (1, 2, 3)], dtype=torch.float64)


def random_coefficients(bank: ParameterBank, partition: Partition, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(iter(bank.pretrained.values())).dtype
    return torch.randn(bank.num_tasks, partition.num_groups, generator=generator, dtype=dtype)


# Values


def literal_bank(make_bank: MakeBank) -> ParameterBank:
    return make_bank(
        {"visual.w": torch.tensor(literals.PRETRAINED)}, [{"visual.w": torch.tensor(e)} for e in literals.EXPERTS]
    )


@pytest.mark.parametrize(
    ("coefficients", "expected"),
    [
        ((0.0, 0.0), literals.PRETRAINED),
        ((1.0, 0.0), literals.EXPERTS[0]),
        ((0.0, 1.0), literals.EXPERTS[1]),
        ((0.5, 0.5), literals.AVERAGE),
        ((0.3, 0.3), literals.TASK_ARITHMETIC),
        ((0.5, 0.25), literals.SCALED),
    ],
)
def test_two_by_two_by_hand(
    make_bank: MakeBank, coefficients: tuple[float, float], expected: tuple[tuple[float, ...], ...]
) -> None:
    bank = literal_bank(make_bank)
    merged = merge(bank, torch.tensor(coefficients)[:, None], Partition.build("task", bank.shapes))
    torch.testing.assert_close(merged, {"visual.w": torch.tensor(expected)})


def test_two_by_two_in_chunks_by_hand(make_bank: MakeBank) -> None:
    bank = literal_bank(make_bank)
    merged = merge(bank, torch.tensor(literals.CHUNK_COEFFICIENTS), Partition.build("chunk(2)", bank.shapes))
    assert torch.equal(merged["visual.w"], torch.tensor(literals.CHUNKED))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equals_the_sum_written_out(bank: ParameterBank, granularity: str) -> None:
    partition = Partition.build(granularity, bank.shapes)
    coefficients = random_coefficients(bank, partition)
    experts = [random_tensors(seed) for seed in (1, 2, 3)]
    expected = layerwise.merged_weights(random_tensors(0), experts, coefficients, granularity)
    torch.testing.assert_close(merge(bank, coefficients, partition), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zero_gives_the_pretrained_weights_bit_for_bit(bank: ParameterBank, granularity: str) -> None:
    partition = Partition.build(granularity, bank.shapes)
    merged = merge(bank, torch.zeros(3, partition.num_groups, dtype=torch.float64), partition)
    assert list(merged) == list(bank.pretrained)
    for key, tensor in merged.items():
        assert torch.equal(tensor, bank.pretrained[key])
        assert tensor.data_ptr() != bank.pretrained[key].data_ptr()


@settings(max_examples=150)
@given(
    st.integers(1, 20).flatmap(
        lambda n: st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=n, max_size=n)
    )
)
@example([(1.9999999, -1.0000001, 3e20, -3e20)])  # opposite signs: τ is in the next binade and rounds
@example([(-0.9999999, 1.9999998, -1e-38, 0.0)])
@example([(1e30, 1e-30, -1e-30, 1.0), (1e-40, 1.0, 1e30, -1e30)])  # huge ratios
def test_one_hot_gives_the_expert_within_one_rounding(entries: list[tuple[float, ...]]) -> None:
    pretrained, *experts = torch.tensor(entries, dtype=torch.float32).T.contiguous()
    bank = ParameterBank.from_experts(
        {"visual.w": pretrained}, {str(k): {"visual.w": expert} for k, expert in enumerate(experts)}, ["visual.w"]
    )
    for granularity in ("tensor", "chunk(3)"):
        partition = Partition.build(granularity, bank.shapes)
        for task, expert in enumerate(experts):
            coefficients = torch.zeros(3, partition.num_groups)
            coefficients[task] = 1
            merged = merge(bank, coefficients, partition)["visual.w"]
            # A spacing of floats at the larger of the two, or exactly right where that is subnormal.
            allowed = EPSILON * torch.maximum(pretrained.abs(), expert.abs()).double()
            assert ((merged.double() - expert.double()).abs() <= allowed).all()


@pytest.mark.parametrize("num_tasks", [1, 8])
def test_float32_error_is_that_of_a_sum_of_k_terms(make_bank: MakeBank, num_tasks: int) -> None:
    experts = [random_tensors(seed, torch.float32) for seed in range(1, num_tasks + 1)]
    pretrained = random_tensors(0, torch.float32)
    bank = make_bank(pretrained, experts)
    partition = Partition.build("tensor", bank.shapes)
    coefficients = random_coefficients(bank, partition)
    for group, (key, merged) in enumerate(merge(bank, coefficients, partition).items()):
        terms = coefficients[:, group].double() * bank.task_vectors[key].flatten(1).T.double()  # (n, K)
        exact = pretrained[key].flatten().double() + terms.sum(1)
        magnitude = pretrained[key].flatten().double().abs() + terms.abs().sum(1)
        assert ((merged.flatten().double() - exact).abs() <= EPSILON * (num_tasks + 1) / 2 * magnitude).all()


def test_task_order_permutes_the_rows_and_nothing_else(make_bank: MakeBank) -> None:
    order = [2, 0, 1]
    experts = [random_tensors(seed, torch.float32) for seed in (1, 2, 3)]
    pretrained = random_tensors(0, torch.float32)
    bank, permuted = make_bank(pretrained, experts), make_bank(pretrained, [experts[k] for k in order])
    partition = Partition.build("tensor", bank.shapes)
    coefficients = random_coefficients(bank, partition).requires_grad_()
    shuffled = coefficients.detach()[order].requires_grad_()
    merged, again = merge(bank, coefficients, partition), merge(permuted, shuffled, partition)
    torch.testing.assert_close(merged, again, rtol=0, atol=8 * EPSILON)
    for tensors in (merged, again):
        sum(tensor.square().sum() for tensor in tensors.values()).backward()
    torch.testing.assert_close(shuffled.grad, coefficients.grad[order], rtol=1e-5, atol=1e-5)
    assert not torch.equal(shuffled.grad, coefficients.grad)


def test_merge_into_equals_merge(bank: ParameterBank) -> None:
    partition = Partition.build("chunk(3)", bank.shapes)
    coefficients = random_coefficients(bank, partition).requires_grad_()
    out = {key: torch.full_like(tensor, torch.nan) for key, tensor in bank.pretrained.items()}
    addresses = {key: tensor.data_ptr() for key, tensor in out.items()}
    merge_into(out, bank, coefficients, partition)
    torch.testing.assert_close(
        out, {k: t.detach() for k, t in merge(bank, coefficients, partition).items()}, rtol=0, atol=0
    )
    assert addresses == {key: tensor.data_ptr() for key, tensor in out.items()}
    assert not any(tensor.requires_grad for tensor in out.values())


def test_scalars_and_transposed_tensors_merge(make_bank: MakeBank) -> None:
    pretrained = {"visual.scale": torch.tensor(2.0), "visual.w": torch.arange(6.0).view(3, 2).t()}
    expert = {"visual.scale": torch.tensor(3.0), "visual.w": torch.arange(6.0).view(3, 2).t() + 1}
    bank = make_bank(pretrained, [expert])
    partition = Partition.build("tensor", bank.shapes)
    merged = merge(bank, torch.tensor([[0.5, 2.0]]), partition)
    assert merged["visual.scale"].shape == ()
    assert merged["visual.scale"].item() == 2.5
    assert torch.equal(merged["visual.w"], pretrained["visual.w"] + 2)
    gradients = {"visual.scale": torch.tensor(3.0), "visual.w": torch.arange(6.0).view(3, 2).t()}
    assert contract(bank, gradients, partition).tolist() == [[3.0, 15.0]]


def test_inputs_stay_as_they_are(bank: ParameterBank) -> None:
    partition = Partition.build("tensor", bank.shapes)
    before = [{k: t.clone() for k, t in tensors.items()} for tensors in (bank.pretrained, bank.task_vectors)]
    coefficients = random_coefficients(bank, partition).requires_grad_()
    kept = coefficients.detach().clone()
    merged = merge(bank, coefficients, partition)
    sum(tensor.sum() for tensor in merged.values()).backward()
    torch.testing.assert_close(before, [dict(bank.pretrained), dict(bank.task_vectors)], rtol=0, atol=0)
    assert torch.equal(coefficients, kept)


# Gradients


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck(bank: ParameterBank, granularity: str) -> None:
    partition = Partition.build(granularity, bank.shapes)
    coefficients = random_coefficients(bank, partition).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: tuple(merge(bank, value, partition).values()), (coefficients,), eps=1e-4, rtol=1e-9
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradient_equals_the_one_through_the_sum_written_out(bank: ParameterBank, granularity: str) -> None:
    partition = Partition.build(granularity, bank.shapes)
    experts = [random_tensors(seed) for seed in (1, 2, 3)]
    weights = random_tensors(9)
    gradients = []
    for function in (
        lambda value: merge(bank, value, partition),
        lambda value: layerwise.merged_weights(random_tensors(0), experts, value, granularity),
    ):
        coefficients = random_coefficients(bank, partition).requires_grad_()
        sum((tensor.sin() * weights[key]).sum() for key, tensor in function(coefficients).items()).backward()
        gradients.append(coefficients.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-13, atol=1e-14)


def test_the_graph_has_one_node(bank: ParameterBank) -> None:
    partition = Partition.build("tensor", bank.shapes)
    coefficients = random_coefficients(bank, partition).requires_grad_()
    nodes = {tensor.grad_fn for tensor in merge(bank, coefficients, partition).values()}
    assert len(nodes) == 1
    after = [node for node, _ in nodes.pop().next_functions if node is not None]
    assert [node.variable is coefficients for node in after] == [True]


def test_no_gradient_where_none_is_asked_for(bank: ParameterBank) -> None:
    partition = Partition.build("tensor", bank.shapes)
    assert not any(t.requires_grad for t in merge(bank, random_coefficients(bank, partition), partition).values())


def test_two_backward_passes_add_up(bank: ParameterBank) -> None:
    partition = Partition.build("tensor", bank.shapes)
    first, second = random_tensors(5), random_tensors(6)
    apart = random_coefficients(bank, partition).requires_grad_()
    merged = merge(bank, apart, partition)
    for weights in (first, second):
        sum((merged[key] * weights[key]).sum() for key in merged).backward(retain_graph=True)
    together = random_coefficients(bank, partition).requires_grad_()
    merged = merge(bank, together, partition)
    sum((merged[key] * (first[key] + second[key])).sum() for key in merged).backward()
    torch.testing.assert_close(apart.grad, together.grad, rtol=1e-13, atol=1e-14)


def test_unused_tensors_count_as_zero(bank: ParameterBank) -> None:
    partition = Partition.build("tensor", bank.shapes)
    coefficients = random_coefficients(bank, partition).requires_grad_()
    merge(bank, coefficients, partition)["visual.proj"].sum().backward()
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[:, 3] = bank.task_vectors["visual.proj"].sum(1)
    torch.testing.assert_close(coefficients.grad, expected, rtol=1e-14, atol=1e-14)


def test_is_differentiable_once(bank: ParameterBank) -> None:
    partition = Partition.build("task", bank.shapes)
    coefficients = random_coefficients(bank, partition).requires_grad_()
    loss = sum(tensor.square().sum() for tensor in merge(bank, coefficients, partition).values())
    (gradient,) = torch.autograd.grad(loss, coefficients, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Contraction


def test_tied_columns_give_the_task_gradient_and_blocks_sum_their_tensors(bank: ParameterBank) -> None:
    gradients = random_tensors(7)
    per = {name: contract(bank, gradients, Partition.build(name, bank.shapes)) for name in GRANULARITIES}
    blocks = torch.stack([per["tensor"][:, 0], per["tensor"][:, 1] + per["tensor"][:, 2], per["tensor"][:, 3]], dim=1)
    torch.testing.assert_close(per["block"], blocks, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(per["task"], per["tensor"].sum(1, keepdim=True), rtol=1e-13, atol=1e-14)
    chunks = Partition.build("chunk(3)", bank.shapes)
    owner = torch.tensor([list(SHAPES).index(name.split("[")[0]) for name in chunks.groups])
    summed = torch.zeros_like(per["tensor"]).index_add(1, owner, per["chunk(3)"])
    torch.testing.assert_close(per["tensor"], summed, rtol=1e-13, atol=1e-14)


def test_contraction_of_float32_is_as_good_as_float64(make_bank: MakeBank) -> None:
    # Products of random signs cancel; adding them up in float32 would leave an error of 1e-7 of their magnitudes, which
    # is far above one rounding of a small sum.
    generator = torch.Generator().manual_seed(0)
    shapes = {"visual.large": (300, 211), "visual.small": (17,)}
    pretrained, *experts = [
        {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} for _ in range(5)
    ]
    bank = make_bank(pretrained, experts)
    gradients = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for granularity in ("task", "tensor", "chunk(2)"):
        partition = Partition.build(granularity, bank.shapes)
        exact = torch.zeros(4, partition.num_groups, dtype=torch.float64)
        for key, segments in partition.segments.items():
            product = bank.task_vectors[key].flatten(1).double() * gradients[key].flatten().double()
            for start, stop, group in segments:
                exact[:, group] += product[:, start:stop].sum(1)
        torch.testing.assert_close(contract(bank, gradients, partition), exact.float(), rtol=2 * EPSILON, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_may_be_narrow_transposed_or_missing(make_bank: MakeBank, dtype: torch.dtype) -> None:
    bank = make_bank(random_tensors(0, torch.float32), [random_tensors(1, torch.float32)])
    partition = Partition.build("tensor", bank.shapes)
    narrow = {
        "visual.transformer.resblocks.0.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
        .t()
        .to(dtype),
        "visual.proj": None,
    }
    wide = {key: tensor.float().contiguous() for key, tensor in narrow.items() if tensor is not None}
    gradient = contract(bank, narrow, partition)
    assert torch.equal(gradient, contract(bank, wide, partition))
    assert gradient.dtype == torch.float32
    assert (gradient != 0).tolist() == [[False, True, False, False]]


# Errors


@pytest.mark.parametrize("shape", [(3, 1), (4, 3), (3,), (1, 4), (3, 5), (12,)])
def test_other_shapes_are_refused(bank: ParameterBank, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected \(3, 4\).*granularity 'tensor'"):
        merge(bank, torch.zeros(shape, dtype=torch.float64), Partition.build("tensor", bank.shapes))


def test_a_partition_of_other_tensors_is_refused(bank: ParameterBank) -> None:
    # Merged tensors are allocated uninitialised: entries that no segment covers would be garbage.
    for key, shape in (("visual.proj", (4,)), ("visual.proj", (6,)), ("visual.else", (5,))):
        shapes = {name: other for name, other in SHAPES.items() if name != "visual.proj"} | {key: shape}
        partition = Partition.build("tensor", shapes)
        with pytest.raises(ShapeError, match=r"visual\.proj"):
            merge(bank, random_coefficients(bank, partition), partition)
