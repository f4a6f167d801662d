import hashlib
import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from adamerge.errors import CheckpointError
from adamerge.export import write_manifest
from adamerge.export.manifest import git_state, hash_input, versions

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_manifest(tmp_path):
    expert = tmp_path / "expert.safetensors"
    expert.write_bytes(b"weights")
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "test.parquet").write_bytes(b"test")
    (data / "sub" / "train.parquet").write_bytes(b"train")
    earlier = {"source": "weights.pt", "sha256": "0123"}
    inputs = {"expert/digits": expert, "data/digits": str(data), "pretrained": "laion2b_s34b_b79k", "text": earlier}
    config = {"trainer": {"max_steps": 5}, "root": Path("/somewhere")}
    write_manifest(tmp_path / "out" / "manifest.json", method="my_method", config=config, inputs=inputs)

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["method"] == "my_method"
    assert manifest["config"] == {"trainer": {"max_steps": 5}, "root": "/somewhere"}
    listing = f"{sha256(b'train')}  sub/train.parquet\n{sha256(b'test')}  test.parquet\n"
    assert manifest["inputs"] == {
        "expert/digits": {"source": str(expert), "sha256": sha256(b"weights")},
        "data/digits": {"source": str(data), "sha256": sha256(listing.encode()), "files": 2},
        "pretrained": {"source": "laion2b_s34b_b79k", "sha256": None},
        "text": earlier,
    }
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"git_revision", "git_modified"} <= manifest.keys()
    age = datetime.now(UTC) - datetime.fromisoformat(manifest["created"])
    assert timedelta(seconds=-1) < age < timedelta(minutes=2)


def test_a_hub_id_is_not_mistaken_for_a_file_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mnist").write_bytes(b"something else")
    monkeypatch.chdir(tmp_path)
    assert hash_input("mnist") == {"source": "mnist", "sha256": None}


def test_an_input_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"expert\.pt is gone"):
        hash_input(tmp_path / "expert.pt")


def test_versions_names_only_what_is_installed(monkeypatch):
    from adamerge.export import manifest

    monkeypatch.setattr(manifest, "_DISTRIBUTIONS", ("torch", "a-distribution-that-nobody-has"))
    assert versions().keys() == {"python", "platform", "torch"}


def git(folder: Path, *arguments: str) -> str:
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *options, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository that tracks ``package`` and ignores ``.venv``, where another package is installed."""
    for folder in ("package", ".venv"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    return tmp_path


@needs_git
def test_git_state_of_a_checkout(checkout):
    git(checkout, "add", ".")
    assert git_state(checkout / "package") == (None, None)  # no commit yet
    git(checkout, "commit", "-q", "-m", "first")
    revision = git(checkout, "rev-parse", "HEAD")
    assert len(revision) == 40
    assert git_state(checkout / "package") == (revision, False)
    (checkout / "README").write_text("outside of the package")
    assert git_state(checkout / "package") == (revision, False)
    (checkout / "package" / "__init__.py").write_text("changed = True")
    assert git_state(checkout / "package") == (revision, True)


@needs_git
def test_an_installed_package_inside_a_checkout_is_not_of_that_checkout(checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    assert git_state(checkout / ".venv") == (None, None)


@needs_git
def test_git_state_inside_a_git_hook_is_still_that_of_the_package(checkout, tmp_path_factory, monkeypatch):
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    revision = git(checkout, "rev-parse", "HEAD")
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_state(checkout / "package") == (revision, False)


def test_git_state_without_git_or_repository(tmp_path, monkeypatch):
    assert git_state(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) == (None, None)
