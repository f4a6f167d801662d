"""FixMatch: both kinds of images, both views and the rising threshold, against an independent account."""

from math import log
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from reference import atlas as reference
from reference import layerwise
from torch import Tensor
from torch.func import functional_call
from unit.zoo import Zoo

from adamerge.cli.config import config_dir
from adamerge.errors import ConfigError, DataError
from adamerge.learning.losses import TaskLosses
from adamerge.merging import MergedModel, Partition
from adamerge.objectives import FixMatch, Outputs, Target, trusted_classes

PAPER = {
    "exponent": 0.5,
    "first_threshold": 0.9,
    "last_threshold": 1.0,
    "trusted_per_class": 100,
    "trusted_share": 0.25,
    "epochs": 10,
}


def objective(**options: Any) -> FixMatch:
    return FixMatch(**(PAPER | options))


def outputs(logits: Tensor) -> Outputs:
    return Outputs(logits, logits.new_empty(len(logits), 0))


def losses(strong: Tensor, weak: Tensor, trusted: list[int], progress: float = 0.0, **options: Any) -> Tensor:
    target = Target(weak=outputs(weak), trusted=torch.tensor(trusted), progress=progress)
    return objective(**options)(outputs(strong), target)


def test_defaults_are_the_papers() -> None:
    chosen = yaml.safe_load((config_dir() / "objective" / "fixmatch.yaml").read_text())
    assert {name: chosen[name] for name in PAPER} == PAPER


# By hand


def test_values_by_hand_one_per_image() -> None:
    """Strong view: p' = (1/4, 3/4). Weak views: (400/401, 1/401) has the roots 20 : 1, max σ = 20/21 > 0.9; of
    (4/5, 1/5) they are 2 : 1."""
    strong = torch.tensor([[1.0, 3.0]] * 4, dtype=torch.float64).log()
    weak = torch.tensor([[400.0, 1.0], [400.0, 1.0], [4.0, 1.0], [4.0, 1.0]], dtype=torch.float64).log()
    found = losses(strong, weak, [-1, 1, -1, 0])
    expected = [20 / 21 * log(4) + 1 / 21 * log(4 / 3), log(4 / 3), 0.0, log(4)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_power_flattens_before_the_threshold() -> None:
    """p = (0.95, 0.05) is above 0.9, its power (0.813, 0.187) is not; as it is, with a = 1, it would count."""
    strong, weak = torch.zeros(1, 2), torch.tensor([[0.95, 0.05]]).log()
    assert losses(strong, weak, [-1]).item() == 0
    assert losses(strong, weak, [-1], exponent=1.0).item() == pytest.approx(log(2))


@pytest.mark.parametrize(("progress", "threshold"), [(0.0, 0.9), (0.25, 0.925), (0.5, 0.95), (1.0, 1.0)])
def test_the_threshold_rises_linearly(progress: float, threshold: float) -> None:
    assert objective().threshold(progress) == pytest.approx(threshold)
    for margin, counts in ((-2e-3, False), (2e-3, True)):
        top = threshold + margin
        if top >= 1:
            continue
        weak = 2 * torch.tensor([[top, 1 - top]], dtype=torch.float64).log()  # so that σ is (top, 1 - top)
        found = losses(torch.zeros(1, 2, dtype=torch.float64), weak, [-1], progress)
        assert found.item() == pytest.approx(log(2) if counts else 0)


def test_at_the_end_no_image_is_sure_enough() -> None:
    """max σ > 1 never holds, not even for σ that rounds to 1."""
    assert losses(torch.zeros(1, 2), torch.tensor([[900.0, 0.0]]), [-1], 1.0).item() == 0


# Against the reference


@pytest.mark.parametrize(("exponent", "progress"), [(0.5, 0.0), (0.5, 0.6), (2.0, 0.3)])
def test_equals_the_reference(exponent: float, progress: float) -> None:
    generator = torch.Generator().manual_seed(1)
    strong = 3 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    weak = 4 / exponent * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    trusted = torch.randint(-1, 4, (60,), generator=generator).tolist()
    threshold = 0.9 + progress * 0.1
    expected = [
        reference.fixmatch(*image, exponent, threshold)
        for image in zip(strong.tolist(), weak.tolist(), trusted, strict=True)
    ]
    found = losses(strong, weak, trusted, progress, exponent=exponent)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    others = [loss for loss, of_class in zip(expected, trusted, strict=True) if of_class < 0]
    assert 0 < sum(loss == 0 for loss in others) < len(others)  # both kinds occur


def test_gradcheck_and_no_gradient_through_the_weak_view() -> None:
    generator = torch.Generator().manual_seed(2)
    strong = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weak = (9 * torch.randn(6, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    trusted = [-1, 2, -1, 0, -1, -1]
    assert torch.autograd.gradcheck(lambda at: losses(at, weak.detach(), trusted), (strong,))
    losses(strong, weak, trusted).sum().backward()
    assert strong.grad is not None
    assert weak.grad is None


def test_finite_differences_of_coefficients_with_the_weak_views_held(zoo64: Zoo) -> None:
    """∂L/∂λ as learning computes it; the reference's weights, and weak views that stay those of the unmoved λ."""
    names = zoo64.bank.task_names
    strong = {name: torch.cat(of_task) for name, of_task in zip(names, zoo64.batches[0], strict=True)}
    weak = {name: torch.cat(of_task) for name, of_task in zip(names, zoo64.batches[1], strict=True)}
    heads = {name: 10 * head for name, head in zip(names, zoo64.heads, strict=True)}  # CLIP's scale: some are sure
    trusted = {name: torch.tensor([1, -1, -1, 0, -1, -1, -1, 2]) for name in names}
    at = torch.full((3, len(zoo64.pretrained)), 0.2, dtype=torch.float64)

    def logits(images: Tensor, name: str, coefficients: Tensor) -> Tensor:
        merged = layerwise.merged_weights(zoo64.pretrained, zoo64.experts, coefficients, "tensor")
        features = functional_call(zoo64.network, dict(merged), (images,))
        return features / features.norm(dim=1, keepdim=True) @ heads[name].T

    said = {name: logits(weak[name], name, at).tolist() for name in names}

    def by_task(coefficients: Tensor) -> list[float]:
        found = []
        for name in names:
            views = logits(strong[name], name, coefficients).tolist()
            images = zip(views, said[name], trusted[name].tolist(), strict=True)
            found.append(sum(reference.fixmatch(*image, 0.5, 0.95) for image in images) / 8)
        return found

    model = MergedModel(zoo64.network, zoo64.bank, Partition.build("tensor", zoo64.bank.shapes))
    model.update(at)
    task_losses = TaskLosses(objective(), heads, dict.fromkeys(names, 1.0), True)
    task_losses.progress = 0.5
    weights = {name: torch.full((8,), 1 / 8, dtype=torch.float64) for name in names}
    targets = {name: {"weak": weak[name], "trusted": trusted[name]} for name in names}
    found = task_losses.backward(model, {"images": strong, "weights": weights, "targets": targets})
    torch.testing.assert_close(found.tolist(), by_task(at), rtol=1e-9, atol=0)
    sure = [
        max(reference.probabilities([0.5 * v for v in row])) > 0.95
        for name in names
        for row, of_class in zip(said[name], trusted[name].tolist(), strict=True)
        if of_class < 0
    ]
    assert 0 < sum(sure) < len(sure)
    gradient, width = model.coefficient_gradient(), 1e-5
    for seed in range(3):
        way = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = (sum(by_task(at + width * way)) - sum(by_task(at - width * way))) / (2 * width)
        assert float((gradient * way).sum()) == pytest.approx(expected, rel=1e-5)


# Trusted classes


@given(count=st.integers(1, 30), classes=st.integers(1, 6), per_class=st.integers(1, 8), seed=st.integers(0, 2**31 - 1))
def test_trusted_classes_equal_the_reference(count: int, classes: int, per_class: int, seed: int) -> None:
    logits = 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))
    found = trusted_classes(logits, per_class)
    if classes > 1:  # of one class all are equally likely
        assert found.tolist() == reference.trusted(logits.double().tolist(), per_class)
    most = max(1, min(count // classes, per_class))
    assert found.dtype == torch.int64
    assert all((found == c).sum() <= most for c in range(classes))
    assert 0 < (found >= 0).sum() <= most * classes


def test_every_class_takes_its_likeliest_images_whatever_they_are_likeliest_for() -> None:
    """All six images look like class 0; the classes take two each: 0 and 1, 2 and 3, 4 and 5."""
    p = torch.tensor(
        [
            [0.98, 0.01, 0.01],
            [0.97, 0.02, 0.01],
            [0.50, 0.44, 0.06],
            [0.55, 0.40, 0.05],
            [0.60, 0.10, 0.30],
            [0.70, 0.05, 0.25],
        ]
    )
    assert trusted_classes(p.log(), 100).tolist() == [0, 0, 1, 1, 2, 2]
    assert trusted_classes(p.log(), 1).tolist() == [0, -1, 1, -1, 2, -1]


def test_an_image_that_several_classes_take_goes_to_its_likeliest() -> None:
    p = torch.tensor([[0.4, 0.6], [0.3, 0.7], [0.9, 0.1], [0.45, 0.55]])  # 0 takes 2 and 3, 1 takes 1 and 0
    assert trusted_classes(p.log(), 100).tolist() == [1, 1, 0, 0]
    p = torch.tensor([[0.40, 0.38, 0.22], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])  # one each: 0 and 1 take 0, 2 takes 1
    assert trusted_classes(p.log(), 100).tolist() == [0, 2, -1]


def test_no_more_of_a_class_than_its_share_of_the_images() -> None:
    """Ten images, four classes: ⌊10 / 4⌋ = 2 of each at most."""
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    counts = [(trusted_classes(logits, 100) == c).sum().item() for c in range(4)]
    assert max(counts) == 2


def test_fewer_images_than_classes_still_give_one_of_each() -> None:
    logits = torch.eye(2, 5) * 4
    assert (trusted_classes(logits, 100) >= 0).all()


# Errors


def test_images_without_views_or_trusted_classes_are_refused() -> None:
    logits = torch.zeros(2, 3)
    for target in (
        Target(),
        Target(weak=outputs(logits)),
        Target(trusted=torch.zeros(2, dtype=torch.int64)),
        Target(labels=torch.zeros(2, dtype=torch.int64)),
    ):
        with pytest.raises(DataError, match="needs weak views and trusted classes"):
            objective()(outputs(logits), target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": 0.0}, r"objective\.exponent is above 0, found 0"),
        ({"trusted_share": 1.1}, r"objective\.trusted_share lies in \[0, 1\], found 1\.1"),
        ({"trusted_per_class": 0}, r"trusted_per_class and objective\.epochs are at least 1"),
        ({"epochs": 0}, r"trusted_per_class and objective\.epochs are at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(**options)
