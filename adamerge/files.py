"""Files that appear whole or not at all, and their hashes (floor 0, so that every floor can use it)."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adamerge.errors import OutputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step, else it is removed.

    Raises:
        OutputError: If the folder cannot be made or written.
    """
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
    try:
        with _as_output_error(path):
            yield temporary
            _flush(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``, else it is removed.

    A folder that stands at ``path`` is moved away first and deleted last, so an interruption leaves one of both whole.

    Raises:
        OutputError: If the folder cannot be made or written.
    """
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    retired = temporary.with_name(temporary.name + ".old")
    try:
        with _as_output_error(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                path.replace(retired)
            try:
                temporary.replace(path)
            except BaseException:
                if retired.exists():
                    retired.replace(path)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """Yield the path of a new file in ``folder``, which is removed at the end; whoever mapped it keeps its content.

    Raises:
        OutputError: If the folder cannot be made or written.
    """
    with _as_output_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
    try:
        with _as_output_error(folder):
            yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Free some room or choose another place with "
            "paths.run_dir=DIR (results) or paths.cache_dir=DIR (caches)."
        ) from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
