"""Zero-shot heads by the rule of SPECS C3, in one pass, cached by content."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from adamerge.errors import CheckpointError, ConfigError
from adamerge.models.heads import zero_shot_heads
from adamerge.models.protocol import ClipModel

PROMPTS = {
    "pets": (("guinea_pig", "cat"), ("a photo of a {}.", "{} and {}")),
    "wild": (("cat", "wolf", "bear"), ("a photo of a {}.",)),
}


@dataclass
class Words:
    """A text tower that gives every text a direction of its own."""

    logit_scale: float = 20.0
    text_hash: str = "tower"
    calls: list[list[str]] = field(default_factory=list)
    vector_of: dict[str, Tensor] = field(default_factory=dict)

    def encode_text(self, texts: Sequence[str], *, device: torch.device | str = "cpu") -> Tensor:
        self.calls.append(list(texts))
        for text in texts:
            generator = torch.Generator().manual_seed(sum(map(ord, text)))
            vector = torch.randn(5, generator=generator)
            self.vector_of[text] = vector / vector.norm()
        return torch.stack([self.vector_of[text] for text in texts])


def heads_of(words: Words, prompts: dict = PROMPTS, cache_dir: Path | None = None) -> dict[str, Tensor]:
    return zero_shot_heads(cast(ClipModel, words), prompts, cache_dir)


def test_average_of_templates_times_scale() -> None:
    words = Words()
    heads = heads_of(words)
    first, second = words.vector_of["a photo of a guinea pig."], words.vector_of["guinea pig and guinea pig"]
    mean = (first + second) / 2
    torch.testing.assert_close(heads["pets"][0], 20 * mean / mean.norm())
    torch.testing.assert_close(heads["wild"][1], 20 * words.vector_of["a photo of a wolf."])
    torch.testing.assert_close(heads["pets"].norm(dim=-1), torch.full((2,), 20.0))
    assert {task: tuple(head.shape) for task, head in heads.items()} == {"pets": (2, 5), "wild": (3, 5)}
    assert {head.dtype for head in heads.values()} == {torch.float32}


def test_one_pass_over_distinct_texts() -> None:
    words = Words()
    heads_of(words)
    (texts,) = words.calls
    assert len(texts) == len(set(texts)) == 6  # "a photo of a cat." serves both tasks


def test_braces_other_than_the_place_are_kept() -> None:
    words = Words()
    heads_of(words, {"odd": (("cat",), ("{a} {} {0}",))})
    assert words.calls == [["{a} cat {0}"]]


class TestCache:
    def test_second_time_from_files(self, tmp_path: Path) -> None:
        words = Words()
        first = heads_of(words, cache_dir=tmp_path)
        second = heads_of(words, cache_dir=tmp_path)
        assert len(words.calls) == 1
        assert list(second) == list(PROMPTS)
        assert all(torch.equal(first[task], second[task]) for task in first)
        assert len(list((tmp_path / "heads").glob("*.safetensors"))) == 2

    def test_only_what_is_missing_is_encoded(self, tmp_path: Path) -> None:
        words = Words()
        heads_of(words, {"wild": PROMPTS["wild"]}, tmp_path)
        heads_of(words, cache_dir=tmp_path)
        assert sorted(words.calls[1]) == sorted(
            ["a photo of a guinea pig.", "guinea pig and guinea pig", "a photo of a cat.", "cat and cat"]
        )

    @pytest.mark.parametrize("change", ["tower", "classes", "templates", "order"])
    def test_every_change_is_computed(self, tmp_path: Path, change: str) -> None:
        names, templates = PROMPTS["wild"]
        heads_of(Words(), {"wild": (names, templates)}, tmp_path)
        words = Words(text_hash="other" if change == "tower" else "tower")
        names = {"classes": (*names, "fox"), "order": names[::-1]}.get(change, names)
        heads_of(words, {"wild": (names, ("{}",) if change == "templates" else templates)}, tmp_path)
        assert len(words.calls) == 1

    def test_damaged_files_are_made_again(self, tmp_path: Path) -> None:
        expected = heads_of(Words(), cache_dir=tmp_path)
        for file in (tmp_path / "heads").iterdir():
            file.write_bytes(b"")
        found = heads_of(Words(), cache_dir=tmp_path)
        assert all(torch.equal(found[task], expected[task]) for task in expected)


def test_missing_names_and_templates() -> None:
    with pytest.raises(ConfigError, match="task 'odd' has no class names"):
        heads_of(Words(), {"odd": ((), ("{}",))})
    with pytest.raises(ConfigError, match="task 'odd' has no templates"):
        heads_of(Words(), {"odd": (("cat",), ())})


def test_not_finite() -> None:
    class Broken(Words):
        def encode_text(self, texts: Sequence[str], *, device: torch.device | str = "cpu") -> Tensor:
            return torch.full((len(texts), 5), torch.nan)

    with pytest.raises(CheckpointError, match="text tower gives NaN or Inf"):
        heads_of(Broken())
