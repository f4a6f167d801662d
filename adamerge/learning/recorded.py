"""A step's work on a GPU, recorded once and launched as a whole.

A small network's step is thousands of kernels that take microseconds each: the host needs longer to launch them than
the device to run them. A recording (CUDA graph) is one launch.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Recorded:
    """``function`` of tensors on a CUDA device, computed as it stands at first, then from a recording.

    For every set of shapes and dtypes the first two calls run the function, the third records it, and from there on
    arguments are copied into the recording's own and results lie in its memory until the next call. The function must
    do the same work for the same shapes. One that waits for the device, which the second call finds out, or that cannot
    be recorded for another reason, is run as it stands.

    Args:
        function: Of nested dicts, lists and tuples of tensors; gives a tuple of tensors, without a graph.
        device: Where they lie.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self._function = function
        self._stream = torch.cuda.Stream(device)
        self._recordings: dict[tuple, _Recording | int] = {}
        self._works = True

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        if not self._works:
            return self._function(*arguments)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(arguments))
        found = self._recordings.get(shapes, 0)  # or how often the function has run
        try:
            if found == 2:
                found = self._recordings[shapes] = _Recording(self._function, arguments, self._stream)
            elif isinstance(found, int):
                self._recordings[shapes] = found + 1
                return self._run(arguments, "error" if found else "default")
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).partition("\n")[0]
            logging.getLogger(__name__).warning("steps are launched one kernel at a time (%s)", reason)
            self._works = False
            return self._function(*arguments)
        return found(arguments)

    def _run(self, arguments: tuple, waiting: str) -> tuple[Tensor, ...]:
        """As it stands, on the stream that will record, since autograd remembers where a weight was made a leaf.

        Args:
            arguments: Of the function.
            waiting: What happens where the function waits for the device: ``default`` or ``error``.
        """
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode(waiting)
        try:
            with torch.cuda.stream(self._stream):
                results = self._function(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(self._stream)
        for tensor in results:
            tensor.record_stream(here)
        return results


class _Recording:
    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], arguments: tuple, stream: torch.cuda.Stream
    ) -> None:
        own = _copied(arguments)
        self._own = list(_tensors(own))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="relaxed"):
            self._results = function(*own)

    def __call__(self, arguments: tuple) -> tuple[Tensor, ...]:
        for own, given in zip(self._own, _tensors(arguments), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._results


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {name: _copied(part) for name, part in tree.items()}
    return type(tree)(_copied(part) for part in tree)
