"""Which entries of a state dict are merged, and which block of the network an entry belongs to."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from adamerge.errors import ConfigError

TOWER = "visual."
"""Prefix of the image tower: the only part of a CLIP that is merged."""

_BLOCK = re.compile(r"\.(?:resblocks|blocks|layers|layer)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:patch_embed|embeddings|norm_pre|ln_pre|pre_layrnorm)\.")
_OUTPUT = re.compile(r"(?:^|\.)(?:ln_post|post_layernorm|proj|head|norm|attn_pool|fc_norm)(?:$|\.)")


def select_keys(keys: Iterable[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """The ``keys`` that match a shell pattern of ``include`` (all, when empty) and none of ``exclude``, in order.

    Raises:
        ConfigError: If a pattern matches no key, or nothing is left to merge.
    """
    keys = tuple(keys)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise ConfigError(
                f"the pattern '{pattern}' of model.include/model.exclude matches none of the model's {len(keys)} "
                f"mergeable keys. They look like '{keys[0] if keys else 'visual.…'}'."
            )
    chosen = tuple(
        key
        for key in keys
        if (not include or any(fnmatchcase(key, pattern) for pattern in include))
        and not any(fnmatchcase(key, pattern) for pattern in exclude)
    )
    if not chosen:
        raise ConfigError("model.include and model.exclude leave nothing to merge. Loosen the patterns.")
    return chosen


def block_of(key: str) -> str:
    """``block.i`` for an entry of transformer block i, else ``embedding`` (before the blocks) or ``output`` (after)."""
    if match := _BLOCK.search(key):
        return f"block.{int(match[1])}"
    return "output" if _OUTPUT.search(key) and not _EMBEDDING.search(key) else "embedding"
