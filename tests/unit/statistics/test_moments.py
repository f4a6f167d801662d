"""Second moments out of files: whole and as they are, or refused with a remedy."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.errors import CheckpointError, ConfigError, KeyMismatchError
from adamerge.statistics import Expert, Moments

KEYS = ("proj.weight", "proj.bias")


@pytest.fixture
def expert() -> Expert:
    network = nn.Module()
    network.proj = nn.Linear(3, 2)
    network.unmerged = nn.Linear(2, 2)
    return Expert("dtd", network, torch.eye(2), None, None, KEYS, torch.device("cpu"), "32-true", 4)


@pytest.fixture
def moments() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"proj.weight": torch.rand(2, 3, generator=generator), "proj.bias": 1e-20 * torch.rand(2)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "dtd.safetensors"


def test_are_those_of_the_task_and_of_merged_tensors(
    tmp_path: Path, expert: Expert, moments: dict[str, Tensor]
) -> None:
    save_file(moments | {"optimizer.step": torch.tensor(-3)}, tmp_path / "dtd.safetensors")
    torch.save({key: 2 * value for key, value in moments.items()}, tmp_path / "sun.pt")
    statistic = Moments({"sun": str(tmp_path / "sun.pt"), "dtd": str(tmp_path / "dtd.safetensors")})
    assert (statistic.needs, statistic.images_per_task) == ("nothing", None)
    found = statistic(expert)
    assert tuple(found) == KEYS
    torch.testing.assert_close(found, moments, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_are_float32_or_wider(
    file: Path, expert: Expert, moments: dict[str, Tensor], stored: torch.dtype, expected: torch.dtype
) -> None:
    narrow = {key: value.to(stored) for key, value in moments.items()}
    save_file(narrow, file)
    for key, value in Moments({"dtd": str(file)})(expert).items():
        assert value.dtype == expected
        assert torch.equal(value, narrow[key].to(expected))


@pytest.mark.parametrize(("files", "named"), [({}, "none"), ({"sun": "a.pt", "eurosat": "b.pt"}, "eurosat, sun")])
def test_a_task_without_a_file_is_said(expert: Expert, files: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"task 'dtd' has no file .* which has them for {named}\."):
        Moments(files)(expert)


def test_a_file_that_is_not_there_is_said(expert: Expert, file: Path) -> None:
    statistic = Moments({"dtd": str(file)})
    assert statistic.to_json()["sha256"] == {}
    with pytest.raises(CheckpointError, match="no such weight file"):
        statistic(expert)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused(tmp_path: Path, expert: Expert, moments: dict[str, Tensor], suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    save_file(moments, whole) if suffix == ".safetensors" else torch.save(moments, whole)
    for size in (0, 7, 60, whole.stat().st_size - 5):
        part = tmp_path / f"{size}{suffix}"
        part.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=part.name):
            Moments({"dtd": str(part)})(expert)


class Hostile:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_file_gets_code_to_run(tmp_path: Path, expert: Expert, moments: dict[str, Tensor], zipped: bool) -> None:
    content = moments | {"trap": Hostile(tmp_path / "ran")}
    torch.save(content, tmp_path / "dtd.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"dtd\.pt"):
        Moments({"dtd": str(tmp_path / "dtd.pt")})(expert)
    assert not (tmp_path / "ran").exists()


def test_an_optimizers_own_state_is_refused(tmp_path: Path, expert: Expert) -> None:
    """Whose moments have numbers in place of names."""
    optimizer = torch.optim.Adam(expert.network.parameters())
    sum(parameter.sum() for parameter in expert.network.parameters()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "dtd.pt")
    with pytest.raises(CheckpointError, match=r"dtd\.pt"):
        Moments({"dtd": str(tmp_path / "dtd.pt")})(expert)


def test_missing_tensors_are_named(file: Path, expert: Expert, moments: dict[str, Tensor]) -> None:
    save_file({"proj.weight": moments["proj.weight"]}, file)
    with pytest.raises(KeyMismatchError, match=r"lacks second moments of 1 merged tensors \(proj\.bias\)\. Save"):
        Moments({"dtd": str(file)})(expert)


def test_other_shapes_are_named(file: Path, expert: Expert, moments: dict[str, Tensor]) -> None:
    save_file(moments | {"proj.weight": moments["proj.weight"].flatten()}, file)
    with pytest.raises(KeyMismatchError, match=r"1 second moments of another shape \(proj\.weight \(6,\) for \(2, 3\)"):
        Moments({"dtd": str(file)})(expert)


@pytest.mark.parametrize("bad", [-1e-12, float("nan"), float("inf")])
def test_what_no_mean_of_squares_can_be_is_named(
    file: Path, expert: Expert, moments: dict[str, Tensor], bad: float
) -> None:
    moments["proj.bias"][1] = bad
    save_file(moments, file)
    with pytest.raises(CheckpointError, match=r"at least 0, unlike those of proj\.bias\. Save exp_avg_sq, not exp_avg"):
        Moments({"dtd": str(file)})(expert)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_what_is_no_real_number_is_named(
    file: Path, expert: Expert, moments: dict[str, Tensor], dtype: torch.dtype
) -> None:
    save_file(moments | {"proj.bias": torch.ones(2).to(dtype)}, file)
    with pytest.raises(CheckpointError, match=r"unlike those of proj\.bias"):
        Moments({"dtd": str(file)})(expert)


def test_its_record_tells_files_by_their_contents(file: Path, moments: dict[str, Tensor]) -> None:
    save_file(moments, file)
    statistic = Moments({"dtd": str(file)})
    first = statistic.to_json()
    assert (first["name"], first["files"], set(first["sha256"])) == ("moments", {"dtd": str(file)}, {"dtd"})
    assert statistic.to_json() == first
    save_file({key: 2 * value for key, value in moments.items()}, file)
    assert statistic.to_json()["sha256"] != first["sha256"]
