"""Trusted images: chosen at every epoch by what the merged model says then, and a fixed share of every batch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import atlas as reference
from reference import layerwise
from torch import Tensor
from torch.func import functional_call
from unit.labelled import Labelled, Pixels, make_trainer
from unit.zoo import Zoo

from adamerge.learning.fit import Learned, learn
from adamerge.learning.losses import TaskLosses
from adamerge.learning.schedule import Schedule
from adamerge.learning.trusted import TrustedImages
from adamerge.merging import Coefficients, MergedModel, Partition
from adamerge.objectives import FixMatch, Outputs, Target
from adamerge.tasks.datamodule import TaskImages
from adamerge.tasks.views import RandomView

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)

CONSTANT = Schedule(steps=100, decay="constant", average=0, patience=0)
Targets = Mapping[str, Mapping[str, Tensor]]


def fixmatch(**options: Any) -> FixMatch:
    defaults = {
        "exponent": 0.5,
        "first_threshold": 0.4,  # low: the toy network is never as sure as the paper's
        "last_threshold": 0.6,
        "trusted_per_class": 2,
        "trusted_share": 0.25,
        "epochs": 3,
    }
    return FixMatch(**(defaults | options))


class Toy:
    """A zoo's images without labels, and everything that learning from them needs."""

    def __init__(self, zoo: Zoo, objective: FixMatch, *, steps: int = 10, count: int = 12, **options: Any) -> None:
        self.labelled = Labelled(zoo, zoo.bank, count)
        self.objective, self.steps = objective, steps
        images = self.labelled.images
        self.indices = {task: torch.arange(count) for task in images}
        options = {"images_per_batch": 8, "batches_per_step": 1, "seed": 0} | options
        self.data = TaskImages(images, self.indices, **options)
        self.data.trusted_share = objective.trusted_share
        partition = Partition.build("tensor", zoo.bank.shapes)
        self.coefficients = Coefficients(3, partition.num_groups, init=0.0, constraint="identity")
        self.model = MergedModel(Pixels(zoo.network), zoo.bank, partition)

    def chooser(self, **options: Any) -> TrustedImages:
        chosen = {"indices": self.indices, "steps": self.steps, "batch_size": 5} | options
        return TrustedImages(
            self.model,
            self.coefficients,
            self.labelled.images,
            heads=self.labelled.heads,
            objective=self.objective,
            precision="32-true",
            **chosen,
        )

    def reference_logits(self, coefficients: Tensor, task: str) -> Tensor:
        zoo = self.labelled.zoo
        merged = layerwise.merged_weights(zoo.pretrained, zoo.experts, coefficients, "tensor")
        features = functional_call(zoo.network, dict(merged), (self.labelled.images[task].float() / 64 - 2,))
        return features / features.norm(dim=1, keepdim=True) @ self.labelled.heads[task].T

    def learn(self, run_dir: Path, objective: FixMatch | None = None, **options: Any) -> Learned:
        heads = self.labelled.heads
        return learn(
            self.model,
            self.coefficients,
            TaskLosses(objective or self.objective, heads, dict.fromkeys(heads, 1.0), "auto"),
            self.data,
            run_dir=run_dir,
            make_trainer=partial(make_trainer, max_steps=self.steps, limit_train_batches=self.steps),
            optimizer=partial(torch.optim.Adam, lr=0.02),
            schedule=CONSTANT,
            resume=True,
            **options,
        )


def classes(found: Targets | None) -> dict[str, list[int]]:
    assert found is not None
    assert all(set(known) == {"trusted"} for known in found.values())
    return {task: known["trusted"].tolist() for task, known in found.items()}


# Which images


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(10, 3, [0, 4, 8]), (10, 1, [0]), (4, 10, [0, 1, 2, 3]), (500, 10, list(range(0, 500, 50)))],
)
def test_they_are_chosen_at_the_start_of_every_epoch(zoo: Zoo, steps: int, epochs: int, expected: list[int]) -> None:
    choose = Toy(zoo, fixmatch(epochs=epochs)).chooser(steps=steps)
    for step in range(steps):
        assert (choose(step) is not None) == (step in expected)


@pytest.mark.parametrize("per_class", [1, 2, 100])
def test_they_are_the_references_by_what_the_merged_model_says_of_all_images(zoo: Zoo, per_class: int) -> None:
    toy = Toy(zoo, fixmatch(trusted_per_class=per_class))
    choose, found = toy.chooser(), []
    for value in (0.0, 0.6):
        toy.coefficients.set(value)
        at = torch.full(toy.coefficients().shape, value)
        expected = {
            task: reference.trusted(toy.reference_logits(at, task).double().tolist(), per_class)
            for task in toy.labelled.images
        }
        found.append(classes(choose(0)))
        assert found[-1] == expected
    assert found[0] != found[1]  # λ matters


def test_images_that_may_not_be_used_are_never_trusted_and_never_rank(zoo: Zoo) -> None:
    toy = Toy(zoo, fixmatch())
    usable = torch.tensor([1, 2, 5, 8, 9, 11])
    found = classes(toy.chooser(indices=dict.fromkeys(toy.indices, usable))(0))
    zero = torch.zeros(toy.coefficients().shape)
    for task, of_task in found.items():
        expected = [-1] * 12
        logits = toy.reference_logits(zero, task)[usable].double()
        for row, trusted in zip(usable.tolist(), reference.trusted(logits.tolist(), 2), strict=True):
            expected[row] = trusted
        assert of_task == expected


def test_the_size_of_a_forward_pass_does_not_matter_and_nothing_is_left_to_train(zoo: Zoo) -> None:
    toy = Toy(zoo, fixmatch())
    first = toy.chooser(batch_size=1)(0)
    assert classes(first) == classes(toy.chooser(batch_size=100)(0))
    assert first is not None
    assert all(known["trusted"].dtype == torch.int64 for known in first.values())
    assert toy.coefficients.raw.grad is None
    assert not any(weight.requires_grad for weight in toy.model.weights().values())


def test_a_run_of_no_steps_may_ask_too(zoo: Zoo) -> None:
    """A budget looks at the gradient at zero even where nothing is learned then."""
    toy = Toy(zoo, fixmatch())
    assert classes(toy.chooser(steps=0)(0)) == classes(toy.chooser(steps=10)(0))


# Their share of a batch


def drawn(data: TaskImages, task: str, step: int, trusted: Tensor) -> list[tuple[int, int]]:
    """By batch, how many are trusted and how many not."""
    return [(int((trusted[b] >= 0).sum()), int((trusted[b] < 0).sum())) for b in data.draw(task, step)]


def known(data: TaskImages, trusted: Tensor) -> TaskImages:
    data.targets = {task: {"trusted": trusted} for task in data.targets}
    return data


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, [(2, 6), (2, 6)]), (0.5, [(4, 4), (4, 4)]), (0.0, [(0, 8), (0, 8)])]
)
def test_a_quarter_of_every_batch_is_trusted(zoo: Zoo, share: float, expected: list[tuple[int, int]]) -> None:
    toy = Toy(zoo, fixmatch(trusted_share=share), count=60, batches_per_step=2)
    trusted = torch.where(torch.arange(60) % 3 == 0, torch.arange(60) % 2, -1)
    data = known(toy.data, trusted)
    seen = [drawn(data, "task0", step, trusted) for step in range(20)]
    assert all(batches == expected for batches in seen)
    rows = {int(row) for step in range(20) for batch in data.draw("task0", step) for row in batch}
    assert rows == {row for row in range(60) if share > 0 or row % 3}  # all of those of a kind in the end
    again = known(Toy(zoo, fixmatch(trusted_share=share), count=60, batches_per_step=2).data, trusted)
    assert all(torch.equal(a, b) for a, b in zip(data.draw("task1", 3), again.draw("task1", 3), strict=True))


def test_where_one_kind_runs_out_batches_are_smaller(zoo: Zoo) -> None:
    trusted = torch.full((12,), -1)
    trusted[4] = 0
    data = known(Toy(zoo, fixmatch(), batches_per_step=2).data, trusted)
    assert drawn(data, "task0", 0, trusted) == [(1, 6), (0, 5)]


@pytest.mark.parametrize(("value", "expected"), [(0, (8, 0)), (-1, (0, 8))])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_where_there_is_one_kind_alone_it_fills_the_batch(
    zoo: Zoo, share: float, value: int, expected: tuple[int, int]
) -> None:
    trusted = torch.full((12,), value)
    data = known(Toy(zoo, fixmatch(trusted_share=share)).data, trusted)
    assert drawn(data, "task0", 0, trusted) == [expected]
    assert len(data.batch(0)["images"]["task0"]) == 8


def test_a_batch_holds_strong_views_and_the_same_images_as_they_are(zoo: Zoo) -> None:
    trusted = torch.where(torch.arange(12) % 2 == 0, torch.arange(12) % 3, -1)
    data = known(Toy(zoo, fixmatch()).data, trusted)
    data.view = RandomView(0.5, True)
    batch, source = data.batch(4), data._images
    for task in source:
        (rows,) = data.draw(task, 4)
        known_of_task = batch["targets"][task]
        assert set(known_of_task) == {"trusted", "weak"}
        assert torch.equal(known_of_task["weak"], source[task][rows])
        assert torch.equal(known_of_task["trusted"], trusted[rows])
        strong = batch["images"][task]
        assert strong.shape == known_of_task["weak"].shape
        assert strong.dtype == torch.uint8
        same = sum(torch.equal(a, b) for a, b in zip(strong, known_of_task["weak"], strict=True))
        assert same < len(rows) / 2  # a crop of so small an image may be all of it


# In a run


class Watching(FixMatch):
    """Notes what every call was told."""

    def __call__(self, outputs: Outputs, target: Target) -> Tensor:
        assert target.weak is not None
        assert target.trusted is not None
        assert target.labels is None
        self.__dict__.setdefault("seen", []).append((target.progress, target.trusted.tolist()))
        return super().__call__(outputs, target)


def test_a_run_looks_again_at_every_epoch_with_the_coefficients_it_has_then(zoo: Zoo, tmp_path: Path) -> None:
    toy = Toy(zoo, Watching(0.5, 0.4, 0.6, 2, 0.25, 3))
    choose, asked = toy.chooser(), {}

    def renew(step: int) -> Targets | None:
        if (found := choose(step)) is not None:
            asked[step] = toy.coefficients().detach().clone(), found
        return found

    toy.data.renew = renew
    found = toy.learn(tmp_path)
    assert list(asked) == [0, 4, 8]
    assert (asked[0][0] == 0).all()
    for step, (value, trusted) in asked.items():
        torch.testing.assert_close(found.mean_coefficients[step], value.mean(1), rtol=0, atol=0)
        for task, of_task in classes(trusted).items():
            assert of_task == reference.trusted(toy.reference_logits(value, task).double().tolist(), 2)
    seen = toy.objective.__dict__["seen"]
    assert [progress for progress, _ in seen] == [step / 10 for step in range(10) for _ in range(3)]
    for step in range(10):
        now = asked[step - step % 4][1]
        toy.data.targets = now
        for position, task in enumerate(toy.labelled.images):
            (rows,) = toy.data.draw(task, step)
            assert seen[3 * step + position][1] == now[task]["trusted"][rows].tolist()


def test_the_loss_falls_while_coefficients_alone_learn(zoo: Zoo, tmp_path: Path) -> None:
    """All images of one epoch: the loss is of the same images and classes at every step."""
    before = {name: tensor.clone() for name, tensor in zoo.network.state_dict().items()}
    toy = Toy(zoo, fixmatch(epochs=1, trusted_share=1.0, trusted_per_class=100), steps=30, images_per_batch=12)
    toy.data.renew = toy.chooser()
    totals = toy.learn(tmp_path).losses.sum(1)
    assert totals[-1] < 0.9 * totals[0]
    assert (toy.coefficients.raw != 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in zoo.network.state_dict().items())


class Stop(Exception):  # noqa: N818
    """Ends a run as abruptly as a test can within its process."""


def test_a_resumed_run_goes_on_with_the_classes_it_had(zoo: Zoo, tmp_path: Path) -> None:
    """Stopped in the epoch of steps 8 to 15, after the checkpoint of step 10: chosen anew they would be others."""

    def toy(stop_at: int | None = None) -> Toy:
        made = Toy(zoo, fixmatch(epochs=3), steps=24)
        choose = made.chooser()

        def renew(step: int) -> Targets | None:
            if step == stop_at:
                raise Stop
            return choose(step)

        made.data.renew = renew
        return made

    unbroken = toy().learn(tmp_path / "unbroken")
    with pytest.raises(Stop):
        toy(stop_at=13).learn(tmp_path / "broken")
    resumed = toy().learn(tmp_path / "broken")
    assert torch.equal(resumed.coefficients, unbroken.coefficients)
    assert torch.equal(resumed.losses, unbroken.losses)
