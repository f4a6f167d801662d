"""Which images a step sees: a pure function of seed, task and step."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamerge.errors import ConfigError, DataError
from adamerge.tasks.datamodule import HELD_OUT, STARTS, TaskImages, generator_for, split_indices

SIZES = {"a": 100, "b": 40, "c": 90}


def numbered(count: int) -> Tensor:
    """Images whose first pixels hold their index, (N, 3, 1, 1)."""
    index = torch.arange(count)
    return torch.stack([index // 256, index % 256, torch.zeros_like(index)], dim=1).to(torch.uint8)[:, :, None, None]


def numbers(images: Tensor) -> list[int]:
    flat = images.flatten(1).long()
    return (256 * flat[:, 0] + flat[:, 1]).tolist()


def make(
    sizes: dict[str, int] = SIZES,
    *,
    images_per_batch: int = 16,
    batches_per_step: int = 2,
    seed: int = 0,
    indices: dict[str, Tensor] | None = None,
) -> TaskImages:
    return TaskImages(
        {task: numbered(size) for task, size in sizes.items()},
        indices or {task: torch.arange(size) for task, size in sizes.items()},
        images_per_batch=images_per_batch,
        batches_per_step=batches_per_step,
        seed=seed,
    )


def drawn(module: TaskImages, task: str, step: int) -> list[list[int]]:
    return [batch.tolist() for batch in module.draw(task, step)]


# What a step depends on


def test_other_instances_orders_and_subsets_of_tasks_see_the_same() -> None:
    full, again = make(), make(dict(reversed(SIZES.items())))
    alone = make({"b": SIZES["b"]})
    for step in (7, 0, 3, 7):  # in any order
        assert drawn(full, "b", step) == drawn(again, "b", step) == drawn(alone, "b", step)
        assert numbers(full.batch(step)["images"]["c"]) == numbers(again.batch(step)["images"]["c"])


def test_the_state_of_torchs_generator_neither_matters_nor_changes() -> None:
    torch.manual_seed(1)
    first, state = drawn(make(), "a", 2), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert drawn(make(), "a", 2) == first


def test_steps_tasks_and_seeds_differ() -> None:
    sizes = dict.fromkeys("ab", 100)
    seen = {str(drawn(make(sizes, seed=seed), task, step)) for seed in range(3) for task in sizes for step in range(20)}
    assert len(seen) == 3 * 2 * 20


def test_a_generators_seed_is_the_same_in_every_process() -> None:
    # SHA-256 of "('step', 0, 'a', 1)", first seven bytes. Another number would break every interrupted run.
    assert generator_for("step", 0, "a", 1).initial_seed() == 47966418004309129


# What a step holds


def test_batches_of_a_step_are_disjoint_and_steps_repeat_images() -> None:
    module = make()
    seen: set[int] = set()
    repeated = False
    for step in range(20):
        batches = drawn(module, "b", step)
        assert [len(batch) for batch in batches] == [16, 16]
        images = [index for batch in batches for index in batch]
        assert len(set(images)) == 32
        repeated |= bool(seen & set(images))
        seen |= set(images)
    assert repeated
    assert seen == set(range(SIZES["b"]))


@given(
    size=st.integers(1, 40),
    images_per_batch=st.integers(1, 20),
    batches_per_step=st.integers(1, 3),
    step=st.integers(0, 99),
)
def test_fewer_images_than_a_step_takes_are_all_used(
    size: int, images_per_batch: int, batches_per_step: int, step: int
) -> None:
    module = make({"t": size}, images_per_batch=images_per_batch, batches_per_step=batches_per_step)
    batches = drawn(module, "t", step)
    wanted = min(size, images_per_batch * batches_per_step)
    assert len({index for batch in batches for index in batch}) == sum(map(len, batches)) == wanted
    assert len(batches) == ceil(wanted / images_per_batch)
    assert all(len(batch) == images_per_batch for batch in batches[:-1])


def test_only_usable_images_are_drawn() -> None:
    usable = torch.arange(1, SIZES["a"], 3)
    module = make({"a": SIZES["a"]}, indices={"a": usable})
    seen = {index for step in range(30) for batch in drawn(module, "a", step) for index in batch}
    assert seen == set(usable.tolist())


def test_a_batch_holds_the_images_and_the_weights_of_means() -> None:
    batch = make({"a": 100, "b": 20}).batch(3)
    assert list(batch["images"]) == list(batch["weights"]) == ["a", "b"]
    assert batch["images"]["a"].dtype == torch.uint8
    first, second = make().draw("a", 3)
    assert numbers(batch["images"]["a"]) == [*first.tolist(), *second.tolist()]
    assert batch["weights"]["a"].tolist() == [1 / 16] * 32
    assert batch["weights"]["b"].tolist() == [1 / 16] * 16 + [1 / 4] * 4  # 20 images: 16 and 4


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    images_per_batch=st.integers(1, 9),
    batches_per_step=st.integers(1, 3),
    world_size=st.integers(1, 5),
    step=st.integers(0, 99),
)
def test_ranks_are_disjoint_and_cover_every_batch(
    sizes: list[int], images_per_batch: int, batches_per_step: int, world_size: int, step: int
) -> None:
    tasks = dict(zip("abc", sizes, strict=False))
    module = make(tasks, images_per_batch=images_per_batch, batches_per_step=batches_per_step)
    whole = module.batch(step)
    shards = [module.batch(step, rank, world_size) for rank in range(world_size)]
    for task in tasks:
        batches = module.draw(task, step)
        by_rank = [numbers(shard["images"][task]) for shard in shards]
        assert sorted(index for part in by_rank for index in part) == sorted(numbers(whole["images"][task]))
        weights = {}
        for part, shard in zip(by_rank, shards, strict=True):
            assert len(part) == len(shard["weights"][task])
            weights |= dict(zip(part, shard["weights"][task].tolist(), strict=True))
        assert weights == dict(zip(numbers(whole["images"][task]), whole["weights"][task].tolist(), strict=True))
        assert sum(weights.values()) == pytest.approx(len(batches))
        sizes_by_rank = [len(part) for part in by_rank]
        assert max(sizes_by_rank) - min(sizes_by_rank) <= len(batches)


@pytest.mark.parametrize("option", ["images_per_batch", "batches_per_step"])
def test_counts_below_one_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        make(**{option: 0})


# What a run will have seen


@given(
    size=st.integers(1, 60),
    usable=st.integers(1, 60),
    images_per_batch=st.integers(1, 6),
    batches_per_step=st.integers(1, 2),
    steps=st.integers(0, 40),
)
def test_drawn_are_the_images_of_all_steps_and_of_the_draws_that_compare(
    size: int, usable: int, images_per_batch: int, batches_per_step: int, steps: int
) -> None:
    indices = {"t": torch.arange(size)[-usable:]}
    module = make({"t": size}, indices=indices, images_per_batch=images_per_batch, batches_per_step=batches_per_step)
    expected = {
        index for step in [*range(-8, 0), *range(steps)] for batch in drawn(module, "t", step) for index in batch
    }
    assert module.drawn("t", steps).tolist() == sorted(expected)


def test_drawn_of_many_steps_stops_looking_once_it_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = make({"a": 100}), []
    draw = module.draw
    monkeypatch.setattr(module, "draw", lambda task, step: asked.append(step) or draw(task, step))
    assert module.drawn("a", 10**9).tolist() == list(range(100))
    assert len(asked) < 100


@pytest.mark.parametrize("draws", [STARTS, HELD_OUT])
def test_the_draws_that_compare_are_those_of_no_step(draws: range) -> None:
    module = make({"a": 100})
    comparing = [str(drawn(module, "a", step)) for step in draws]
    assert all(step < 0 for step in draws)
    assert len(set(comparing)) == len(comparing) == 4
    assert not set(comparing) & {str(drawn(module, "a", step)) for step in range(200)}
    assert [len(batch) for batch in module.draw("a", draws[-1])] == [16, 16]  # of the size of a step's


@pytest.mark.parametrize(("count", "half"), [(1, 1), (2, 1), (9, 4), (80, 40)])
def test_images_held_out_are_seen_by_no_step(count: int, half: int) -> None:
    module, again = make({"t": count}), make({"a": 5, "t": count})
    module.hold_out()
    again.hold_out()
    kept, seen, compared = (
        {index for step in steps for batch in drawn(module, "t", step) for index in batch}
        for steps in (HELD_OUT, range(60), STARTS)
    )
    assert len(kept) == half
    assert kept | seen == set(range(count)) == set(module.drawn("t", 60).tolist())
    assert kept == seen if count == 1 else not kept & seen
    assert compared & kept
    assert compared & seen  # what is not learned is compared on all images
    assert all(drawn(module, "t", step) == drawn(again, "t", step) for step in range(-8, 4))


@pytest.mark.parametrize(("per_batch", "batches", "expected"), [(16, 2, 4), (100, 1, 1), (101, 1, 1), (33, 1, 4)])
def test_a_pass_takes_as_many_steps_as_the_largest_task_needs(per_batch: int, batches: int, expected: int) -> None:
    assert make(images_per_batch=per_batch, batches_per_step=batches).steps_per_pass == expected


# Under a Trainer


class Recorder(pl.LightningModule):
    """Notes the images of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict, batch_idx: int) -> None:
        self.seen.append(numbers(batch["images"]["a"]))
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning")
def test_a_trainer_gets_the_steps_in_order() -> None:
    recorder, module = Recorder(), make({"a": 100})
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=4,
    )
    trainer.fit(recorder, datamodule=module)
    assert recorder.seen == [numbers(module.batch(step)["images"]["a"]) for step in range(4)]


def test_batches_without_a_trainer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"TaskImages\.batch\(step\)"):
        next(iter(make().train_dataloader()))


# Splits


def split(count: int, task: str = "t", **options: object) -> tuple[list[int], list[int]]:
    options = {"adapt": "all", "split_seed": 0, "fraction": 1.0} | options
    learn, score = split_indices(count, task, **options)  # type: ignore[arg-type]
    return learn.tolist(), score.tolist()


@given(count=st.integers(2, 200), split_seed=st.integers(0, 9))
def test_halves_are_disjoint_and_cover(count: int, split_seed: int) -> None:
    learn, score = split(count, adapt="half", split_seed=split_seed)
    assert sorted(learn + score) == list(range(count))
    assert len(learn) - len(score) in (0, 1)
    assert learn == sorted(learn)
    assert score == sorted(score)
    assert split(count, adapt="half", split_seed=split_seed) == (learn, score)


@given(count=st.integers(1, 200))
def test_all_is_all(count: int) -> None:
    assert split(count) == (list(range(count)), list(range(count)))


def test_halves_differ_by_split_seed_and_task_and_not_by_anything_else() -> None:
    first = split(100, adapt="half")
    assert first != split(100, adapt="half", split_seed=1)
    assert first != split(100, adapt="half", task="u")
    torch.manual_seed(5)
    assert first == split(100, adapt="half")
    assert first[1] == split(100, adapt="half", fraction=0.1)[1]


def test_halves_look_random() -> None:
    learn, _ = split(1000, adapt="half")
    assert 200 < sum(index < 500 for index in learn) < 300


FRACTIONS = ["0.001", "0.01", "0.05", "0.07", "0.1", "0.14", "0.28", "0.5", "0.55", "0.57", "1"]


@given(count=st.integers(2, 3000), fraction=st.sampled_from(FRACTIONS), adapt=st.sampled_from(["all", "half"]))
def test_a_fraction_keeps_its_ceiling(count: int, fraction: str, adapt: str) -> None:
    full, score = split(count, adapt=adapt)
    learn, score_too = split(count, adapt=adapt, fraction=float(fraction))
    assert len(learn) == ceil(Fraction(fraction) * len(full))
    assert set(learn) <= set(full)
    assert score_too == score


def test_a_fraction_of_a_hundred_is_a_percentage() -> None:
    # 0.07 · 100 is a little above 7 in binary; seven per cent of a hundred images are seven.
    assert len(split(100, fraction=0.07)[0]) == 7


def test_a_larger_fraction_keeps_what_a_smaller_one_kept() -> None:
    assert set(split(1000, fraction=0.01)[0]) < set(split(1000, fraction=0.05)[0])


def test_images_per_task_keeps_as_many_at_most_and_scores_as_many_as_before() -> None:
    full, score = split(100, adapt="half")
    for limit, expected in ((1, 1), (7, 7), (50, 50), (1000, 50)):
        learn, score_too = split(100, adapt="half", images_per_task=limit)
        assert len(learn) == expected
        assert set(learn) <= set(full)
        assert learn == sorted(learn)
        assert score_too == score


def test_more_images_per_task_keep_what_fewer_kept() -> None:
    few, more = (set(split(1000, images_per_task=limit)[0]) for limit in (10, 20))
    assert few < more
    assert max(more) > 500  # drawn from everywhere, not from the front


def test_images_per_task_cuts_what_the_fraction_leaves() -> None:
    assert len(split(100, fraction=0.05, images_per_task=10)[0]) == 5
    assert len(split(100, fraction=0.5, images_per_task=10)[0]) == 10
    assert set(split(100, fraction=0.5, images_per_task=10)[0]) == set(split(100, images_per_task=10)[0])


@pytest.mark.parametrize("limit", [0, -3])
def test_no_images_per_task_are_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.images_per_task is null or at least 1, found {limit}"):
        split(10, images_per_task=limit)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.fraction lies in \(0, 1\], found"):
        split(10, fraction=fraction)


def test_another_word_than_all_and_half_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.adapt is 'all' or 'half', found 'third'"):
        split(10, adapt="third")


def test_a_single_image_cannot_be_halved() -> None:
    with pytest.raises(DataError, match=r"task 't' has too few images \(1\).*data\.adapt=all"):
        split(1, adapt="half")


# The generator


@pytest.mark.parametrize(
    ("left", "right"), [(("a", 1, 2), ("a", 2, 1)), (("a", 12), ("a", 1, 2)), (("a1", 2), ("a", 12)), ((1,), ("1",))]
)
def test_generators_of_different_parts_differ(left: Sequence[object], right: Sequence[object]) -> None:
    def draw(parts: Sequence[object]) -> list[int]:
        return torch.randint(1 << 40, (4,), generator=generator_for(*parts)).tolist()

    assert draw(left) == draw(left)
    assert draw(left) != draw(right)
