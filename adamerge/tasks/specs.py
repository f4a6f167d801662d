"""What to merge: a suite of tasks, as a folder with a suite.yaml describes it."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from adamerge.errors import CheckpointError, ConfigError, DataError, shortlist
from adamerge.models.protocol import ModelSpec

_SUITE_KEYS = ("name", "model", "tasks", "splits")
_HUB_DATA = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Splits:
    """The split that unlabeled learners adapt on, the one that is scored, and the one labelled learners learn from."""

    adapt: str = "test"
    evaluate: str = "test"
    labelled: str = "train"


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite.

    Attributes:
        name: Unique in the suite; letters, digits, ``_``, ``-`` and ``.``.
        expert: The expert's weight file.
        data: A folder, or a data set of the hub as ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``.
        templates: Prompts with ``{}`` where the class name goes.
        classes: Class names by label; None takes them from the data set.
        splits: Which split serves for what.
    """

    name: str
    expert: str
    data: str
    templates: tuple[str, ...]
    classes: tuple[str, ...] | None
    splits: Splits


@dataclass(frozen=True)
class SuiteSpec:
    """A pretrained model and the tasks to merge, in order."""

    name: str
    root: Path
    model: ModelSpec
    tasks: tuple[TaskSpec, ...]
    data_root: Path


def load_suite(root: Path, *, tasks: Sequence[str] | None = None, data_root: Path | None = None) -> SuiteSpec:
    """Read ``root/suite.yaml``.

    Relative paths start at ``root`` (those of data at ``data_root``) and may not leave it; links inside may lead
    anywhere, and absolute paths are taken as they are. A data path whose first folder does not exist, and which looks
    like ``OWNER/NAME``, is a data set of the hub.

    Args:
        root: The folder of the suite.
        tasks: Names of the tasks wanted, in the order wanted; None takes all.
        data_root: Where relative data paths start; ``root`` by default.

    Raises:
        ConfigError: If the YAML is missing, malformed or holds unknown or missing keys, or a task is unknown.
        CheckpointError: If an expert's file is missing.
        DataError: If a data folder is missing.
    """
    file = root / "suite.yaml"
    content = _mapping(_read_yaml(file), f"{file}", required=("name", "model", "tasks"), allowed=_SUITE_KEYS)
    model_keys = tuple(field.name for field in fields(ModelSpec))
    model = _mapping(content["model"], f"{file}: model", required=model_keys, allowed=model_keys)
    for key in model_keys:
        _string(model[key], f"{file}: model.{key}")
    entries = content["tasks"]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{file}: tasks: expected a list of at least one task, found {_shown(entries)}.")
    data_root = root if data_root is None else data_root
    shared = _splits(content.get("splits"), f"{file}: splits", Splits())
    specs = [_task(entry, index, file, shared) for index, entry in enumerate(entries)]
    names = [spec.name for spec in specs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{file}: tasks: {shortlist(repeated)} named more than once. Give each task its own name.")
    chosen = _choose(specs, tasks, file)
    resolved = tuple(_resolve(spec, root, data_root, file) for spec in chosen)
    name = _string(content["name"], f"{file}: name")
    return SuiteSpec(name, root, ModelSpec(**model), resolved, data_root)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without silently overwritten keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore[reportArgumentType]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key '{repeated[0]}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> object:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file. Point suite.root at a folder that holds a suite.yaml.")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not readable as YAML ({' '.join(str(error).split())}). Correct it.") from error


def _mapping(value: object, where: str, *, required: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected the keys {', '.join(allowed)}, found {_shown(value)}.")
    if unknown := [key for key in value if key not in allowed]:
        raise ConfigError(f"{where}: unknown {shortlist(unknown)}. Allowed are {', '.join(allowed)}.")
    if missing := [key for key in required if value.get(key) is None]:
        raise ConfigError(f"{where}: {shortlist(missing)} missing. Required are {', '.join(required)}.")
    return dict(value)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: expected a text, found {_shown(value)}. Write it in quotes.")
    return value


def _strings(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: expected a list of texts, found {_shown(value)}.")
    return tuple(_string(item, f"{where}[{index}]") for index, item in enumerate(value))


def _splits(value: object, where: str, defaults: Splits) -> Splits:
    if value is None:
        return defaults
    allowed = tuple(field.name for field in fields(Splits))
    given = _mapping(value, where, required=(), allowed=allowed)
    given = {key: _string(split, f"{where}.{key}") for key, split in given.items()}
    return replace(defaults, **given)


def _task(entry: object, index: int, file: Path, shared: Splits) -> TaskSpec:
    where = f"{file}: tasks[{index}]"
    allowed = tuple(field.name for field in fields(TaskSpec))
    given = _mapping(entry, where, required=("name", "expert", "data", "templates"), allowed=allowed)
    name = _string(given["name"], f"{where}.name")
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ConfigError(f"{where}.name: '{name}' is no name. Use letters, digits, '_', '-' and '.' only.")
    where = f"{file}: task '{name}'"
    templates = _strings(given["templates"], f"{where}: templates")
    if plain := [template for template in templates if "{}" not in template]:
        raise ConfigError(f"{where}: templates: {shortlist(plain)} without {{}}. Write {{}} where the class name goes.")
    classes = given.get("classes")
    if classes is not None:
        classes = _strings(classes, f"{where}: classes")
        if repeated := {item for item in classes if classes.count(item) > 1}:
            raise ConfigError(f"{where}: classes: {shortlist(repeated)} named more than once. Give each its own name.")
    return TaskSpec(
        name=name,
        expert=_string(given["expert"], f"{where}: expert"),
        data=_string(given["data"], f"{where}: data"),
        templates=templates,
        classes=classes,
        splits=_splits(given.get("splits"), f"{where}: splits", shared),
    )


def _choose(specs: list[TaskSpec], tasks: Sequence[str] | None, file: Path) -> list[TaskSpec]:
    if tasks is None:
        return specs
    by_name = {spec.name: spec for spec in specs}
    if unknown := [name for name in tasks if name not in by_name]:
        raise ConfigError(f"suite.tasks: {shortlist(unknown)} not in {file}, which has {', '.join(by_name)}.")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"suite.tasks: expected distinct names of {', '.join(by_name)}, found {list(tasks)}.")
    return [by_name[name] for name in tasks]


def _resolve(spec: TaskSpec, root: Path, data_root: Path, file: Path) -> TaskSpec:
    where = f"{file}: task '{spec.name}'"
    expert = _inside(root, spec.expert, f"{where}: expert")
    if not expert.is_file():
        raise CheckpointError(
            f"task '{spec.name}': no expert file {expert}. Put it there, or correct `expert:` in {file}."
        )
    data = _inside(data_root, spec.data, f"{where}: data")
    if data.is_dir():
        location = str(data)
    elif _HUB_DATA.fullmatch(spec.data) and not (data_root / Path(spec.data).parts[0]).exists():
        location = spec.data
    else:
        raise DataError(
            f"task '{spec.name}': no data folder {data}. Put parquet files or an image folder there, or correct "
            f"`data:` in {file} (a hub data set is written OWNER/NAME)."
        )
    return replace(spec, expert=str(expert), data=location)


def _inside(root: Path, name: str, where: str) -> Path:
    if not Path(name).is_absolute() and ".." in Path(name).parts:
        raise ConfigError(f"{where}: '{name}' leaves {root}. Put it inside, or name it absolutely.")
    return Path(os.path.abspath(root / name))  # noqa: PTH100 (resolve() would follow links, which hub caches are)


def _shown(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
