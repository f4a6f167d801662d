import csv
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adamerge.bank import ParameterBank
from adamerge.errors import CheckpointError, ShapeError
from adamerge.export import SavedCoefficients, read_coefficients, write_coefficients, write_coefficients_csv
from adamerge.merging import Partition, merge

SHAPES = {"visual.conv1.weight": (3, 2), "visual.transformer.resblocks.0.ln_1.bias": (5,), "visual.proj": (2, 2)}
TASKS = ("mnist", "größe")


def saved_for(granularity: str) -> SavedCoefficients:
    partition = Partition.build(granularity, SHAPES)
    coefficients = torch.rand(2, partition.num_groups, generator=torch.manual_seed(0))
    return SavedCoefficients(coefficients, TASKS, partition, {"name": "ties", "density": 0.2}, "abc123", "my_method")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "coefficients.safetensors"


@pytest.mark.parametrize("granularity", ["task", "tensor", "block", "chunk(4)"])
@pytest.mark.parametrize("transform", [None, {"name": "dare", "density": 0.1, "seed": [1, 2]}])
def test_everything_comes_back(path, granularity, transform):
    saved = replace(saved_for(granularity), transform=transform)
    write_coefficients(path, saved)
    found = read_coefficients(path)
    assert torch.equal(found.coefficients, saved.coefficients)
    assert replace(found, coefficients=saved.coefficients) == saved


@pytest.mark.parametrize("granularity", ["task", "tensor", "block", "chunk(4)"])
def test_the_file_is_enough_to_merge_again(path, granularity):
    generator = torch.manual_seed(1)
    pretrained = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    experts = {
        task: {key: value + torch.randn(value.shape, generator=generator) for key, value in pretrained.items()}
        for task in TASKS
    }
    bank = ParameterBank.from_experts(pretrained, experts, tuple(SHAPES))
    saved = replace(saved_for(granularity), base_hash=bank.base_hash)
    write_coefficients(path, saved)
    again = read_coefficients(path)
    assert again.base_hash == bank.base_hash
    expected, found = (merge(bank, one.coefficients, one.partition) for one in (saved, again))
    assert found.keys() == pretrained.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(found["visual.proj"], pretrained["visual.proj"])


def test_learned_coefficients_are_written_without_their_graph(path):
    saved = saved_for("tensor")
    learned = torch.nn.Parameter(saved.coefficients.clone())
    write_coefficients(path, replace(saved, coefficients=learned * 1.0))
    found = read_coefficients(path).coefficients
    assert torch.equal(found, saved.coefficients)
    assert not found.requires_grad


def test_shapes_are_checked_at_once():
    saved = saved_for("tensor")
    with pytest.raises(ShapeError, match=r"\(2, 2\).*\(2, 3\)"):
        replace(saved, coefficients=saved.coefficients[:, :2])


def rewrite(path, *, coefficients=None, drop=(), **metadata):
    """The file once more, with some of it changed."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
        tensor = file.get_tensor("coefficients")
    kept = {name: value for name, value in (old | metadata).items() if name not in drop}
    save_file({"coefficients": tensor if coefficients is None else coefficients}, path, metadata=kept)


PARTITION = saved_for("tensor").partition.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adamerge": "adamerge.coefficients/99"}, "'adamerge.coefficients/1'.*'adamerge.coefficients/99'"),
        ({"drop": ["adamerge"]}, "another kind of safetensors file"),
        ({"drop": ["base_hash"]}, "lacks a part: 'base_hash'"),
        ({"task_names": '["mnist"]'}, r"contradicts itself.*\(2, 3\).*\(1, 3\)"),
        ({"task_names": "["}, "contradicts itself or lacks a part"),
        ({"partition": "[]"}, "contradicts itself or lacks a part"),
        ({"partition": json.dumps(PARTITION | {"segments": {"visual.proj": [[0, 4]]}})}, "contradicts itself"),
        ({"partition": json.dumps(PARTITION | {"segments": {"visual.proj": [[0, 4, 3]]}})}, "unknown groups"),
        ({"coefficients": torch.full((2, 3), torch.nan)}, "not finite"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(path, change, message):
    write_coefficients(path, saved_for("tensor"))
    rewrite(path, **change)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_coefficients(path)
    assert str(path) in str(raised.value)


def test_a_missing_truncated_or_foreign_file(path, tmp_path):
    with pytest.raises(CheckpointError, match="no coefficients file"):
        read_coefficients(path)
    with pytest.raises(CheckpointError, match="no coefficients file"):
        read_coefficients(tmp_path)
    write_coefficients(path, saved_for("tensor"))
    whole = path.read_bytes()
    for size in (0, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cannot read"):
            read_coefficients(path)
    save_file({"visual.proj": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="another kind of safetensors file"):
        read_coefficients(path)


def test_csv(tmp_path):
    saved = saved_for("chunk(4)")
    saved.coefficients[0, 0] = 1e-7
    write_coefficients_csv(tmp_path / "coefficients.csv", saved)
    with (tmp_path / "coefficients.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["group", *TASKS]
    assert [row[0] for row in rows] == list(saved.partition.groups)
    values = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    assert torch.equal(values.T, saved.coefficients)
