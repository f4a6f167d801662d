"""θ₀ and τ, checked once."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import CheckpointError, ConfigError, KeyMismatchError

KEYS = ("visual.conv1.weight", "visual.proj", "visual.ln.bias")
State = dict[str, Tensor]


def clip(seed: int = 0, **changes: Tensor) -> State:
    """A full CLIP of three mergeable tensors, a buffer and a text tower; the text tower does not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "visual.conv1.weight": torch.randn(2, 3, 2, 2, generator=generator),
        "visual.proj": torch.randn(4, 3, generator=generator),
        "visual.ln.bias": torch.randn(4, generator=generator),
        "visual.positions": torch.arange(3),
        "text_projection": torch.arange(6.0).view(2, 3) / 7,
        "logit_scale": torch.tensor(2.5),
    }
    return state | {name.replace("__", "."): tensor for name, tensor in changes.items()}


def without(state: State, *keys: str) -> State:
    return {key: tensor for key, tensor in state.items() if key not in keys}


def build(pretrained: State, experts: Mapping[str, State | Path], **options: object) -> ParameterBank:
    return ParameterBank.from_experts(pretrained, experts, KEYS, **options)  # type: ignore[arg-type]


def refusal(experts: Mapping[str, State | Path], **options: object) -> str:
    with pytest.raises(KeyMismatchError) as caught:
        build(clip(), experts, **options)
    return str(caught.value)


# What is in it


def test_task_vectors_are_expert_minus_pretrained() -> None:
    experts = {"a": clip(1), "b": clip(2)}
    bank = build(clip(), experts)
    assert bank.task_names == ("a", "b")
    assert bank.num_tasks == 2
    assert tuple(bank.pretrained) == tuple(bank.task_vectors) == KEYS
    assert bank.shapes == {key: clip()[key].shape for key in KEYS}
    for key in KEYS:
        assert torch.equal(bank.pretrained[key], clip()[key])
        assert torch.equal(bank.task_vectors[key], torch.stack([e[key] - clip()[key] for e in experts.values()]))
        assert bank.task_vectors[key].is_contiguous()
        assert not bank.task_vectors[key].requires_grad


def test_experts_come_back_by_name_and_by_index() -> None:
    bank = build(clip(), {"a": clip(1), "b": clip(2)})
    for index, name in enumerate("ab"):
        torch.testing.assert_close(bank.expert(name), {key: clip(index + 1)[key] for key in KEYS})
        torch.testing.assert_close(bank.expert(index), bank.expert(name), rtol=0, atol=0)


numbers = st.floats(-(2.0**100), 2.0**100, width=32)


@given(numbers, numbers)
def test_an_expert_comes_back_within_one_rounding(pretrained: float, expert: float) -> None:
    key = "visual.w"
    before, after = torch.tensor([pretrained]), torch.tensor([expert])
    found = ParameterBank.from_experts({key: before}, {"a": {key: after}}, [key]).expert(0)[key]
    larger = torch.maximum(before.abs(), after.abs()).double()
    assert (found.double() - after.double()).abs() <= torch.finfo(torch.float32).eps * larger


def test_full_clips_towers_alone_and_files_give_the_same_bank(tmp_path: Path) -> None:
    tower = without(clip(1), "text_projection", "logit_scale")
    save_file(clip(1), tmp_path / "full.safetensors")
    save_file(tower, tmp_path / "tower.safetensors")
    torch.save(tower, tmp_path / "tower.pt")
    expected = build(clip(), {"a": clip(1)})
    for source in (tower, *sorted(tmp_path.iterdir())):
        found = build(clip(), {"a": source})
        torch.testing.assert_close(dict(found.task_vectors), dict(expected.task_vectors), rtol=0, atol=0)


def test_buffers_and_text_tower_are_not_in_it() -> None:
    bank = build(clip(), {"a": clip(1, visual__positions=torch.arange(3) + 1)})
    assert set(bank.pretrained) == set(KEYS)


def test_inputs_stay_as_they_are_and_the_pretrained_model_is_not_held_twice() -> None:
    pretrained, expert = clip(), clip(1)
    bank = build(pretrained, {"a": expert})
    assert bank.pretrained["visual.proj"].data_ptr() == pretrained["visual.proj"].data_ptr()
    bank.task_vectors["visual.proj"].zero_()
    torch.testing.assert_close(pretrained, clip(), rtol=0, atol=0)
    torch.testing.assert_close(expert, clip(1), rtol=0, atol=0)


def test_half_precision_files_are_widened_before_they_are_subtracted() -> None:
    pretrained, expert = ({key: t.half() for key, t in without(clip(s), "visual.positions").items()} for s in (0, 1))
    bank = build(pretrained, {"a": expert})
    for key in KEYS:
        assert bank.pretrained[key].dtype == bank.task_vectors[key].dtype == torch.float32
        assert torch.equal(bank.task_vectors[key][0], expert[key].float() - pretrained[key].float())


def test_transposed_and_learnable_tensors_are_taken() -> None:
    expert = clip(1, visual__proj=torch.nn.Parameter(clip(1)["visual.proj"].t().contiguous().t()))
    bank = build(clip(), {"a": expert})
    assert not bank.task_vectors["visual.proj"].requires_grad
    assert torch.equal(bank.task_vectors["visual.proj"][0], clip(1)["visual.proj"] - clip()["visual.proj"])


# What it refuses


def test_missing_keys() -> None:
    message = refusal({"dtd": without(clip(1), "visual.proj", "visual.ln.bias")})
    assert "task 'dtd' lacks 2 keys of the pretrained model (visual.ln.bias, visual.proj)" in message
    assert "model.exclude" in message


def test_extra_keys() -> None:
    message = refusal({"dtd": clip(1, visual__more=torch.zeros(2))})
    assert "task 'dtd' has 1 keys that the pretrained model lacks (visual.more)" in message


def test_other_shapes() -> None:
    message = refusal({"dtd": clip(1, visual__proj=torch.zeros(3, 4))})
    assert "task 'dtd' has 1 tensors of another shape (visual.proj (3, 4) for (4, 3))" in message


def test_other_dtypes() -> None:
    experts = {"dtd": clip(1, visual__proj=clip(1)["visual.proj"].half())}
    message = refusal(experts)
    assert "task 'dtd' has 1 tensors of another dtype (visual.proj torch.float16 for torch.float32)" in message
    assert "bank.strict_dtype=false" in message
    bank = build(clip(), experts, strict_dtype=False)
    expected = clip(1)["visual.proj"].half().float() - clip()["visual.proj"]
    assert torch.equal(bank.task_vectors["visual.proj"][0], expected)


def test_integers_are_never_taken_for_weights() -> None:
    integer = clip(1, visual__proj=torch.ones(4, 3, dtype=torch.int64))
    assert "visual.proj torch.int64" in refusal({"dtd": integer}, strict_dtype=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_projection", torch.zeros(2, 3)),
        ("text_projection", torch.zeros(3, 2)),
        ("logit_scale", torch.tensor(2.500001)),
    ],
)
def test_a_changed_text_tower(key: str, value: Tensor) -> None:
    assert f"task 'dtd' has a changed text tower ({key})" in refusal({"dtd": clip(1) | {key: value}})


def test_a_text_tower_in_half_precision_is_not_a_changed_one() -> None:
    # With strict_dtype=false rounding is accepted, and the text tower of a half-precision file is rounded too.
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in clip(1).items()}
    bank = build(clip(), {"dtd": half}, strict_dtype=False)
    assert bank.num_tasks == 1
    half["text_projection"] = half["text_projection"] + 0.25
    assert "changed text tower" in refusal({"dtd": half}, strict_dtype=False)


def test_one_error_names_all_that_is_wrong_with_all_experts(tmp_path: Path) -> None:
    save_file(clip(4, visual__proj=torch.zeros(1)), tmp_path / "fourth.safetensors")
    message = refusal(
        {
            "fine": clip(1),
            "first": without(clip(2), "visual.proj") | {"visual.else": torch.zeros(1)},
            "second": clip(3, logit_scale=torch.tensor(0.0), visual__proj=torch.zeros(4, 3).half()),
            "fourth": tmp_path / "fourth.safetensors",
        }
    )
    for expected in (
        "task 'first' lacks 1 keys",
        "task 'first' has 1 keys that the pretrained model lacks (visual.else)",
        "task 'second' has 1 tensors of another dtype",
        "task 'second' has a changed text tower (logit_scale)",
        f"task 'fourth' ({tmp_path / 'fourth.safetensors'}) has 1 tensors of another shape",
    ):
        assert message.count(expected) == 1
    assert "'fine'" not in message
    assert len(message.splitlines()) == 5


def test_long_lists_are_cut_at_five() -> None:
    keys = [f"visual.{letter}" for letter in "hgfedcba"]
    state = {key: torch.zeros(1) for key in keys}
    with pytest.raises(
        KeyMismatchError,
        match=re.escape(
            "lacks 7 keys of the pretrained model (visual.a, visual.b, visual.c, visual.d, visual.e, … 2 more)"
        ),
    ):
        ParameterBank.from_experts(state, {"t": {"visual.h": torch.zeros(1)}}, keys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_inf_in_an_expert(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    pretrained, good, bad = (
        {key: t.to(dtype) if t.is_floating_point() else t for key, t in clip(s).items()} for s in (0, 1, 2)
    )
    bad["visual.proj"][1, 2] = value
    with pytest.raises(CheckpointError, match=r"'bad' holds NaN or Inf in visual\.proj\."):
        build(pretrained, {"good": good, "bad": bad})
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors\) holds NaN or Inf in visual\.proj\."):
        build(pretrained, {"good": good, "bad": tmp_path / "bad.safetensors"})


def test_nan_in_the_pretrained_model() -> None:
    with pytest.raises(CheckpointError, match=r"pretrained model holds NaN or Inf in visual\.ln\.bias"):
        build(clip(visual__ln__bias=torch.full((4,), torch.nan)), {"a": clip(1)})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        build(clip(), {"a": tmp_path / "none.safetensors"})


def test_no_experts() -> None:
    with pytest.raises(ConfigError, match=r"suite\.tasks"):
        build(clip(), {})


# Its hash


def test_the_hash_is_that_of_the_pretrained_tensors() -> None:
    reference = build(clip(), {"a": clip(1)}).base_hash
    assert build(clip(), {"b": clip(2), "c": clip(3)}).base_hash == reference
    assert (
        build(clip(logit_scale=torch.tensor(1.0)), {"b": clip(2, logit_scale=torch.tensor(1.0))}).base_hash == reference
    )
    changed = clip()
    changed["visual.proj"][0, 0] += 1e-6
    assert build(changed, {"a": clip(1)}).base_hash != reference
    renamed = {key.replace("proj", "else"): tensor for key, tensor in clip().items()}
    other = ParameterBank.from_experts(renamed, {"a": renamed}, [key.replace("proj", "else") for key in KEYS])
    assert other.base_hash != reference


# Transforms


def negate_and_trim(key: str, task_vectors: Tensor) -> Tensor:
    return -torch.where(task_vectors.abs() > 0.5, task_vectors, 0) * (2 if key == "visual.proj" else 1)


def test_a_lazy_transform_equals_the_one_in_place() -> None:
    source, target = build(clip(), {"a": clip(1), "b": clip(2)}), build(clip(), {"a": clip(1), "b": clip(2)})
    expected = {key: negate_and_trim(key, task_vectors) for key, task_vectors in source.task_vectors.items()}
    before = {key: task_vectors.clone() for key, task_vectors in source.task_vectors.items()}
    lazy = source.transformed(negate_and_trim)
    torch.testing.assert_close(dict(lazy.task_vectors), expected, rtol=0, atol=0)
    assert list(lazy.task_vectors) == list(KEYS)
    assert len(lazy.task_vectors) == 3
    torch.testing.assert_close(dict(source.task_vectors), before, rtol=0, atol=0)
    addresses = [tensor.data_ptr() for tensor in target.task_vectors.values()]
    assert target.transformed(negate_and_trim, in_place=True) is target
    torch.testing.assert_close(dict(target.task_vectors), expected, rtol=0, atol=0)
    assert addresses == [tensor.data_ptr() for tensor in target.task_vectors.values()]
    assert lazy.base_hash == source.base_hash == target.base_hash


def test_a_lazy_transform_computes_one_tensor_at_a_time() -> None:
    asked = []

    def record(key: str, task_vectors: Tensor) -> Tensor:
        asked.append(key)
        return task_vectors

    lazy = build(clip(), {"a": clip(1)}).transformed(record)
    assert asked == []
    lazy.task_vectors["visual.proj"]
    assert asked == ["visual.proj"]


def test_transforms_follow_one_another_lazily_and_in_place() -> None:
    def halve(key: str, task_vectors: Tensor) -> Tensor:
        return task_vectors / 2

    source = build(clip(), {"a": clip(1)})
    expected = {key: negate_and_trim(key, t) / 2 for key, t in source.task_vectors.items()}
    twice = source.transformed(negate_and_trim).transformed(halve)
    torch.testing.assert_close(dict(twice.task_vectors), expected, rtol=0, atol=0)
    mixed = source.transformed(negate_and_trim).transformed(halve, in_place=True)
    torch.testing.assert_close(dict(mixed.task_vectors), expected, rtol=0, atol=0)


def test_to_the_same_device_copies_nothing() -> None:
    bank = build(clip(), {"a": clip(1)})
    there = bank.to("cpu")
    assert all(there.task_vectors[key].data_ptr() == bank.task_vectors[key].data_ptr() for key in KEYS)
    assert all(there.pretrained[key].data_ptr() == bank.pretrained[key].data_ptr() for key in KEYS)


def test_is_frozen() -> None:
    bank = build(clip(), {"a": clip(1)})
    with pytest.raises(AttributeError):
        bank.task_names = ("b",)  # type: ignore[misc]
