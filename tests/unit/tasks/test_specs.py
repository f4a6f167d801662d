"""A suite.yaml is read strictly; what is wrong is named with its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from adamerge.errors import AdamergeError, CheckpointError, ConfigError, DataError
from adamerge.models.protocol import ModelSpec
from adamerge.tasks.specs import Splits, load_suite


def task(name: str, **changes: Any) -> dict[str, Any]:
    entry = {"name": name, "expert": f"weights/{name}.pt", "data": f"data/{name}", "templates": ["a {}."]}
    return {key: value for key, value in (entry | changes).items() if value is not ...}


def suite(*tasks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    model = {"family": "open_clip", "arch": "toy.json", "pretrained": "weights/base.pt"}
    entry = {"name": "toys", "model": model, "tasks": list(tasks or (task("a"), task("b"), task("c")))}
    return {key: value for key, value in (entry | changes).items() if value is not ...}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "weights" / f"{name}.pt").touch()
    return tmp_path


def write(root: Path, content: dict[str, Any] | str) -> Path:
    (root / "suite.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return root


def test_everything(root: Path) -> None:
    found = load_suite(write(root, suite(task("a", classes=["x", "y"], splits={"adapt": "val"}), task("b"))))
    assert found.name == "toys"
    assert found.root == found.data_root == root
    assert found.model == ModelSpec("open_clip", "toy.json", "weights/base.pt")
    first, second = found.tasks
    assert first.expert == str(root / "weights" / "a.pt")
    assert first.data == str(root / "data" / "a")
    assert first.templates == ("a {}.",)
    assert first.classes == ("x", "y")
    assert first.splits == Splits("val", "test", "train")
    assert second.classes is None
    assert second.splits == Splits()


def test_splits_of_the_suite_and_of_a_task(root: Path) -> None:
    content = suite(task("a", splits={"adapt": "val"}), task("b"), splits={"adapt": "half", "labelled": "few"})
    first, second = load_suite(write(root, content)).tasks
    assert first.splits == Splits("val", "test", "few")
    assert second.splits == Splits("half", "test", "few")


def test_a_subset_in_the_order_given(root: Path) -> None:
    found = load_suite(write(root, suite()), tasks=["c", "a"])
    assert [spec.name for spec in found.tasks] == ["c", "a"]


def test_only_chosen_tasks_need_their_files(root: Path) -> None:
    (root / "weights" / "b.pt").unlink()
    assert len(load_suite(write(root, suite()), tasks=["a"]).tasks) == 1


def test_data_root(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "data" / "a").mkdir(parents=True)
    found = load_suite(write(root, suite(task("a"))), data_root=elsewhere)
    assert found.data_root == elsewhere
    assert found.tasks[0].data == str(elsewhere / "data" / "a")
    assert found.tasks[0].expert == str(root / "weights" / "a.pt")


@pytest.mark.parametrize("data", ["tanganke/gtsrb", "ufldl-stanford/svhn:cropped_digits"])
def test_hub_data_stays_as_written(root: Path, data: str) -> None:
    assert load_suite(write(root, suite(task("a", data=data)))).tasks[0].data == data


def test_absolute_paths_and_links_may_lead_outside(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "pictures").mkdir()
    (outside / "expert.pt").touch()
    (root / "linked").symlink_to(outside / "pictures")
    content = suite(
        task("a", data=str(outside / "pictures"), expert=str(outside / "expert.pt")), task("b", data="linked")
    )
    first, second = load_suite(write(root, content)).tasks
    assert first.data == str(outside / "pictures")
    assert second.data == str(root / "linked")


BAD: list[tuple[Any, str]] = [
    ("name: [", r"suite\.yaml: not readable as YAML"),
    ("name: a\nname: b", r"suite\.yaml: not readable as YAML .*key 'name' is given twice"),
    ("- a", r"suite\.yaml: expected the keys name, model, tasks, splits, found list"),
    ("", r"suite\.yaml: expected the keys .*found nothing"),
    (suite(task("a"), modle={}), r"suite\.yaml: unknown modle\. Allowed are name, model, tasks, splits"),
    (suite(task("a"), model=...), r"suite\.yaml: model missing\. Required are name, model, tasks"),
    (suite(task("a"), model={"family": "open_clip"}), r"model: arch, pretrained missing"),
    (
        suite(task("a"), model={"family": "x", "arch": "x", "pretrained": 3}),
        r"model\.pretrained: expected a text, found int 3",
    ),
    (suite(task("a"), tasks=[]), r"tasks: expected a list of at least one task, found list"),
    (suite(task("a"), tasks="mnist"), r"tasks: expected a list of at least one task, found str 'mnist'"),
    (suite(task("a"), tasks=["mnist"]), r"tasks\[0\]: expected the keys name, expert"),
    (suite(task("a"), task("b", experts="x")), r"tasks\[1\]: unknown experts\. Allowed are name, expert, data"),
    (suite(task("a", templates=...)), r"tasks\[0\]: templates missing\. Required are name, expert, data, templates"),
    (suite(task("a", templates=[])), r"task 'a': templates: expected a list of texts"),
    (suite(task("a", templates="a {}")), r"task 'a': templates: expected a list of texts, found str"),
    (suite(task("a", templates=["a photo"])), r"task 'a': templates: a photo without \{\}\. Write \{\} where"),
    (
        suite(task("a", classes=[True, "no"])),
        r"task 'a': classes\[0\]: expected a text, found bool True\. Write it in quotes",
    ),
    (suite(task("a", classes=["x", "x"])), r"task 'a': classes: x named more than once"),
    (suite(task("a", splits={"test": "x"})), r"task 'a': splits: unknown test\. Allowed are adapt, evaluate, labelled"),
    (suite(task("a", splits={"adapt": 3})), r"task 'a': splits\.adapt: expected a text, found int 3"),
    (suite(task("a/b")), r"tasks\[0\]\.name: 'a/b' is no name"),
    (suite(task("a"), task("a")), r"tasks: a named more than once"),
    (suite(task("a", expert="../a.pt")), r"task 'a': expert: '\.\./a\.pt' leaves"),
    (suite(task("a", data="data/../../a")), r"task 'a': data: 'data/\.\./\.\./a' leaves"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_malformed(root: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_suite(write(root, content))


def test_no_suite(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suite\.yaml: no such file\. Point suite\.root at a folder"):
        load_suite(tmp_path)


@pytest.mark.parametrize("name", ["weights/gone.pt", "weights"])
def test_missing_expert(root: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"task 'a': no expert file .*/{name}\. Put it there, or correct"):
        load_suite(write(root, suite(task("a", expert=name))))


@pytest.mark.parametrize("name", ["data/gone", "gone", "data/a/deeper/gone"])
def test_missing_data(root: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"task 'a': no data folder .*/{name}\. Put parquet files"):
        load_suite(write(root, suite(task("a", data=name))))


@pytest.mark.parametrize(
    ("tasks", "message"), [(["a", "z"], "z not in .*, which has a, b, c"), (["a", "a"], "distinct"), ([], "distinct")]
)
def test_bad_subset(root: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"suite\.tasks: .*{message}"):
        load_suite(write(root, suite()), tasks=tasks)


def test_errors_are_for_users(root: Path) -> None:
    with pytest.raises(AdamergeError):
        load_suite(root / "nowhere")


@pytest.mark.shared
def test_real8(real8: Path) -> None:
    found = load_suite(real8)
    assert len(found.tasks) == 8
    assert all(Path(spec.expert).is_file() and Path(spec.data).is_dir() for spec in found.tasks)
