"""A model merged within a mask: its weights and both gradients, against autograd and finite differences in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from reference import concrete
from torch import Tensor
from unit.zoo import Zoo

from adamerge.merging import Partition, merge
from adamerge.merging.concrete_mask import ConcreteMask
from adamerge.merging.masked_model import MaskedModel
from adamerge.merging.noise import uniform
from adamerge.objectives import softmax_entropy

GRANULARITIES = ["task", "tensor", "row"]


class Masked:
    """A zoo, merged within one draw of a mask whose logits differ."""

    def __init__(self, zoo: Zoo, granularity: str) -> None:
        self.zoo = zoo
        self.partition = Partition.build(granularity, zoo.bank.shapes)
        self.model = MaskedModel(zoo.network, zoo.bank, self.partition)
        self.mask = ConcreteMask(zoo.bank.shapes, init=0.0, temperature=0.5, dtype="float32", seed=0).double()
        generator = torch.Generator().manual_seed(7)
        for _, logits in self.mask.items():
            logits.data.copy_(torch.randn(logits.shape, generator=generator, dtype=torch.float64))
        shape = (zoo.bank.num_tasks, self.partition.num_groups)
        self.coefficients = 0.3 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.reference = concrete.Problem(zoo.network, zoo.pretrained, zoo.experts, zoo.heads, granularity=granularity)

    @property
    def noise(self) -> dict[str, Tensor]:
        return {
            key: uniform(f"0/step 0/{key}", base.numel(), device="cpu", dtype=base.dtype).view_as(base)
            for key, base in self.zoo.pretrained.items()
        }

    @property
    def logits(self) -> dict[str, Tensor]:
        return {key: value.detach() for key, value in self.mask.items()}

    def update(self, coefficients: Tensor | None = None, **options: Any) -> None:
        self.drawn = self.mask.draw("step 0")
        self.model.mask = self.drawn.mask
        self.model.update(self.coefficients if coefficients is None else coefficients, **options)

    def loss(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for head, batches in zip(self.zoo.heads, self.zoo.batches[0], strict=True):
            for images in batches:
                features = self.model(images)
                total = total + softmax_entropy(features / features.norm(dim=1, keepdim=True) @ head.T).mean()
        return total

    def slopes(self) -> Mapping[str, Tensor]:
        return {key: self.mask.slope(key, self.drawn, self.model.mask_gradient(key)) for key, _ in self.mask.items()}


@pytest.fixture
def masked(zoo64: Zoo) -> Callable[[str], Masked]:
    return lambda granularity: Masked(zoo64, granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_are_the_references(masked: Callable[[str], Masked], granularity: str) -> None:
    case = masked(granularity)
    case.update()
    expected = case.reference.weights(case.logits, case.noise, case.coefficients)
    for key, weights in case.model.weights().items():
        torch.testing.assert_close(weights, expected[key], rtol=1e-10, atol=1e-12)


def test_a_mask_of_ones_is_the_plain_merge_and_of_zeros_the_pretrained_model(masked: Callable[[str], Masked]) -> None:
    case = masked("tensor")
    bank = case.zoo.bank
    case.model.mask = {key: torch.ones_like(base) for key, base in bank.pretrained.items()}
    case.model.update(case.coefficients)
    plain = merge(bank, case.coefficients, case.partition)
    for key, weights in case.model.weights().items():
        torch.testing.assert_close(weights, plain[key], rtol=1e-12, atol=1e-14)
    case.model.mask = {key: torch.zeros_like(base) for key, base in bank.pretrained.items()}
    case.model.update(case.coefficients)
    assert all(torch.equal(weights, bank.pretrained[key]) for key, weights in case.model.weights().items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_both_gradients_are_autograd_s(masked: Callable[[str], Masked], granularity: str) -> None:
    case = masked(granularity)
    case.update()
    case.loss().backward()
    batches = case.zoo.batches[0]
    of_logits = case.reference.mask_gradient(case.logits, case.noise, case.coefficients, batches)
    of_coefficients = case.reference.coefficient_gradient(case.logits, case.noise, case.coefficients, batches)
    torch.testing.assert_close(case.model.coefficient_gradient(), of_coefficients, rtol=1e-8, atol=1e-10)
    assert of_coefficients.abs().max() > 1e-2
    for key, slope in case.slopes().items():
        torch.testing.assert_close(slope, of_logits[key], rtol=1e-8, atol=1e-10)
    assert max(slope.abs().max() for slope in of_logits.values()) > 1e-4


def test_both_gradients_are_finite_differences(masked: Callable[[str], Masked]) -> None:
    case = masked("tensor")
    case.update()
    case.loss().backward()
    gradient, slopes = case.model.coefficient_gradient(), case.slopes()
    step = 1e-5
    for place in ((0, 0), (1, 5), (2, -1)):
        losses = []
        for sign in (1, -1):
            moved = case.coefficients.clone()
            moved[place] += sign * step
            case.update(moved)
            losses.append(case.loss().detach())
        torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), gradient[place], rtol=1e-5, atol=1e-9)
    for key, logits in case.mask.items():
        place = tuple(int(i) for i in torch.unravel_index(slopes[key].abs().argmax(), logits.shape))
        losses = []
        for change in (step, -2 * step):
            logits.data[place] += change
            case.update()
            losses.append(case.loss().detach())
        logits.data[place] += step
        difference = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(difference, slopes[key][place], rtol=1e-4, atol=1e-9, msg=key)


def test_a_single_backward_pass_frees_gradients_and_gives_the_same(masked: Callable[[str], Masked]) -> None:
    case = masked("tensor")
    case.update()
    case.loss().backward()
    expected = case.model.coefficient_gradient()
    case.update(single_backward=True)
    case.loss().backward()
    assert all(leaf.grad is None for leaf in case.model._leaves.values())
    torch.testing.assert_close(case.model.coefficient_gradient(), expected, rtol=1e-12, atol=1e-14)


def test_gradients_add_up_until_the_next_update(masked: Callable[[str], Masked]) -> None:
    case = masked("task")
    case.update()
    case.loss().backward()
    once = {key: case.model.mask_gradient(key) for key in case.zoo.pretrained}
    case.loss().backward()
    for key, gradient in once.items():
        torch.testing.assert_close(case.model.mask_gradient(key), 2 * gradient)
    case.update()
    assert not any(case.model.mask_gradient(key).any() for key in once)
    assert not case.model.coefficient_gradient().any()


def test_it_moves_to_another_dtype_of_device_and_back(masked: Callable[[str], Masked]) -> None:
    case = masked("task")
    case.update()
    before = {key: weights.clone() for key, weights in case.model.weights().items()}
    case.model.to("cpu")
    case.update()
    assert all(torch.equal(weights, before[key]) for key, weights in case.model.weights().items())
