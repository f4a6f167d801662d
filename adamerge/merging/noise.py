"""Random numbers that depend on a name and a position alone, the same on every device and after any interruption."""

import hashlib

import torch
from torch import Tensor


def random_words(name: str, start: int, stop: int, device: torch.device | str) -> Tensor:
    """32 random bits for each of the positions ``start`` to ``stop`` of the stream ``name``, int32 (stop - start,).

    Two positions share an output of SplitMix64 (Steele et al., OOPSLA 2014).

    Args:
        name: SHA-256 makes the stream's start of it.
        start: Even.
        stop: Above ``start``.
        device: Where to draw.
    """
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    words = torch.arange(start // 2, (stop + 1) // 2, dtype=torch.int64, device=device)
    words.mul_(-0x61C8864680B583EB).add_(salt)
    for bits, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        words.bitwise_xor_((words >> bits).bitwise_and_((1 << (64 - bits)) - 1)).mul_(factor)
    return words.view(torch.int32)[: stop - start]


def uniform(name: str, count: int, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Odd multiples of 2⁻²⁴ between 0 and 1, equally likely each, (count,) in ``dtype``, float32 or wider."""
    found = torch.empty(count, device=device, dtype=dtype)
    for start, part in _blocks(found):
        part.copy_((random_words(name, start, start + len(part), device) >> 9).bitwise_and_(0x7FFFFF))
    return found.add_(0.5).mul_(2.0**-23)


def rounded(name: str, values: Tensor) -> Tensor:
    """float32 to bfloat16, up or down at random, so that the mean over draws is the value itself."""
    words = values.contiguous().view(torch.int32).flatten().clone()
    for start, part in _blocks(words):
        part.add_(random_words(name, start, start + len(part), values.device).bitwise_and_(0xFFFF))
    return words.bitwise_and_(-0x10000).view(torch.float32).view(values.shape).to(torch.bfloat16)


def _blocks(values: Tensor) -> list[tuple[int, Tensor]]:
    """Pieces with their starts: on the CPU as long as a core's cache holds."""
    length = 1 << (15 if values.device.type == "cpu" else 22)
    return [(index * length, part) for index, part in enumerate(values.split(length))]
