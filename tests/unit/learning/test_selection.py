"""Which iterate is the result: the candidates, the best of them, ties, and ends, also across a resume."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit.labelled import CONSTANT, Labelled, Pixels, make_trainer
from unit.zoo import Zoo

from adamerge.learning.fit import Learned, learn
from adamerge.learning.losses import TaskLosses
from adamerge.learning.selection import Selection
from adamerge.merging import Coefficients, MergedModel, Partition, merge
from adamerge.objectives import CrossEntropy

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"
)


def run(zoo: Zoo, run_dir: Path, steps: int, selection: Selection | None = None) -> Learned:
    labelled, partition = Labelled(zoo, zoo.bank), Partition.build("tensor", zoo.bank.shapes)
    return learn(
        MergedModel(Pixels(zoo.network), zoo.bank, partition),
        Coefficients(3, partition.num_groups, init=0.0, constraint="identity"),
        TaskLosses(CrossEntropy(), labelled.heads, dict.fromkeys(labelled.heads, 1.0), "auto"),
        labelled.data(images_per_batch=4),
        run_dir=run_dir,
        make_trainer=partial(make_trainer, max_steps=steps, limit_train_batches=steps),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        schedule=CONSTANT,
        selection=selection,
        resume=True,
    )


class Judge:
    """Gives one merit after another, made up, and notes the weights that it was shown."""

    def __init__(self, *merits: float | None) -> None:
        self.merits, self.seen = list(merits), []

    def selection(self, every: int) -> Selection:
        return Selection(every, self.score, lambda scores: self.merits[int(scores["call"])])

    def score(self, model: MergedModel) -> Mapping[str, float]:
        self.seen.append({key: tensor.clone() for key, tensor in model.weights().items()})
        return {"call": len(self.seen) - 1}


@pytest.fixture
def iterate(zoo: Zoo, tmp_path: Path) -> Callable[[int], Tensor]:
    """λ after so many steps."""
    return lambda steps: run(zoo, tmp_path / f"plain {steps}", steps).coefficients


def test_merit_is_of_the_scores() -> None:
    model = object()
    asked: list[object] = []

    def score(seen: object) -> dict[str, float]:
        asked.append(seen)
        return {"a": 0.25, "b": 0.5}

    assert Selection(1, score, lambda scores: sum(scores.values()))(model) == 0.75  # type: ignore[arg-type]
    assert asked == [model]


@pytest.mark.parametrize(
    ("merits", "best"),
    [
        ((0.9, 0.2, 0.3, 0.1), 0),
        ((0.1, 0.9, 0.3, 0.1), 3),
        ((0.1, 0.2, 0.3, 0.9), 8),  # the end is a candidate, though no multiple of 3
        ((0.5, 0.5, 0.5, 0.5), 0),  # of equals the first
        ((-5.0, -2.0, -1.0, -3.0), 6),
    ],
)
def test_the_best_of_start_every_third_iterate_and_end(
    zoo: Zoo, tmp_path: Path, iterate: Callable[[int], Tensor], merits: tuple[float, ...], best: int
) -> None:
    judge = Judge(*merits)
    found = run(zoo, tmp_path / "run", 8, judge.selection(3))
    partition = found.partition
    for shown, steps in zip(judge.seen, (0, 3, 6, 8), strict=True):
        expected = merge(zoo.bank, iterate(steps), partition) if steps else zoo.pretrained
        assert all(torch.equal(shown[key], expected[key]) for key in expected)
    expected = iterate(best) if best else torch.zeros_like(found.coefficients)
    assert torch.equal(found.coefficients, expected)
    assert found.steps == 8


def test_without_a_selection_it_is_the_last(zoo: Zoo, tmp_path: Path, iterate: Callable[[int], Tensor]) -> None:
    judge = Judge(0.1, 0.2, 0.3, 0.9)
    assert torch.equal(run(zoo, tmp_path / "run", 8, judge.selection(3)).coefficients, iterate(8))


def test_looking_at_candidates_does_not_change_what_is_learned(zoo: Zoo, tmp_path: Path) -> None:
    plain = run(zoo, tmp_path / "plain", 6)
    watched = run(zoo, tmp_path / "watched", 6, Judge(*[0.0] * 7).selection(1))
    assert torch.equal(watched.losses, plain.losses)
    assert torch.equal(watched.mean_coefficients, plain.mean_coefficients)


@pytest.mark.parametrize(("merits", "steps", "best"), [((0.1, 0.7, None), 4, 2), ((0.1, None), 2, 0), ((None,), 0, 0)])
def test_an_unfit_candidate_ends_the_run(
    zoo: Zoo,
    tmp_path: Path,
    iterate: Callable[[int], Tensor],
    merits: tuple[float | None, ...],
    steps: int,
    best: int,
) -> None:
    judge = Judge(*merits)
    found = run(zoo, tmp_path / "run", 12, judge.selection(2))
    assert found.steps == steps
    assert len(judge.seen) == len(merits)
    assert found.losses[:steps].isfinite().all()
    assert found.losses[steps:].isnan().all()
    assert torch.equal(found.coefficients, iterate(best) if best else torch.zeros_like(found.coefficients))


def test_a_run_that_an_unfit_candidate_ended_stays_ended(zoo: Zoo, tmp_path: Path) -> None:
    done = run(zoo, tmp_path, 12, Judge(0.1, 0.7, None).selection(2))
    judge = Judge()
    again = run(zoo, tmp_path, 12, judge.selection(2))
    assert not judge.seen
    assert torch.equal(again.coefficients, done.coefficients)
    assert torch.equal(again.losses.isfinite(), done.losses.isfinite())


class Stop(Exception):  # noqa: N818
    """Ends a run as abruptly as a test can within its process."""


def test_a_resumed_run_remembers_the_best_so_far(zoo: Zoo, tmp_path: Path, iterate: Callable[[int], Tensor]) -> None:
    """The best candidate is that of 6 steps; the run is stopped at 15, and the checkpoint is of 10."""

    class Stopping(Judge):
        def score(self, model: MergedModel) -> Mapping[str, float]:
            if len(self.seen) == 5:
                raise Stop
            return super().score(model)

    with pytest.raises(Stop):
        run(zoo, tmp_path / "run", 18, Stopping(0.1, 0.2, 0.9, 0.3, 0.4).selection(3))
    judge = Judge(0.4, 0.5, 0.6)
    found = run(zoo, tmp_path / "run", 18, judge.selection(3))
    assert len(judge.seen) == 3  # of 12, 15 and 18 steps
    assert torch.equal(found.coefficients, iterate(6))


def test_a_run_of_no_steps_leaves_the_start(zoo: Zoo, tmp_path: Path) -> None:
    found = run(zoo, tmp_path, 0, Judge().selection(3))
    assert torch.equal(found.coefficients, torch.zeros_like(found.coefficients))
