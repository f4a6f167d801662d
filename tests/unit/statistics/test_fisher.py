"""Fisher information against a literal double loop, finite differences, and what its options promise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import fisher as reference
from torch import Tensor, nn
from torch.func import functional_call
from unit.zoo import Zoo, make_zoo

from adamerge.errors import ConfigError
from adamerge.models.layers import use_lean_layers
from adamerge.statistics import Expert, Fisher


def fisher(**options: Any) -> Fisher:
    return Fisher(**{"form": "exact", "share": 1.0, "batch_size": 3, "images_per_task": None, "seed": 0} | options)


def expert_of(zoo: Zoo, task: int = 1, **options: Any) -> Expert:
    """Eight images; four classes for task 1."""
    network, images = zoo.network, torch.cat(zoo.batches[0][task])
    network.load_state_dict(zoo.experts[task])
    keys = tuple(zoo.pretrained)
    made = Expert(f"task{task}", network, zoo.heads[task], images, None, keys, torch.device("cpu"), "32-true", 4)
    return replace(made, **options)


def literal(call: Callable[..., dict[str, Tensor]], expert: Expert, *args: Any) -> dict[str, Tensor]:
    expert.network.requires_grad_(True)
    found = call(expert.network, expert.images, expert.head, *args)
    expert.network.requires_grad_(False)
    return found


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in found.values()])


@pytest.fixture
def expert(zoo64: Zoo) -> Expert:
    return expert_of(zoo64)


def test_exact_is_the_double_loop(expert: Expert) -> None:
    found, expected = fisher()(expert), literal(reference.exact, expert)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-18)
        assert value.max() > 1e-6


def test_more_classes_than_features(expert: Expert) -> None:
    generator = torch.Generator().manual_seed(5)
    head = 10 * nn.functional.normalize(torch.randn(20, 12, generator=generator, dtype=torch.float64), dim=1)
    wide = replace(expert, head=head, images=expert.images[:3])
    torch.testing.assert_close(fisher()(wide), literal(reference.exact, wide), rtol=1e-8, atol=1e-15)


def test_passes_are_as_many_as_promised(expert: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    gradient = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: passes.append(1) or gradient(*args, **options))

    def passes_of(**options: Any) -> int:
        passes.clear()
        fisher(**options)(expert)
        return len(passes)

    assert passes_of() == 8 * 3
    assert passes_of(form="sampled") == 8
    assert passes_of(share=0) == 8
    assert passes_of(share=0.3) == 8 * 2  # of every image the largest has about half of all
    assert passes_of(form="batch") == 3


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_is_its_definition(expert: Expert, batch_size: int) -> None:
    found = fisher(form="batch", batch_size=batch_size)(expert)
    torch.testing.assert_close(found, literal(reference.batched, expert, batch_size), rtol=1e-9, atol=1e-18)


def test_batches_are_of_their_own_size_and_matter(expert: Expert) -> None:
    one, all_ = (flat(fisher(form="batch", batch_size=size)(expert)) for size in (1, 8))
    assert (one - all_).norm() > 0.3 * all_.norm()
    assert (flat(fisher()(expert)) - one).norm() > 0.3 * one.norm()
    other = fisher(form="batch")(replace(expert, batch_size=7))
    torch.testing.assert_close(other, fisher(form="batch")(expert), rtol=0, atol=0)


def test_exact_by_finite_differences(expert: Expert) -> None:
    found = fisher()(expert)
    state = {key: value.clone() for key, value in expert.network.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    for key, value in found.items():
        entry = int(torch.randint(value.numel(), (), generator=generator))

        def logs(step: float, key: str = key, entry: int = entry) -> Tensor:
            moved = {name: tensor.clone() for name, tensor in state.items()}
            moved[key].view(-1)[entry] += step
            features = functional_call(expert.network, moved, (expert.images,))
            return (nn.functional.normalize(features, dim=-1) @ expert.head.T).log_softmax(-1)

        expected = reference.by_differences(logs, 1e-5)
        assert found[key].view(-1)[entry].item() == pytest.approx(expected, rel=1e-5, abs=1e-12), key


def test_over_all_labels_the_sampled_form_is_the_exact_one(expert: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(expert, images=expert.images[:1])
    drawn = []

    def total() -> Tensor:
        added = torch.zeros_like(flat(fisher()(one)))
        for label in range(4):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "multinomial", lambda p, *_, at=label, **__: drawn.append(p) or torch.tensor([at]))
                added += flat(fisher(form="sampled")(one)) * drawn[-1][label]
        return added

    torch.testing.assert_close(total(), flat(literal(reference.exact, one)), rtol=1e-9, atol=1e-18)
    features = nn.functional.normalize(one.network(one.images), dim=-1)[0]
    torch.testing.assert_close(drawn[0], (one.head @ features).softmax(0))


@pytest.mark.parametrize("share", [0, 0.3])
def test_over_all_signs_any_share_is_the_exact_form(
    expert: Expert, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    one = replace(expert, images=expert.images[:1])
    together = set()

    def with_signs(bits: int) -> Tensor:
        def signs(high: int, size: tuple[int, int], **_: Any) -> Tensor:
            together.add(size)
            return torch.tensor([[bits >> place & 1 for place in range(size[1])]])

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", signs)
            return flat(fisher(share=share)(one))

    found = torch.stack([with_signs(bits) for bits in range(2**3)])
    ((_, others),) = together
    assert others == 3 if share == 0 else others == 2
    expected = flat(literal(reference.exact, one))
    torch.testing.assert_close(found.mean(0), expected, rtol=1e-9, atol=1e-18)
    assert (found[0] - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("options", [{"form": "sampled"}, {"share": 0}], ids=str)
def test_draws_tend_to_the_exact_form(expert: Expert, options: dict[str, Any]) -> None:
    few = replace(expert, images=expert.images[:2])
    draws = torch.stack([flat(fisher(seed=seed, **options)(few)).sum() for seed in range(150)])
    error = (draws.mean() - flat(fisher()(few)).sum()) / (draws.std() / len(draws) ** 0.5)
    assert abs(error) < 3


def test_what_is_left_of_the_share_is_small(expert: Expert) -> None:
    expected = flat(fisher()(expert))
    errors = [
        sum(float((flat(fisher(share=share, seed=seed)(expert)) - expected).norm()) for seed in range(4))
        for share in (0, 0.6, 0.95)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 4 * 0.05 * float(expected.norm())


def test_draws_depend_on_seed_and_task_alone(expert: Expert) -> None:
    for options in ({"form": "sampled"}, {"share": 0.5}):
        first, again = (flat(fisher(**options)(expert)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, flat(fisher(seed=1, **options)(expert)))
        assert not torch.equal(first, flat(fisher(**options)(replace(expert, task="other"))))


@pytest.mark.parametrize("form", ["exact", "sampled", "batch"])
def test_in_float32_and_with_lean_layers(form: str) -> None:
    wide = flat(fisher(form=form)(expert_of(make_zoo(torch.float64))))
    narrow = expert_of(make_zoo())
    use_lean_layers(narrow.network)
    found = flat(fisher(form=form)(narrow))
    assert found.dtype == torch.float32
    assert (found - wide).norm() < 1e-4 * wide.norm()


def test_half_precision_weights_give_float32() -> None:
    expert = expert_of(make_zoo(torch.bfloat16))
    found, wide = flat(fisher()(expert)), flat(fisher()(expert_of(make_zoo(torch.float64))))
    assert found.dtype == torch.float32
    assert (found - wide).norm() < 0.3 * wide.norm()


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 400), (torch.float64, 1500)])
def test_a_certain_expert_does_not_underflow(dtype: torch.dtype, factor: float) -> None:
    # Logits so far apart that all but one of p are about e^-60 and less, and the definition, were it computed in
    # float32, gives 0 - 0. With one class far ahead, F is p_2 (∂(z_2 - z_1))², of the runner-up alone but for e^-30.
    expert = expert_of(make_zoo(dtype), images=torch.cat(make_zoo(dtype).batches[0][1])[:1])
    head = factor * expert.head
    expert.network.requires_grad_(True)
    logits = (nn.functional.normalize(expert.network(expert.images), dim=-1) @ head.T)[0]
    first, second = logits.topk(2).values
    gradients = torch.autograd.grad(first - second, list(expert.network.parameters()))
    expert.network.requires_grad_(False)
    chance = (second - first).detach().double().exp()
    assert chance < 1e-20
    expected = chance * torch.cat([gradient.flatten().double() ** 2 for gradient in gradients])
    found = flat(fisher()(replace(expert, head=head))).double()
    assert found.sum() > 0
    assert (found - expected).norm() < 1e-2 * expected.norm()  # e to the power of what float32 makes of logits


def test_only_the_keys_that_are_wanted(expert: Expert) -> None:
    keys = ("visual.proj", "visual.conv1.weight")
    found, whole = fisher()(replace(expert, keys=keys)), fisher()(expert)
    assert tuple(found) == keys
    torch.testing.assert_close(found, {key: whole[key] for key in keys}, rtol=0, atol=0)


def test_the_network_is_as_before(expert: Expert) -> None:
    before = {key: value.clone() for key, value in expert.network.state_dict().items()}
    with torch.no_grad():  # as it is called within a merge
        fisher()(expert)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in expert.network.parameters())
    torch.testing.assert_close(dict(expert.network.state_dict()), before, rtol=0, atol=0)


def test_one_class_has_no_information(expert: Expert) -> None:
    for form in ("exact", "sampled", "batch"):
        found = flat(fisher(form=form)(replace(expert, head=expert.head[:1])))
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("form", ["exact", "sampled", "batch"])
def test_features_that_are_not_numbers_are_refused(expert: Expert, form: str) -> None:
    images = expert.images.clone()
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match="task 'task1': features of an image are NaN or Inf"):
        fisher(form=form)(replace(expert, images=images))


def test_gradients_that_are_not_numbers_are_refused(expert: Expert) -> None:
    def spoil(network: nn.Module, images: tuple[Tensor], features: Tensor) -> None:
        features.register_hook(lambda gradient: gradient * torch.inf)

    expert.network.register_forward_hook(spoil)
    with pytest.raises(ConfigError, match=r"task 'task1': the gradients of .* are NaN or Inf"):
        fisher()(expert)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "empirical"}, "unknown form 'empirical'"),
        ({"share": 1.1}, r"in \[0, 1\]; found 1.1"),
        ({"share": -0.1}, r"in \[0, 1\]; found -0.1"),
        ({"batch_size": 0}, "batch_size is at least 1, found 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fisher(**options)


def test_its_record_names_it_and_its_options() -> None:
    made = fisher(images_per_task=256)
    assert made.needs == "images"
    assert made.to_json() == {
        "name": "fisher", "form": "exact", "share": 1.0, "batch_size": 3, "images_per_task": 256, "seed": 0,
    }  # fmt: skip
