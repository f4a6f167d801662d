"""DARE written down a second time (SPECS B4), with its draws; numpy, nothing of adamerge.

The draw at position i of the stream ``name`` is word i of SplitMix64 started at the first seven bytes of SHA-256 of the
name: the top 23 bits of its half i mod 2, low half first, as an odd multiple of 2⁻²⁴.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def draws(name: str, count: int) -> np.ndarray:
    """Uniform numbers between 0 and 1, (count,)."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    words = []
    for index in range((count + 1) // 2):
        word = (index * 0x9E3779B97F4A7C15 + start) % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        word = word ^ word >> 31
        words += [word % 2**32, word >> 32]
    return (np.array(words[:count]) // 2**9 + 0.5) / 2**23


def dare(rows: np.ndarray, tasks: Sequence[str], key: str, drop: float, seed: int, *, shared: bool) -> np.ndarray:
    """One tensor's task vectors (K, n), dropped and rescaled; in float64."""
    names = [f"dare/{seed}/{key}" if shared else f"dare/{seed}/{key}/{task}" for task in tasks]
    masks = np.stack([draws(name, rows.shape[1]) >= drop for name in names])
    return masks * rows / (1 - drop)
