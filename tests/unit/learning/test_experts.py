"""What the experts say comes from the bank and equals what their own checkpoints say."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from unit.labelled import Labelled, Pixels
from unit.zoo import Zoo, make_zoo

from adamerge.errors import ConfigError
from adamerge.learning.experts import expert_targets
from adamerge.objectives import Alignment

COUNT = 12
ROWS = {"task0": torch.arange(COUNT), "task1": torch.tensor([1, 4, 5, 11]), "task2": torch.tensor([7])}


def targets(zoo: Zoo, layers: list[int], **options: Any) -> dict[str, dict[str, Tensor]]:
    objective = Alignment(
        temperature=1.0, logit_weight=1.0, hidden_weight=1.0, layers=layers, tokens="all", reduction="sum"
    )
    defaults = {"rows": ROWS, "device": torch.device("cpu"), "precision": "32-true", "batch_size": 5}
    return expert_targets(
        Pixels(zoo.network),
        zoo.bank,
        Labelled(zoo, zoo.bank, COUNT).images,
        objective=objective,
        **(defaults | options),
    )


def by_expert(zoo: Zoo, task: str, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features and block outputs of a plain forward pass under an expert's own weights."""
    network, states = Pixels(zoo.network), []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        for block in zoo.network.visual.resblocks  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    ]
    expert = zoo.experts[zoo.bank.task_names.index(task)]
    features = functional_call(network, expert, (Labelled(zoo, zoo.bank, COUNT).images[task][rows],))
    for handle in handles:
        handle.remove()
    return features, states


@torch.no_grad()
def test_they_equal_a_plain_forward_pass_of_the_expert() -> None:
    zoo = make_zoo(torch.float64)
    found = targets(zoo, [0, -1])
    assert list(found) == list(ROWS)
    for task, rows in ROWS.items():
        features, states = by_expert(zoo, task, rows)
        assert set(found[task]) == {"features", "hidden/0", "hidden/1"}
        assert all(len(values) == COUNT for values in found[task].values())
        torch.testing.assert_close(found[task]["features"][rows], features, rtol=1e-9, atol=1e-9)
        for position in range(2):
            torch.testing.assert_close(found[task][f"hidden/{position}"][rows], states[position], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_each_task_has_its_own_expert(zoo: Zoo) -> None:
    found = targets(zoo, [])
    of_another = functional_call(Pixels(zoo.network), zoo.experts[1], (Labelled(zoo, zoo.bank, COUNT).images["task0"],))
    assert (found["task0"]["features"] - of_another).abs().max() > 0.1


def test_layers_keep_their_order_and_none_keeps_none(zoo: Zoo) -> None:
    forwards, backwards = targets(zoo, [0, 1]), targets(zoo, [1, 0])
    rows = ROWS["task1"]
    for one, other in (("hidden/0", "hidden/1"), ("hidden/1", "hidden/0")):
        assert torch.equal(forwards["task1"][one][rows], backwards["task1"][other][rows])
    assert not torch.equal(forwards["task1"]["hidden/0"][rows], forwards["task1"]["hidden/1"][rows])
    assert set(targets(zoo, [])["task1"]) == {"features"}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_size_of_a_pass_does_not_matter(zoo: Zoo, batch_size: int) -> None:
    expected, found = targets(zoo, [1]), targets(zoo, [1], batch_size=batch_size)
    for task, rows in ROWS.items():
        for name in expected[task]:
            torch.testing.assert_close(found[task][name][rows], expected[task][name][rows], rtol=1e-4, atol=1e-5)


def test_images_that_will_not_be_asked_for_are_not_looked_at(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = Pixels.forward
    monkeypatch.setattr(Pixels, "forward", lambda self, images: seen.append(len(images)) or forward(self, images))
    targets(zoo, [])
    assert seen == [5, 5, 2, 4, 1]


def test_neither_bank_nor_network_changes_and_nothing_keeps_a_graph(zoo: Zoo) -> None:
    before = {key: tensor.clone() for key, tensor in zoo.bank.task_vectors.items()}
    found = targets(zoo, [0])
    assert all(torch.equal(zoo.bank.task_vectors[key], tensor) for key, tensor in before.items())
    assert all(torch.equal(tensor, zoo.pretrained[key]) for key, tensor in zoo.network.state_dict().items())
    assert not any(values.requires_grad for of_task in found.values() for values in of_task.values())
    assert not any(module._forward_hooks for module in zoo.network.modules())


def test_half_precision_is_that_of_the_steps(zoo: Zoo) -> None:
    wide, half = targets(zoo, []), targets(zoo, [], precision="bf16-mixed")
    assert half["task0"]["features"].dtype == torch.bfloat16
    found = half["task0"]["features"].float()
    assert (found - wide["task0"]["features"]).norm() < 0.05 * wide["task0"]["features"].norm()


def test_a_block_that_is_not_there_is_refused(zoo: Zoo) -> None:
    with pytest.raises(ConfigError, match="no block 2; this image tower has 2"):
        targets(zoo, [2])
    assert not any(module._forward_hooks for module in zoo.network.modules())
