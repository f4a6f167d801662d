"""Inner products, against those of the flattened tensors."""

import pytest
import torch
from unit.zoo import Zoo, make_bank

from adamerge.errors import ConfigError
from adamerge.merging import Partition
from adamerge.methods.learned import gram
from adamerge.methods.learned.gram import gram_matrices, tensor_groups


def test_are_those_of_the_flattened_tensors(zoo64: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_BLOCK", 7)  # which divides no size here
    found = gram_matrices(zoo64.bank)
    for matrix, (key, base) in zip(found, zoo64.pretrained.items(), strict=True):
        vectors = [base.flatten(), *((expert[key] - base).flatten() for expert in zoo64.experts)]
        expected = torch.tensor([[float((u * v).sum()) for v in vectors] for u in vectors], dtype=torch.float64)
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-14, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_of_stored_task_vectors_are_those_of_what_is_read(zoo: Zoo, dtype: torch.dtype) -> None:
    bank = make_bank(zoo.pretrained, zoo.experts, stored=dtype)
    key = next(key for key, shape in bank.shapes.items() if len(shape) == 2)
    found = gram_matrices(bank)[list(bank.pretrained).index(key), 1:, 1:]
    read = bank.task_vectors[key].double().flatten(1)
    torch.testing.assert_close(found, read @ read.T, rtol=1e-6, atol=0)
    exact = torch.stack([expert[key] - zoo.pretrained[key] for expert in zoo.experts]).double().flatten(1)
    assert not torch.allclose(found, exact @ exact.T, rtol=1e-6, atol=0)


def test_every_tensor_has_its_group(zoo: Zoo) -> None:
    keys = list(zoo.bank.pretrained)
    assert tensor_groups(Partition.build("task", zoo.bank.shapes), keys) == [0] * len(keys)
    assert tensor_groups(Partition.build("tensor", zoo.bank.shapes), keys) == list(range(len(keys)))
    blocks = Partition.build("block", zoo.bank.shapes)
    names = [blocks.groups[group] for group in tensor_groups(blocks, keys)]
    assert dict(zip(keys, names, strict=True))["visual.proj"] == "output"


@pytest.mark.parametrize("granularity", ["row", "chunk(2)", "random(3)"])
def test_divided_tensors_are_refused(zoo: Zoo, granularity: str) -> None:
    with pytest.raises(ConfigError, match=r"divides tensors.*method\.granularity=task, block or tensor"):
        tensor_groups(Partition.build(granularity, zoo.bank.shapes), list(zoo.bank.pretrained))
