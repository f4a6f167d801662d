"""Merges with mergekit's in-memory interface; run by a Python that has mergekit, see ``driver_server``.

Options are mergekit's parameters, or ``{"by_key": {key: parameters}}`` where tensors have their own. ``mask`` files
stand for what ``torch.bernoulli`` would draw, one tensor after another and per tensor one expert after another.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from driver_server import State, serve
from mergekit.merge_methods.api import merge_tensors

WITHOUT_PRETRAINED = {"linear", "slerp"}


def merge(
    method: str, pretrained: State, experts: list[State], options: dict[str, Any], given: dict[str, list[State]]
) -> State:
    models = experts if method in WITHOUT_PRETRAINED else [pretrained, *experts]
    base = None if method == "linear" else 0
    merged = {}
    for key in pretrained:
        parameters = options["by_key"][key] if "by_key" in options else options
        with _drawn([mask[key] for mask in given["mask"]]):
            merged[key] = merge_tensors(
                [model[key] for model in models], method, parameters=parameters, base_index=base
            )
    return merged


@contextmanager
def _drawn(masks: list[torch.Tensor]) -> Iterator[None]:
    """``torch.bernoulli`` gives these."""
    left = iter(masks)
    with mock.patch("torch.bernoulli", lambda probabilities: next(left).to(probabilities)):
        yield
    assert next(left, None) is None, "a mask was not asked for"


if __name__ == "__main__":
    serve("mergekit", merge)
