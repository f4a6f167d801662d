"""Files that appear whole or not at all."""

import hashlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from adamerge.errors import OutputError
from adamerge.files import atomic_directory, atomic_file, scratch_file, sha256_file, write_text


class Boom(Exception):  # noqa: N818
    """Something that goes wrong while a file is written."""


@pytest.fixture
def readonly() -> Iterator[Path]:
    """A folder that cannot be written, holding a file ``old`` and a folder ``kept``; root steps down for the test."""
    folder = Path(tempfile.mkdtemp())
    (folder / "kept").mkdir()
    (folder / "old").write_text("old")
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)
    shutil.rmtree(folder)


@contextmanager
def little_room() -> Iterator[None]:
    """No file may grow above 1000 bytes; the write that tries fails as it does on a full disk.

    Around the one write and not around the test: the limit holds for pytest's own output too.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# One file


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_a_file_is_replaced_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        write_text(path, "new λ")
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == "new λ"


def test_an_exception_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (Boom, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(path) as temporary:  # noqa: PT012
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old"
        assert names(tmp_path) == ["a.txt"]


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "")
        with atomic_directory(tmp_path / "folder") as temporary:
            (temporary / "b").write_text("")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_no_permission_is_an_output_error(readonly: Path) -> None:
    for path in (readonly / "new", readonly / "old", readonly / "deeper" / "new"):
        with pytest.raises(OutputError, match=rf"cannot write {path}: Permission denied.*paths\.run_dir"):
            write_text(path, "x")
    assert names(readonly) == ["kept", "old"]
    assert (readonly / "old").read_text() == "old"


def test_a_file_in_the_way_of_a_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*a/b"):
        write_text(tmp_path / "a" / "b", "x")


def test_a_folder_in_the_way_of_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write .*a"):
        write_text(tmp_path / "a", "x")
    assert names(tmp_path) == ["a"]


def test_no_room_for_a_file_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: .*Free some room"), little_room():
        write_text(path, "x" * 5000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_no_room_in_a_folder_is_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"Free some room"),
        little_room(),
        atomic_directory(tmp_path / "folder") as temporary,
    ):
        (temporary / "a").write_text("x" * 5000)
    assert names(tmp_path) == []


def test_a_scratch_file_is_gone_at_the_end_and_its_room_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for error in (Boom, None):
        with pytest.raises(Boom) if error else nullcontext(), scratch_file(folder) as path:
            assert path.parent == folder
            path.write_text("x")
            if error:
                raise error
        assert names(folder) == []
    with pytest.raises(OutputError, match=r"cannot write .*cache"), scratch_file(folder):
        raise OSError(28, "No space left on device")
    assert names(folder) == []


# A folder


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for content in ("first", "second"):
        with atomic_directory(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
            assert path.exists() == (content == "second")
        assert [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()] == [f"inner/{content}"]
        assert names(path.parent) == ["folder"]


def test_an_exception_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_directory(path) as temporary:
        (temporary / "old").write_text("old")
    for error in (Boom, KeyboardInterrupt):
        with pytest.raises(error), atomic_directory(path) as temporary:  # noqa: PT012
            (temporary / "new").write_text("half")
            raise error
        assert names(tmp_path) == ["folder"]
        assert names(path) == ["old"]


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_failing_exchange_gives_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "folder"
    with atomic_directory(path) as temporary:
        (temporary / "old").write_text("old")
    replace = Path.replace

    def fail_to_arrive(self: Path, target: Path) -> Path:
        if Path(target) == path and (self / "new").exists():
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_to_arrive)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_directory(path) as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["old"]


def test_no_permission_for_a_folder_is_an_output_error(readonly: Path) -> None:
    for path in (readonly / "new", readonly / "kept"):
        with pytest.raises(OutputError, match=r"Permission denied"), atomic_directory(path):
            raise Boom
    assert names(readonly) == ["kept", "old"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    script = textwrap.dedent(f"""
        from pathlib import Path
        from adamerge.files import write_text
        print("ready", flush=True)
        for i in range(10**9):
            write_text(Path({str(path)!r}), str(i % 10) * 200_000)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        seen = set()
        while len(seen) < 4:
            if path.exists():
                text = path.read_text()
                assert text == text[0] * 200_000
                seen.add(text[0])
        process.kill()
    text = path.read_text()
    assert text == text[0] * 200_000


# Hashes


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"", b"abc", bytes(range(256)) * 5000):
        path.write_bytes(content)
        assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
