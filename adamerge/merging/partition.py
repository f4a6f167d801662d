"""Which coefficient scales which parameter entry."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from adamerge.bank.keys import block_of
from adamerge.bank.storage import row_count
from adamerge.errors import ConfigError

Segment = tuple[int, int, int]
"""``(start, stop, group)`` over a tensor flattened row by row."""


class Segments(tuple[Segment, ...]):
    """Runs of entries that share a group; they cover a flattened tensor without overlap.

    Attributes:
        plans: What kernels worked out from them, to be looked up again.
    """

    plans: dict[Any, Any]

    def __new__(cls, segments: Any) -> "Segments":
        made = super().__new__(cls, segments)
        made.plans = {}
        return made


@dataclass(frozen=True)
class Scattered:
    """Groups drawn at random, entry by entry: a function of seed, key and position, so that no map need be kept.

    Attributes:
        size: Entries of the tensor.
        first: The first of its groups.
        count: How many groups it has.
        seed: Of the draw.
        key: The tensor's.
    """

    size: int
    first: int
    count: int
    seed: int
    key: str

    def groups(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Groups of entries ``start`` to ``stop``, int64 (stop - start,), equally likely each.

        The position is mixed by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014), the same on every device.
        """
        mixed = torch.arange(start, stop, dtype=torch.int64, device=device) * -0x61C8864680B583EB + self.salt
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            mixed = (mixed ^ _shift(mixed, shift)) * factor
        return self.first + _shift(mixed ^ _shift(mixed, 31), 32) % self.count

    @property
    def salt(self) -> int:
        """What positions are mixed with, of 56 bits."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{self.key}".encode()).digest()[:7], "big")


def _shift(values: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Partition:
    """A map from every entry of every mergeable tensor to one of G groups.

    Attributes:
        granularity: The rule that made it, as in the configuration.
        groups: Names of the G groups.
        segments: By key, of tensors whose groups are runs of entries.
        scattered: By key, of tensors whose groups are drawn at random.
    """

    granularity: str
    groups: tuple[str, ...]
    segments: Mapping[str, Segments]
    scattered: Mapping[str, Scattered] = field(default_factory=dict)

    @classmethod
    def build(cls, granularity: str, shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> "Partition":
        """Partition the tensors of ``shapes``.

        Args:
            granularity: ``task`` (one group), ``tensor`` (one per tensor, the field's "layer-wise"), ``block`` (one per
                transformer block, one for the embeddings, one for the output side) or ``chunk(n)`` (each tensor,
                flattened row by row, in n contiguous runs whose lengths differ by at most one; a tensor of fewer than n
                entries gets one group per entry), ``row`` (one per row of a matrix, which is an output channel; a
                tensor of one dimension is a single row), ``random(n)`` (n groups per tensor, drawn entry by entry) or
                ``matrices(n)`` (the same for tensors of two dimensions, one group for any other).
            shapes: Shape by key; the order decides the order of groups.
            seed: Of the random groups.

        Raises:
            ConfigError: If the granularity is unknown.
        """
        if match := re.fullmatch(r"(chunk|random|matrices)\((\d+)\)", granularity):
            if int(match[2]) < 1:
                raise ConfigError(f"granularity {match[1]}(n) needs n ≥ 1.")
            counts = {key: min(int(match[2]), prod(shape)) for key, shape in shapes.items()}
            if match[1] == "matrices":
                counts |= {key: 1 for key, shape in shapes.items() if len(shape) != 2}
            if match[1] == "chunk":
                return cls.in_chunks(granularity, shapes, counts)
            return cls._scatter(granularity, shapes, counts, seed)
        if granularity == "row":
            return cls.in_chunks(granularity, shapes, {key: row_count(shape) for key, shape in shapes.items()})
        if granularity not in _GROUP_OF:
            raise ConfigError(
                f"unknown granularity '{granularity}'. "
                "Choose task, block, tensor, row, chunk(n), random(n) or matrices(n)."
            )
        names = {key: _GROUP_OF[granularity](key) for key in shapes}
        groups = tuple(sorted(dict.fromkeys(names.values()), key=_depth) if granularity == "block" else names.values())
        groups = tuple(dict.fromkeys(groups))
        index = {name: group for group, name in enumerate(groups)}
        return cls(granularity, groups, {key: Segments([(0, prod(shapes[key]), index[names[key]])]) for key in shapes})

    @classmethod
    def in_chunks(
        cls, granularity: str, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]
    ) -> "Partition":
        """Each tensor, flattened row by row, in its own number of contiguous runs of (nearly) equal length.

        Args:
            granularity: What to call the result.
            shapes: Shape by key.
            counts: Runs by key, from 1 to the tensor's size.
        """
        groups: list[str] = []
        segments: dict[str, Segments] = {}
        for key, shape in shapes.items():
            size, pieces, first = prod(shape), counts[key], len(groups)
            bounds = [size * piece // pieces for piece in range(pieces + 1)]
            segments[key] = Segments((bounds[i], bounds[i + 1], first + i) for i in range(pieces))
            groups += _numbered(key, pieces)
        return cls(granularity, tuple(groups), segments)

    @classmethod
    def _scatter(
        cls, granularity: str, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int], seed: int
    ) -> "Partition":
        groups: list[str] = []
        segments: dict[str, Segments] = {}
        scattered: dict[str, Scattered] = {}
        for key, shape in shapes.items():
            if counts[key] == 1:
                segments[key] = Segments([(0, prod(shape), len(groups))])
            else:
                scattered[key] = Scattered(prod(shape), len(groups), counts[key], seed, key)
            groups += _numbered(key, counts[key])
        return cls(granularity, tuple(groups), segments, scattered)

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    def of(self, key: str) -> Segments | Scattered:
        """The groups of one tensor's entries."""
        return self.segments[key] if key in self.segments else self.scattered[key]

    @property
    def sizes(self) -> dict[str, int]:
        """Entries by key of the tensors that it covers."""
        return {key: runs[-1][1] for key, runs in self.segments.items()} | {
            key: scattered.size for key, scattered in self.scattered.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``from_json`` turns back into an equal partition."""
        data: dict[str, Any] = {
            "granularity": self.granularity,
            "groups": list(self.groups),
            "segments": {key: [list(segment) for segment in runs] for key, runs in self.segments.items()},
        }
        if self.scattered:
            data["scattered"] = {key: [s.size, s.first, s.count, s.seed] for key, s in self.scattered.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Partition":
        segments = {key: Segments((a, b, g) for a, b, g in runs) for key, runs in data["segments"].items()}
        scattered = {key: Scattered(n, g, m, s, key) for key, (n, g, m, s) in data.get("scattered", {}).items()}
        return cls(data["granularity"], tuple(data["groups"]), segments, scattered)


def _numbered(key: str, count: int) -> list[str]:
    """Names of a tensor's groups; a tensor with a single one lends it its own name."""
    return [f"{key}[{i}]" for i in range(count)] if count > 1 else [key]


_GROUP_OF: dict[str, Callable[[str], str]] = {"task": lambda key: "all", "tensor": lambda key: key, "block": block_of}


def _depth(block: str) -> tuple[int, int]:
    if block.startswith("block."):
        return 1, int(block.removeprefix("block."))
    return (0 if block == "embedding" else 2), 0
