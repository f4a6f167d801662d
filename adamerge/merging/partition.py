"""Which coefficient scales which parameter entry."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from adamerge.bank.keys import block_of
from adamerge.errors import ConfigError

Segment = tuple[int, int, int]
"""``(start, stop, group)`` over a tensor flattened row by row."""


@dataclass(frozen=True)
class Partition:
    """A map from every entry of every mergeable tensor to one of G groups.

    Attributes:
        granularity: The rule that made it, as in the configuration.
        groups: Names of the G groups.
        segments: Per key the runs of entries that share a group; they cover the flattened tensor without overlap.
    """

    granularity: str
    groups: tuple[str, ...]
    segments: Mapping[str, tuple[Segment, ...]]

    @classmethod
    def build(cls, granularity: str, shapes: Mapping[str, tuple[int, ...]]) -> "Partition":
        """Partition the tensors of ``shapes``.

        Args:
            granularity: ``task`` (one group), ``tensor`` (one per tensor, the field's "layer-wise"), ``block`` (one per
                transformer block, one for the embeddings, one for the output side) or ``chunk(n)`` (each tensor,
                flattened row by row, in n contiguous runs whose lengths differ by at most one; a tensor of fewer than n
                entries gets one group per entry).
            shapes: Shape by key; the order decides the order of groups.

        Raises:
            ConfigError: If the granularity is unknown.
        """
        if match := re.fullmatch(r"chunk\((\d+)\)", granularity):
            if int(match[1]) < 1:
                raise ConfigError("granularity chunk(n) needs n ≥ 1.")
            return cls._chunks(granularity, shapes, int(match[1]))
        if granularity not in _GROUP_OF:
            raise ConfigError(f"unknown granularity '{granularity}'. Choose task, tensor, block or chunk(n).")
        names = {key: _GROUP_OF[granularity](key) for key in shapes}
        groups = tuple(sorted(dict.fromkeys(names.values()), key=_depth) if granularity == "block" else names.values())
        groups = tuple(dict.fromkeys(groups))
        index = {name: group for group, name in enumerate(groups)}
        return cls(granularity, groups, {key: ((0, prod(shapes[key]), index[names[key]]),) for key in shapes})

    @classmethod
    def _chunks(cls, granularity: str, shapes: Mapping[str, tuple[int, ...]], count: int) -> "Partition":
        groups: list[str] = []
        segments: dict[str, tuple[Segment, ...]] = {}
        for key, shape in shapes.items():
            size = prod(shape)
            pieces = min(count, size)
            bounds = [size * piece // pieces for piece in range(pieces + 1)]
            first = len(groups)
            segments[key] = tuple((bounds[i], bounds[i + 1], first + i) for i in range(pieces))
            groups += [f"{key}[{i}]" for i in range(pieces)]
        return cls(granularity, tuple(groups), segments)

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``from_json`` turns back into an equal partition."""
        segments = {key: [list(segment) for segment in runs] for key, runs in self.segments.items()}
        return {"granularity": self.granularity, "groups": list(self.groups), "segments": segments}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Partition":
        segments = {key: tuple((a, b, g) for a, b, g in runs) for key, runs in data["segments"].items()}
        return cls(data["granularity"], tuple(data["groups"]), segments)


_GROUP_OF: dict[str, Callable[[str], str]] = {"task": lambda key: "all", "tensor": lambda key: key, "block": block_of}


def _depth(block: str) -> tuple[int, int]:
    if block.startswith("block."):
        return 1, int(block.removeprefix("block."))
    return (0 if block == "embedding" else 2), 0
