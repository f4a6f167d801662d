"""Imports run downward only (DESIGN.md), read from the sources so that nothing has to be installed.

Of two rooms on one floor, the one that DESIGN.md names second may import the first.
"""

import ast
import sys
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adamerge"
REFERENCE = Path(__file__).parents[1] / "reference"

FLOORS = {
    "errors": 0,
    "files": 0,
    "bank": 1,
    "merging": 2,
    "objectives": 3,
    "models": 3,
    "methods": 4,
    "tasks": 5,
    "learning": 5,
    "statistics": 5,
    "evaluation": 6,
    "export": 6,
    "cli": 7,
}
ROOMS = list(FLOORS)
BARE_ROOMS = {"errors", "files", "bank", "merging", "objectives"}
BARE_LIBRARIES = {"torch", "safetensors", "adamerge"} | set(sys.stdlib_module_names)
GPU_KERNELS = {"merging/triton_kernels.py": {"triton"}}
"""What a file may import besides, because it is itself imported on a GPU only."""
LOWEST_FLOOR = {"pytorch_lightning": 5, "lightning": 5, "hydra": 7, "omegaconf": 7, "wandb": 7}
AT_USE_ONLY = {"open_clip", "transformers", "datasets", "matplotlib", "sklearn"}


def room_of(file: Path) -> str:
    """The folder or file right below the package; "" for ``adamerge/__init__.py``."""
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that are imported anywhere, with their lines; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def at_module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: not those of functions, nor of ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_module_level(node)


def violations(room: str, source: str, besides: Set[str] = frozenset()) -> list[str]:
    """What a file of ``room`` must not import, one sentence each; ``besides`` are libraries that it may."""
    tree = ast.parse(source)
    found = []
    for name, line in imports(tree):
        words = name.split(".")
        if name.startswith("."):
            found.append(f"line {line}: relative import {name}")
        elif words[0] == "adamerge" and room:
            target = words[1] if len(words) > 1 else "__init__"
            if target.startswith("__"):  # the package itself, which imports nothing
                continue
            if target not in FLOORS:
                found.append(f"line {line}: adamerge.{target} is on no floor")
            elif target != room and (FLOORS[target], ROOMS.index(target)) > (FLOORS[room], ROOMS.index(room)):
                found.append(f"line {line}: floor {FLOORS[room]} imports {name} from floor {FLOORS[target]}")
        elif room in BARE_ROOMS and words[0] not in BARE_LIBRARIES | besides:
            found.append(f"line {line}: {room} imports {words[0]}, more than torch and safetensors")
        elif room and FLOORS[room] < LOWEST_FLOOR.get(words[0], 0):
            found.append(f"line {line}: {words[0]} below floor {LOWEST_FLOOR[words[0]]}")
    for node in at_module_level(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            early = {name.split(".")[0] for name, _ in imports(node)} & AT_USE_ONLY
            found += [f"line {node.lineno}: {library} is imported before it is used" for library in sorted(early)]
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_there_are_files_and_every_room_has_a_floor() -> None:
    assert len(files()) > 10
    assert {room_of(file) for file in files()} - {""} <= set(FLOORS)


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downward(file: Path) -> None:
    besides = GPU_KERNELS.get(file.relative_to(PACKAGE).as_posix(), set())
    assert violations(room_of(file), file.read_text(encoding="utf-8"), besides) == []


@pytest.mark.parametrize("file", sorted(REFERENCE.rglob("*.py")), ids=lambda file: file.name)
def test_the_reference_imports_nothing_of_adamerge(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    names = {name for name, _ in imports(ast.parse(source))}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "numpy", "pytest", "reference"}
    assert not {"importlib", "runpy", "subprocess"} & {name.split(".")[0] for name in names}
    assert "__import__" not in source


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("bank", "from adamerge.merging import merge", "floor 1 imports adamerge.merging.merge from floor 2"),
        ("bank", "def f():\n    from adamerge import cli", "line 2: floor 1 imports adamerge.cli from floor 7"),
        ("tasks", "import adamerge.learning.module", "floor 5 imports adamerge.learning.module from floor 5"),
        ("bank", "from . import keys", "relative import"),
        ("cli", "from adamerge.utils import x", "adamerge.utils is on no floor"),
        ("merging", "def f():\n    import numpy", "merging imports numpy"),
        ("methods", "def f():\n    from pytorch_lightning import Trainer", "pytorch_lightning below floor 5"),
        ("export", "from omegaconf import DictConfig", "omegaconf below floor 7"),
        ("cli", "try:\n    import open_clip\nexcept ImportError:\n    pass", "line 2: open_clip is imported before"),
        ("", "import datasets.features", "datasets is imported before"),
        ("tasks", "class A:\n    from sklearn import svm", "sklearn is imported before"),
    ],
)
def test_a_violation_is_found(room: str, source: str, found: str) -> None:
    assert len(violations(room, source)) == 1
    assert found in violations(room, source)[0]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("bank", "import json\nimport torch\nfrom safetensors.torch import load_file\nfrom adamerge.errors import X"),
        ("bank", "from adamerge.bank.keys import TOWER"),
        ("learning", "from adamerge.tasks import datamodule"),
        ("models", "def f():\n    import open_clip"),
        ("tasks", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datasets import Dataset"),
        ("learning", "import pytorch_lightning as pl"),
        ("cli", "import hydra\nfrom adamerge.export import writers"),
    ],
)
def test_what_is_allowed_passes(room: str, source: str) -> None:
    assert violations(room, source) == []
