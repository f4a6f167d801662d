"""Where a result comes from: method, configuration, inputs, versions and code."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from adamerge.errors import CheckpointError
from adamerge.files import sha256_file, write_text

_FORMAT = "adamerge.manifest/1"
_DISTRIBUTIONS = (
    "adamerge",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "transformers",
    "safetensors",
    "pytorch-lightning",
    "hydra-core",
    "datasets",
    "pillow",
    "numpy",
    "scikit-learn",
)


def write_manifest(
    path: Path, *, method: str, config: Mapping[str, Any], inputs: Mapping[str, Path | str | Mapping[str, Any]]
) -> None:
    """Write ``manifest.json``: method, resolved configuration, SHA-256 of every input, versions, git revision, time.

    Args:
        config: Plain data; what JSON does not know is written as text.
        inputs: By a name such as ``expert/dtd``: a path, a hub id or tag, or what ``hash_input`` made of either
            earlier (at the start of a run, when the files were read).

    Raises:
        CheckpointError: If an input path does not exist.
        OutputError: If the file cannot be written.
    """
    revision, modified = git_state(Path(__file__).parents[1])
    manifest = {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": method,
        "config": dict(config),
        "inputs": {
            name: dict(source) if isinstance(source, Mapping) else hash_input(source) for name, source in inputs.items()
        },
        "versions": versions(),
        "git_revision": revision,
        "git_modified": modified,
    }
    write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n")


def hash_input(source: Path | str) -> dict[str, Any]:
    """``{"source", "sha256"}`` of an input, with ``"files"``, their number, where it is a folder.

    A folder's hash is that of its files' lines ``<sha256>  <relative path>``, sorted by path. A text that is not the
    absolute path of something that exists is a hub id or a tag and has no hash (None).

    Raises:
        CheckpointError: If a ``Path`` does not exist.
    """
    path = Path(source)
    if isinstance(source, str) and not (path.is_absolute() and path.exists()):
        return {"source": source, "sha256": None}
    if path.is_dir():
        files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        lines = "".join(f"{sha256_file(file)}  {name}\n" for name, file in files)
        return {"source": str(source), "sha256": hashlib.sha256(lines.encode()).hexdigest(), "files": len(files)}
    if not path.is_file():
        raise CheckpointError(f"the input {path} is gone, so its hash cannot be taken. Put it back and run again.")
    return {"source": str(source), "sha256": sha256_file(path)}


def versions() -> dict[str, str]:
    """Python's version, the platform, and the versions of those of our dependencies that are installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(directory: Path) -> tuple[str | None, bool | None]:
    """The commit of the git work tree that tracks ``directory``, and whether files in ``directory`` differ from it.

    Both None where no work tree tracks it (an installed package, even one inside somebody's checkout), where there is
    no commit yet, or where git is missing or refuses.
    """
    tracked = _git(directory, "ls-files", "--", ".")
    revision = _git(directory, "rev-parse", "HEAD") if tracked else None
    if revision is None:
        return None, None
    changes = _git(directory, "status", "--porcelain", "--", ".")
    return revision, None if changes is None else bool(changes)


def _git(directory: Path, *arguments: str) -> str | None:
    """Standard output of a git command that changes nothing, or None if it fails."""
    # Inside a git hook GIT_DIR and its like point at the hook's repository, whatever -C says.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
