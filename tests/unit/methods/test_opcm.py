"""OPCM against the published recursion over whole models in numpy, and a matrix worked by hand."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import spectral
from torch import Tensor
from unit.methods.banks import bank_of, random, vector_of
from unit.zoo import make_bank

from adamerge.bank import ParameterBank
from adamerge.errors import CheckpointError, ConfigError, KeyMismatchError
from adamerge.methods.static import ContinualOpcm, Opcm

OPCM = Opcm(
    dominant_share=0.5,
    shuffle=False,
    seed=0,
    exclude=(),
    split_in_proj=False,
    scaling=1,
    grid=(),
    transform=None,
)
SHAPES = {"tall": (7, 4), "wide": (3, 6), "square": (5, 5), "bias": (6,), "conv": (2, 3, 2, 2), "one": (1, 1)}


def drawn(num_tasks: int, seed: int = 0) -> dict[str, Tensor]:
    return {key: random(num_tasks, *shape, seed=seed + i) for i, (key, shape) in enumerate(SHAPES.items())}


def models(task_vectors: Mapping[str, Tensor], order: tuple[int, ...] | None = None) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(task_vectors.values())))
    return [{key: tensor[k].double().numpy() for key, tensor in task_vectors.items()} for k in order or range(count)]


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    for key, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), expected[key], rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_worked_matrix(share: float) -> None:
    task_vectors = {
        key: torch.tensor([model[key] for model in spectral.OPCM_TASK_VECTORS]) for key in ("weight", "bias")
    }
    expected = {key: spectral.OPCM_FACTORS[share] * np.array(value) for key, value in spectral.OPCM_SUMS[share].items()}
    assert_equal(vector_of(replace(OPCM, dominant_share=share), bank_of(task_vectors)), expected, 1e-6)
    reference, _ = spectral.opcm(models(task_vectors), share, ["weight"])
    np.testing.assert_allclose(reference["weight"], expected["weight"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_the_sum_scaled_once_is_the_recursion(num_tasks: int, share: float) -> None:
    task_vectors = drawn(num_tasks)
    expected, scales = spectral.opcm(models(task_vectors), share, ["tall", "wide", "square", "one"])
    assert len(scales) == num_tasks
    assert_equal(vector_of(replace(OPCM, dominant_share=share), bank_of(task_vectors)), expected)
    wide = bank_of({key: tensor.double() for key, tensor in task_vectors.items()})
    assert_equal(vector_of(replace(OPCM, dominant_share=share), wide), expected, 1e-11)


def test_one_task_gives_its_vector() -> None:
    task_vectors = drawn(1)
    found = vector_of(OPCM, bank_of(task_vectors))
    for key, tensor in task_vectors.items():
        assert torch.equal(found[key], tensor[0])


def test_the_norm_is_the_mean_of_the_tasks_norms() -> None:
    task_vectors = drawn(3)
    task_vectors["bias"][2] *= 20
    found = vector_of(OPCM, bank_of(task_vectors))
    norms = [torch.cat([tensor[k].flatten() for tensor in task_vectors.values()]).norm() for k in range(3)]
    merged = torch.cat([tensor.flatten() for tensor in found.values()]).norm()
    torch.testing.assert_close(merged, torch.stack(norms).mean())


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_what_is_added_is_orthogonal_to_the_leading_block_and_to_the_diagonal(share: float) -> None:
    before, new = random(9, 6).double(), random(9, 6, seed=1).double()
    added = replace(OPCM, dominant_share=share).projected("weight", before, new)
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    inner = left.mT @ added @ right.mT
    leading = int((values.cumsum(0) / values.sum() <= share + 1e-6).sum())
    assert 0 < leading <= 6
    zero = torch.zeros(6, 6, dtype=torch.bool)
    zero[:leading, :leading] = True
    zero |= torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(inner[zero], torch.zeros_like(inner[zero]), rtol=0, atol=1e-12)
    kept = (left.mT @ new @ right.mT)[~zero]
    torch.testing.assert_close(inner[~zero], kept, rtol=0, atol=1e-12)
    torch.testing.assert_close(added - left @ left.mT @ added, new - left @ left.mT @ new, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 999))
def test_a_share_of_one_closes_all_of_what_is_merged_already(seed: int) -> None:
    """Whatever the singular values add up to after rounding."""
    before, new = random(7, 5, seed=seed).double(), random(7, 5, seed=seed + 1).double()
    added = replace(OPCM, dominant_share=1).projected("weight", before, new)
    torch.testing.assert_close(before.mT @ added, torch.zeros(5, 5).double(), rtol=0, atol=1e-10)


def test_what_is_merged_already_is_not_added_again() -> None:
    matrix = random(5, 5)
    assert replace(OPCM, dominant_share=0).projected("weight", matrix, matrix).abs().max() < 1e-5


def test_directions_that_are_not_there_yet_are_open() -> None:
    """Below full rank only what is merged already is removed, no diagonal of LAPACK's choosing."""
    before, new = torch.zeros(4, 4), random(4, 4)
    before[0, 0] = 2
    expected = new.clone()
    expected[0, 0] = 0
    torch.testing.assert_close(OPCM.projected("weight", before, new), expected)
    assert torch.equal(OPCM.projected("weight", torch.zeros(4, 4), new), new)


def test_options() -> None:
    task_vectors = {"attn.in_proj_weight": random(2, 12, 4), "pos_embed": random(2, 5, 4, seed=1)}
    whole = vector_of(OPCM, bank_of(task_vectors))
    parts = vector_of(replace(OPCM, split_in_proj=True), bank_of(task_vectors))
    apart = {str(i): task_vectors["attn.in_proj_weight"][:, 4 * i : 4 * i + 4] for i in range(3)}
    expected, _ = spectral.opcm(models({**apart, "pos": task_vectors["pos_embed"]}), 0.5, ["0", "1", "2", "pos"])
    assert_equal({"pos": parts["pos_embed"]}, expected)
    joined = np.concatenate([expected[str(i)] for i in range(3)])
    np.testing.assert_allclose(parts["attn.in_proj_weight"], joined, rtol=0, atol=1e-5)
    assert (parts["attn.in_proj_weight"] - whole["attn.in_proj_weight"]).abs().max() > 0.05

    expected, _ = spectral.opcm(models(task_vectors), 0.5, ["attn.in_proj_weight"])
    assert_equal(vector_of(replace(OPCM, exclude=["*pos*"]), bank_of(task_vectors)), expected)
    with pytest.raises(ConfigError, match="'proj' of exclude matches none"):
        vector_of(replace(OPCM, exclude=["proj"]), bank_of(task_vectors))


# The order


def named(task_vectors: Mapping[str, Tensor], order: tuple[int, ...]) -> ParameterBank:
    bank = bank_of(task_vectors)
    tensors = {key: tensor[list(order)].clone() for key, tensor in bank.task_vectors.items()}
    return ParameterBank(bank.pretrained, tensors, tuple(bank.task_names[index] for index in order))


def test_without_shuffling_it_depends_on_the_order_of_the_tasks() -> None:
    task_vectors = drawn(3)
    expected, _ = spectral.opcm(models(task_vectors, (2, 0, 1)), 0.5, ["tall", "wide", "square", "one"])
    found = vector_of(OPCM, named(task_vectors, (2, 0, 1)))
    assert_equal(found, expected)
    plain = vector_of(OPCM, bank_of(task_vectors))
    assert any((plain[key] - found[key]).abs().max() > 1e-2 for key in plain)
    assert "order of the tasks" in (Opcm.__doc__ or "")


def test_the_drawn_order_depends_on_the_seed_and_on_nothing_else() -> None:
    task_vectors = drawn(3)
    method = replace(OPCM, shuffle=True)
    expected = vector_of(method, bank_of(task_vectors))
    for order in permutations(range(3)):
        found = vector_of(method, named(task_vectors, order))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    names = ("a", "b", "c")
    orders = {tuple(replace(method, seed=seed).order(names)) for seed in range(100)}
    assert orders == set(permutations(range(3)))
    assert OPCM.order(names) == [0, 1, 2]


# One expert at a time


def experts(num_tasks: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = {f"visual.{key}": tensor[0] for key, tensor in drawn(1, seed=50).items()}
    task_vectors = {f"visual.{key}": tensor for key, tensor in drawn(num_tasks).items()}
    return base, [{key: base[key] + tensor[k] for key, tensor in task_vectors.items()} for k in range(num_tasks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_experts_one_at_a_time_give_the_merge_of_the_bank(dtype: torch.dtype) -> None:
    base, arriving = experts(4)
    base = {key: tensor.to(dtype) for key, tensor in base.items()}
    arriving = [{key: tensor.to(dtype) for key, tensor in expert.items()} for expert in arriving]
    method = replace(OPCM, scaling=0.9)
    continual = ContinualOpcm(method, base)
    for count, expert in enumerate(arriving, start=1):
        continual.accept(expert)
        assert continual.num_experts == count
        expected = method(make_bank(base, arriving[:count], dtype=dtype))
        found = continual.merged()
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        tolerance = 1e-5 if dtype != torch.bfloat16 else 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_its_memory_does_not_grow_with_the_number_of_experts() -> None:
    base, arriving = experts(3)
    continual = ContinualOpcm(OPCM, base)

    def held() -> dict[int, int]:
        """Bytes by address of every tensor that hangs on it, θ₀ apart."""
        found, seen, queue = {}, set(), [continual.__dict__]
        while queue:
            item = queue.pop()
            if isinstance(item, Tensor):
                found[item.data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
                seen.add(id(item))
                queue += item.values() if isinstance(item, dict) else item
        return {
            address: size for address, size in found.items() if address not in {t.data_ptr() for t in base.values()}
        }

    before = held()
    assert sum(before.values()) == sum(4 * tensor.numel() for tensor in base.values())
    for expert in arriving * 4:
        continual.accept(expert)
        assert held() == before
        assert set(continual.__dict__) == {"method", "pretrained", "num_experts", "_norms", "_sum"}


def test_an_accepted_expert_may_be_overwritten_and_a_result_too() -> None:
    base, arriving = experts(2)
    continual = ContinualOpcm(OPCM, base)
    continual.accept(arriving[0])
    for tensor in continual.merged().values():
        tensor.zero_()
    expected = {key: tensor.clone() for key, tensor in arriving[0].items()}
    for tensor in arriving[0].values():
        tensor.zero_()
    torch.testing.assert_close(continual.merged(), expected, rtol=0, atol=1e-5)


def test_before_the_first_expert_it_is_the_pretrained_model() -> None:
    base, _ = experts(1)
    continual = ContinualOpcm(OPCM, base)
    assert all(torch.equal(tensor, base[key]) for key, tensor in continual.merged().items())
    continual.accept(base)  # τ = 0
    assert all(torch.equal(tensor, base[key]) for key, tensor in continual.merged().items())


def test_it_goes_on_in_another_process(tmp_path: Path) -> None:
    base, arriving = experts(3)
    first, whole = ContinualOpcm(OPCM, base), ContinualOpcm(OPCM, base)
    for expert in arriving[:2]:
        first.accept(expert)
    torch.save(first.state_dict(), tmp_path / "opcm.pt")
    second = ContinualOpcm(OPCM, base)
    state = torch.load(tmp_path / "opcm.pt", weights_only=True)
    second.load_state_dict(state)
    for tensor in state["sum"].values():
        tensor.zero_()  # it was copied
    assert second.num_experts == 2
    for continual, new in ((second, arriving[2:]), (whole, arriving)):
        for expert in new:
            continual.accept(expert)
    expected = whole.merged()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in second.merged().items())

    other = ContinualOpcm(OPCM, {**base, "visual.more": torch.zeros(2)})
    with pytest.raises(KeyMismatchError, match=r"the saved state lacks 1 tensors .*\(visual.more\)"):
        other.load_state_dict(first.state_dict())


def test_an_expert_with_nan_is_refused_and_leaves_no_trace() -> None:
    base, arriving = experts(2)
    continual = ContinualOpcm(OPCM, base)
    continual.accept(arriving[0])
    expected = continual.merged()
    broken = {**arriving[1], "visual.wide": torch.full((3, 6), float("nan"))}
    with pytest.raises(CheckpointError, match=r"NaN or Inf in visual.wide"):
        continual.accept(broken)
    assert continual.num_experts == 1
    assert all(torch.equal(tensor, expected[key]) for key, tensor in continual.merged().items())
    continual.accept({**arriving[1], "text": torch.ones(3)})  # what is not merged is ignored
    assert list(continual.merged()) == list(base)


def test_an_expert_of_another_model_is_refused() -> None:
    base, (expert,) = experts(1)
    continual = ContinualOpcm(OPCM, base)
    with pytest.raises(KeyMismatchError, match=r"lacks 2 tensors .*\(visual.bias, visual.tall\)"):
        continual.accept(
            {**{key: expert[key] for key in expert if "bias" not in key}, "visual.tall": torch.zeros(4, 7)}
        )
    assert continual.num_experts == 0
    with pytest.raises(ConfigError, match="Give the scaling as a number"):
        ContinualOpcm(replace(OPCM, scaling="search", grid=(1.0,)), base).merged()
    with pytest.raises(ConfigError, match="matches none"):
        ContinualOpcm(replace(OPCM, exclude=["x"]), base)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"dominant_share is from 0 to 1, found {share}"):
        replace(OPCM, dominant_share=share)
