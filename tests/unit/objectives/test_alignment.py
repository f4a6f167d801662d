"""Agreement with an expert, by hand."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from adamerge.errors import ConfigError, DataError
from adamerge.objectives import Alignment, Outputs, Target


def alignment(**options: Any) -> Alignment:
    default = {"temperature": 1.0, "logit_weight": 1.0, "hidden_weight": 1.0, "layers": [], "tokens": "class"}
    return Alignment(**(default | {"reduction": "mean"} | options))


def logits_of(*odds: float) -> Tensor:
    """(1, C), whose softmax is in proportion to ``odds``."""
    return torch.tensor([odds], dtype=torch.float64).log()


def outputs(logits: Tensor, *hidden: Tensor) -> Outputs:
    return Outputs(logits, logits.new_empty(len(logits), 0), hidden)


def random_outputs(seed: int, images: int = 3, blocks: int = 2) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 4, generator=generator, dtype=torch.float64)
    hidden = [torch.randn(images, 5, 6, generator=generator, dtype=torch.float64) for _ in range(blocks)]
    return outputs(logits, *hidden)


# Predictions


def test_divergence_by_hand() -> None:
    # expert (3/4, 1/4), merged (1/2, 1/2): ¾ log(3/2) + ¼ log(1/2)
    found = alignment()(outputs(logits_of(1, 1)), Target(expert=outputs(logits_of(3, 1))))
    torch.testing.assert_close(found, torch.tensor([0.75 * log(1.5) + 0.25 * log(0.5)], dtype=torch.float64))
    # and the other way round it is another number: ½ log(2/3) + ½ log 2
    other = alignment()(outputs(logits_of(3, 1)), Target(expert=outputs(logits_of(1, 1))))
    torch.testing.assert_close(other, torch.tensor([0.5 * log(2 / 3) + 0.5 * log(2)], dtype=torch.float64))


def test_a_temperature_of_two_takes_roots_of_the_odds_and_four_times_the_divergence() -> None:
    # odds 9 : 1 become 3 : 1, so that the divergence is the one above
    found = alignment(temperature=2.0)(outputs(logits_of(1, 1)), Target(expert=outputs(logits_of(9, 1))))
    torch.testing.assert_close(found, torch.tensor([4 * (0.75 * log(1.5) + 0.25 * log(0.5))], dtype=torch.float64))


def test_a_shift_of_the_logits_is_no_disagreement() -> None:
    found = alignment()(outputs(logits_of(1, 2, 3) + 40), Target(expert=outputs(logits_of(1, 2, 3))))
    assert found.item() == pytest.approx(0, abs=1e-12)


def test_probabilities_of_zero_leave_it_finite() -> None:
    certain, other = torch.tensor([[500.0, -500.0]]), torch.tensor([[500.0, 0.0]])
    assert alignment()(outputs(other), Target(expert=outputs(certain))).tolist() == [0]
    assert alignment()(outputs(-certain), Target(expert=outputs(certain))).tolist() == [1000]


# Hidden states

FOUND = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]])  # one image, two tokens, width 2
WANTED = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("tokens", "reduction", "expected"),
    [
        # class token: 1 + 4 = 5, all tokens: (5 + 50) / 2 = 27.5; the second block is 4 times as far
        ("class", "sum", 5.0 + 20),
        ("class", "mean", (2.5 + 10) / 2),
        ("all", "sum", 27.5 + 110),
        ("all", "mean", (13.75 + 55) / 2),
    ],
)
def test_distances_by_hand(tokens: str, reduction: str, expected: float) -> None:
    objective = alignment(layers=[0, 1], tokens=tokens, reduction=reduction, logit_weight=0)
    same = torch.zeros(1, 3)
    found = objective(outputs(same, FOUND, 2 * FOUND), Target(expert=outputs(same, WANTED, WANTED)))
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_weights_scale_their_parts() -> None:
    found, expert = random_outputs(0), Target(expert=random_outputs(1))
    logits = alignment(layers=[0, 1], hidden_weight=0)(found, expert)
    hidden = alignment(layers=[0, 1], logit_weight=0)(found, expert)
    both = alignment(layers=[0, 1], logit_weight=3, hidden_weight=0.5)(found, expert)
    torch.testing.assert_close(both, 3 * logits + 0.5 * hidden)
    assert (logits > 1e-4).all()
    assert (hidden > 0.01).all()


def test_hidden_states_count_only_where_layers_are_named() -> None:
    found, expert = random_outputs(0, blocks=0), Target(expert=random_outputs(1, blocks=0))
    torch.testing.assert_close(alignment(hidden_weight=7)(found, expert), alignment(hidden_weight=0)(found, expert))


# In all


@pytest.mark.parametrize("tokens", ["class", "all"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_is_zero_with_zero_slope_where_outputs_are_the_experts(tokens: str, reduction: str) -> None:
    expert = random_outputs(0)
    logits = expert.logits.clone().requires_grad_()
    hidden = [state.clone().requires_grad_() for state in expert.hidden]
    loss = alignment(layers=[0, 1], tokens=tokens, reduction=reduction)(outputs(logits, *hidden), Target(expert=expert))
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    for leaf in (logits, *hidden):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e-15


def test_is_per_image() -> None:
    found, expert = random_outputs(0), random_outputs(1)
    whole = alignment(layers=[0, 1])(found, Target(expert=expert))
    for image in range(3):
        one, other = (outputs(x.logits[[image]], *(state[[image]] for state in x.hidden)) for x in (found, expert))
        torch.testing.assert_close(alignment(layers=[0, 1])(one, Target(expert=other)), whole[[image]])


@pytest.mark.parametrize("tokens", ["class", "all"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradcheck(tokens: str, reduction: str) -> None:
    objective = alignment(layers=[0, 1], tokens=tokens, reduction=reduction, temperature=1.7, hidden_weight=0.3)
    at, target = random_outputs(0), Target(expert=random_outputs(1))

    def loss(logits: Tensor, *hidden: Tensor) -> Tensor:
        return objective(outputs(logits, *hidden), target)

    leaves = [tensor.clone().requires_grad_() for tensor in (at.logits, *at.hidden)]
    assert torch.autograd.gradcheck(loss, leaves)


# Errors


def test_without_an_expert_it_is_refused() -> None:
    with pytest.raises(DataError, match="needs the outputs of the task's expert"):
        alignment()(random_outputs(0), Target())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"objective\.temperature is above 0, found 0"),
        ({"tokens": "patch"}, r"objective\.tokens is 'class' or 'all'"),
        ({"reduction": "max"}, r"objective\.reduction 'sum' or 'mean'"),
        ({"logit_weight": 0}, "nothing is aligned"),
        ({"logit_weight": 0, "hidden_weight": 0, "layers": [0]}, "nothing is aligned"),
        ({"logit_weight": -1}, r"objective\.logit_weight and objective\.hidden_weight are at least 0"),
        ({"hidden_weight": -1, "layers": [0]}, r"objective\.hidden_weight are at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        alignment(**options)
