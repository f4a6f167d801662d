"""Statistics are computed once for the same experts, images and options, and anew for others."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError, DataError
from adamerge.statistics import Expert, Kept, gather
from adamerge.tasks.datasets import ImageSet

WEIGHT, BIAS = "visual.weight", "visual.bias"
TASKS = ("sun", "dtd", "cars")
IMAGES = {task: torch.arange(20.0).view(10, 2) + 100 * index for index, task in enumerate(TASKS)}


@dataclass
class Seen:
    """A statistic that keeps what it was given."""

    needs: Literal["images", "labels", "nothing"] = "images"
    images_per_task: int | None = None
    factor: float = 1.0
    experts: list[Expert] = field(default_factory=list)
    fails: bool = False

    def __call__(self, expert: Expert) -> dict[str, Tensor]:
        if self.fails:
            raise ConfigError("stopped")
        self.experts.append(expert)
        found = {key: self.factor * value.detach().clone() for key, value in expert.network.named_parameters()}
        return {"total": self.factor * sum(value.sum() for value in found.values())} | found

    @property
    def tasks(self) -> list[str]:
        return [expert.task for expert in self.experts]

    def to_json(self) -> dict[str, Any]:
        return {"name": "seen", "needs": self.needs, "images_per_task": self.images_per_task, "factor": self.factor}


class Problem(SimpleNamespace):
    """Three experts of a linear layer, ten images each of which eight may be used, and ten labelled ones."""

    def labelled(self) -> dict[str, ImageSet]:
        return {
            task: ImageSet(-images, torch.arange(10) % 3, None, f"{self.named} labelled {task}")
            for task, images in IMAGES.items()
        }


def make_problem(cache_dir: Path, **changed: Any) -> Problem:
    base = {WEIGHT: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), BIAS: torch.tensor([0.5, -0.5])}
    network = nn.Sequential(OrderedDict(visual=nn.Linear(2, 2))).requires_grad_(False)
    network.load_state_dict(base)
    experts = {task: {key: value + number for key, value in base.items()} for number, task in enumerate(TASKS, 1)}
    for task, expert in changed.get("experts", {}).items():
        experts[task] = expert
    named = changed.get("named", "images")
    return Problem(
        named=named,
        bank=ParameterBank.from_experts(base, experts, list(base)),
        clip=SimpleNamespace(image_encoder=network, preprocess_cfg=changed.get("preprocess_cfg", {"size": 2})),
        heads={task: torch.eye(2) for task in TASKS} | changed.get("heads", {}),
        unlabeled={task: ImageSet(images, None, None, f"{named} {task}") for task, images in IMAGES.items()}
        | changed.get("unlabeled", {}),
        adapt_indices=dict.fromkeys(TASKS, torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])) | changed.get("adapt_indices", {}),
        cache_dir=cache_dir,
    )


def gathered(problem: Problem, statistic: Seen, **options: Any) -> Mapping[str, Tensor]:
    place = {"device": torch.device("cpu"), "precision": "32-true", "batch_size": 4, "seed": 0}
    return gather(statistic, problem, **(place | options))  # type: ignore[arg-type]


def files_in(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "statistics").iterdir())


def computed_again(
    cache_dir: Path, statistic: Seen | None = None, changed: Mapping[str, Any] = MappingProxyType({}), **options: Any
) -> list[str]:
    """Which tasks are computed where all of an unchanged problem's are kept already."""
    gathered(make_problem(cache_dir), Seen())
    again = statistic or Seen()
    gathered(make_problem(cache_dir, **changed), again, **options)
    return again.tasks


def test_every_expert_is_seen_with_its_own(tmp_path: Path) -> None:
    problem, statistic = make_problem(tmp_path), Seen()
    found = gathered(problem, statistic)
    assert statistic.tasks == list(TASKS)
    for index, (task, expert) in enumerate(zip(TASKS, statistic.experts, strict=True)):
        assert torch.equal(expert.images, IMAGES[task][[0, 1, 2, 4, 5, 6, 8, 9]])
        assert expert.labels is None
        assert (expert.keys, expert.precision, expert.batch_size) == ((WEIGHT, BIAS), "32-true", 4)
        torch.testing.assert_close(found[WEIGHT][index], problem.bank.expert(task)[WEIGHT], rtol=0, atol=0)
    assert found["total"].tolist() == [10 + 6 * number for number in (1, 2, 3)]
    assert torch.equal(problem.clip.image_encoder.visual.weight, problem.bank.pretrained[WEIGHT])


def test_what_is_the_same_is_not_computed_again(tmp_path: Path) -> None:
    first = gathered(make_problem(tmp_path), Seen())
    again = Seen()
    second = gathered(make_problem(tmp_path), again, batch_size=2)  # which decides no result
    assert again.tasks == []
    assert len(files_in(tmp_path)) == 3
    assert set(first) == set(second) == {"total", WEIGHT, BIAS}
    for name in first:
        assert torch.equal(first[name], second[name])


def test_a_changed_expert_is_computed_again_and_no_other(tmp_path: Path) -> None:
    expert = {WEIGHT: torch.full((2, 2), 7.0), BIAS: torch.zeros(2)}
    assert computed_again(tmp_path, changed={"experts": {"dtd": expert}}) == ["dtd"]


def test_a_changed_image_is_seen_again(tmp_path: Path) -> None:
    other = ImageSet(IMAGES["cars"] + 1, None, None, "others")
    assert computed_again(tmp_path, changed={"unlabeled": {"cars": other}}) == ["cars"]
    assert computed_again(tmp_path, changed={"adapt_indices": {"sun": torch.tensor([0, 3])}}) == ["sun"]


def test_a_changed_head_is_seen_again(tmp_path: Path) -> None:
    assert computed_again(tmp_path, changed={"heads": {"sun": 2 * torch.eye(2)}}) == ["sun"]


@pytest.mark.parametrize(
    ("statistic", "changed", "options"),
    [
        ({"factor": 2}, {}, {}),
        ({"images_per_task": 3}, {}, {}),
        ({"needs": "nothing"}, {}, {}),
        ({}, {"preprocess_cfg": {"size": 3}}, {}),
        ({}, {}, {"precision": "bf16-mixed"}),
        ({}, {}, {"keys": [BIAS]}),
    ],
    ids=str,
)
def test_other_options_are_another_statistic(
    tmp_path: Path, statistic: dict[str, Any], changed: dict[str, Any], options: dict[str, Any]
) -> None:
    assert computed_again(tmp_path, Seen(**statistic), changed, **options) == list(TASKS)
    assert len(files_in(tmp_path)) == 6


def test_experts_that_are_alike_but_for_the_task_are_two(tmp_path: Path) -> None:
    """What is drawn depends on the task, and files may be named by it."""
    one = {WEIGHT: torch.ones(2, 2), BIAS: torch.ones(2)}
    images = ImageSet(IMAGES["sun"], None, None, "the same")
    problem = make_problem(tmp_path, experts={"sun": one, "dtd": one}, unlabeled={"sun": images, "dtd": images})
    statistic = Seen()
    gathered(problem, statistic)
    assert statistic.tasks == list(TASKS)
    assert len(files_in(tmp_path)) == 3


@pytest.mark.parametrize("what", ["_code_version", "_source_hash"])
def test_other_code_computes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    gathered(make_problem(tmp_path), Seen())
    monkeypatch.setitem(gather.__globals__, what, lambda *_: "other")
    again = Seen()
    gathered(make_problem(tmp_path), again)
    assert again.tasks == list(TASKS)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def exchange(file: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)


def scribble(file: Path) -> None:
    file.write_bytes(b"\xff" * 200)


@pytest.mark.parametrize("damage", [truncate, empty, flip, exchange, scribble])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    expected = {name: value.clone() for name, value in gathered(make_problem(tmp_path), Seen()).items()}
    damage(files_in(tmp_path)[1])
    again = Seen()
    found = gathered(make_problem(tmp_path), again)
    assert len(again.tasks) == 1
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    last = Seen()
    gathered(make_problem(tmp_path), last)
    assert last.tasks == []


def test_one_that_stops_leaves_no_file_and_is_continued(tmp_path: Path) -> None:
    def stopped(tasks: Any) -> Any:
        for number, task in enumerate(tasks):
            if number == 2:
                raise KeyboardInterrupt
            yield task

    with pytest.raises(KeyboardInterrupt):
        gathered(make_problem(tmp_path), Seen(), track=stopped)
    assert len(files_in(tmp_path)) == 2
    again = Seen()
    gathered(make_problem(tmp_path), again)
    assert again.tasks == ["cars"]
    with pytest.raises(ConfigError, match="stopped"):
        gathered(make_problem(tmp_path), Seen(fails=True, factor=3))
    assert len(files_in(tmp_path)) == 3


def test_what_replaces_tensors_is_in_every_expert_and_is_not_kept(tmp_path: Path) -> None:
    statistic = Seen()
    found = gathered(make_problem(tmp_path), statistic, replaced={BIAS: torch.tensor([9.0, 8.0])}, keys=[WEIGHT])
    assert not isinstance(found, Kept)
    assert found[BIAS].tolist() == [[9, 8]] * 3
    assert found[WEIGHT][:, 0, 0].tolist() == [2, 3, 4]
    assert [expert.keys for expert in statistic.experts] == [(WEIGHT,)] * 3
    assert not (tmp_path / "statistics").exists()


def test_images_are_drawn_once_for_each_task_and_seed(tmp_path: Path) -> None:
    def drawn(cache_dir: Path, seed: int) -> list[list[int]]:
        statistic = Seen(images_per_task=5)
        gathered(make_problem(cache_dir), statistic, seed=seed)
        return [((expert.images[:, 0] % 100) / 2).int().tolist() for expert in statistic.experts]

    first = drawn(tmp_path / "a", 0)
    assert drawn(tmp_path / "b", 0) == first
    assert drawn(tmp_path / "c", 1) != first
    for rows in first:
        assert len(set(rows)) == 5
        assert set(rows) < {0, 1, 2, 4, 5, 6, 8, 9}


def test_labels_are_of_the_labelled_split(tmp_path: Path) -> None:
    statistic = Seen(needs="labels", images_per_task=6)
    gathered(make_problem(tmp_path), statistic)
    for task, expert in zip(TASKS, statistic.experts, strict=True):
        rows = [int(torch.where((-IMAGES[task] == image).all(1))[0]) for image in expert.images]
        assert len(set(rows)) == 6
        assert expert.labels.tolist() == [row % 3 for row in rows]
    again = Seen(needs="labels", images_per_task=6)
    gathered(make_problem(tmp_path), again)
    assert again.tasks == []


def test_labels_that_are_missing_are_said(tmp_path: Path) -> None:
    problem = make_problem(tmp_path)

    def labelled() -> dict[str, ImageSet]:
        raise DataError("no label column")

    problem.labelled = labelled
    with pytest.raises(DataError, match="no label column"):
        gathered(problem, Seen(needs="labels"))
    assert gathered(problem, Seen())


def test_a_statistic_of_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images_per_task of a statistic is null or at least 1, found 0"):
        gathered(make_problem(tmp_path), Seen(images_per_task=0))


def test_a_statistic_of_nothing_gets_nothing(tmp_path: Path) -> None:
    statistic = Seen(needs="nothing")
    problem = make_problem(tmp_path)
    problem.unlabeled = {}
    gathered(problem, statistic)
    assert [(expert.images, expert.labels) for expert in statistic.experts] == [(None, None)] * 3


def test_kept_is_read_by_name_and_says_where_it_is_from(tmp_path: Path) -> None:
    found = gathered(make_problem(tmp_path), Seen())
    assert isinstance(found, Kept)
    assert len(found) == 3
    assert WEIGHT in found
    assert found[WEIGHT].shape == (3, 2, 2)
    with pytest.raises(KeyError, match="other"):
        found["other"]
    record = found.to_json()
    assert record["statistic"] == Seen().to_json()
    assert list(record["files"]) == list(TASKS)
    for number, of_task in enumerate(record["files"].values(), 1):
        file = Path(of_task["file"])
        assert of_task["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert load_file(file)[BIAS].tolist() == [0.5 + number, -0.5 + number]
