"""The gradient at the start: the mean over steps, all at the initial λ, against autograd of the formula."""

from math import ceil

import pytest
import torch
from reference import atlas as reference
from torch import Tensor
from unit.labelled import Labelled, Pixels
from unit.zoo import Zoo, make_zoo

from adamerge.learning.losses import TaskLosses
from adamerge.learning.start import gradient_at_start
from adamerge.merging import Coefficients, MergedModel, Partition
from adamerge.objectives import CrossEntropy
from adamerge.tasks.datamodule import TaskImages

CPU = torch.device("cpu")


def setting(zoo: Zoo, init: float, granularity: str = "tensor") -> tuple[Labelled, MergedModel, Coefficients]:
    labelled, partition = Labelled(zoo, zoo.bank), Partition.build(granularity, zoo.bank.shapes)
    coefficients = Coefficients(3, partition.num_groups, init=init, constraint="identity")
    return labelled, MergedModel(Pixels(zoo.network), zoo.bank, partition), coefficients


def losses(labelled: Labelled) -> TaskLosses:
    return TaskLosses(CrossEntropy(), labelled.heads, dict.fromkeys(labelled.heads, 1.0), "auto")


def reference_gradient(labelled: Labelled, data: TaskImages, steps: int, at: Tensor, granularity: str) -> Tensor:
    zoo, total = labelled.zoo, torch.zeros_like(at)
    for step in range(steps):
        rows = [torch.cat(list(data.draw(task, step))) for task in labelled.images]
        images = [of_task[r].double() / 64 - 2 for of_task, r in zip(labelled.images.values(), rows, strict=True)]
        labels = [of_task[r] for of_task, r in zip(labelled.labels.values(), rows, strict=True)]
        value = at.clone().requires_grad_()
        parts = reference.cross_entropies(
            zoo.network, zoo.pretrained, zoo.experts, zoo.heads, images, labels, value, granularity
        )
        total += torch.autograd.grad(sum(parts), value)[0]
    return total / steps


@pytest.mark.parametrize(("init", "granularity"), [(0.0, "tensor"), (0.4, "block")])
def test_it_is_the_mean_over_the_first_steps(init: float, granularity: str) -> None:
    zoo = make_zoo(torch.float64)
    labelled, model, coefficients = setting(zoo, init, granularity)
    data = labelled.data(images_per_batch=5)
    assert data.steps_per_pass == ceil(12 / 5)
    found = gradient_at_start(model, coefficients, losses(labelled), data, steps=3, device=CPU, precision="32-true")
    at = torch.full(found.shape, init, dtype=torch.float64)
    torch.testing.assert_close(found, reference_gradient(labelled, data, 3, at, granularity), rtol=1e-6, atol=1e-9)
    one = gradient_at_start(model, coefficients, losses(labelled), data, steps=1, device=CPU, precision="32-true")
    assert not torch.allclose(one, found, rtol=0.01)


def test_nothing_is_learned_from_it(zoo: Zoo) -> None:
    labelled, model, coefficients = setting(zoo, 0.0)
    found = gradient_at_start(
        model, coefficients, losses(labelled), labelled.data(), steps=2, device=CPU, precision="32-true"
    )
    assert (found != 0).all()
    assert found.device == CPU
    assert coefficients.raw.grad is None
    assert torch.equal(coefficients().detach(), torch.zeros_like(found))


def test_what_is_to_be_known_before_the_first_step_is_asked_for_once(zoo: Zoo) -> None:
    labelled, model, coefficients = setting(zoo, 0.0)
    data, asked = labelled.data(), []
    known = data.targets
    data.targets = {task: {} for task in known}

    def renew(step: int) -> object:
        asked.append(step)
        return known

    data.renew = renew  # type: ignore[assignment]
    gradient_at_start(model, coefficients, losses(labelled), data, steps=2, device=CPU, precision="32-true")
    assert asked == [0]


def test_half_precision_is_near_float32(zoo: Zoo) -> None:
    labelled, model, coefficients = setting(zoo, 0.3)
    wide, mixed = (
        gradient_at_start(
            model, coefficients, losses(labelled), labelled.data(), steps=1, device=CPU, precision=precision
        )
        for precision in ("32-true", "bf16-mixed")
    )
    assert mixed.dtype == wide.dtype == torch.float32
    assert not torch.equal(mixed, wide)
    assert (mixed - wide).norm() < 0.1 * wide.norm()
