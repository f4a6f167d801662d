"""Task vectors on their way to the device that computes with them.

τ that lies elsewhere is copied piece by piece through two buffers of fixed size, so that the device needs no more
memory however many experts there are. While one buffer is being worked on, the next piece is on its way to the other:
on CUDA in a stream of its own, and out of memory that is not page-locked (a mapped file) by a thread that reads ahead.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from adamerge.bank.storage import Rows, StoredTaskVectors

BUFFER = 1 << 26
"""Bytes of a buffer; more only where a tensor of a single task needs more."""

_ALIGN = 256
"""Bytes: multiples at which tensors begin within a buffer."""

Batch = tuple[slice, Mapping[str, Rows]]
"""Which tasks, and their task vectors by key."""


def streamed(task_vectors: Mapping[str, Tensor], keys: Iterable[str], device: torch.device) -> Iterator[Batch]:
    """Task vectors on ``device``, in the order of ``keys``; of one tensor, the first tasks first.

    Args:
        task_vectors: (K, *shape) by key.
        keys: Which of them.
        device: Where they are needed.

    Yields:
        All at once where they lie there; else as many as a buffer holds, which are valid until the next are asked for.
    """
    keys = list(keys)
    if not lie_on(device, task_vectors, keys):
        yield from prefetched(task_vectors, keys, device)
    elif isinstance(task_vectors, StoredTaskVectors | dict):
        yield slice(None), {key: Rows.of(task_vectors, key).to(device) for key in keys}
    else:  # computed when they are read, so one at a time
        for key in keys:
            yield slice(None), {key: Rows.of(task_vectors, key).to(device)}


def lie_on(device: torch.device, task_vectors: Mapping[str, Tensor], keys: Iterable[str]) -> bool:
    """Whether they need not be streamed to the device; those that are computed when they are read lie anywhere."""
    return not isinstance(task_vectors, StoredTaskVectors) or all(
        task_vectors.stored(key)[0].device == device for key in keys
    )


def prefetched(task_vectors: Mapping[str, Tensor], keys: Iterable[str], device: torch.device) -> Iterator[Batch]:
    """``streamed`` for task vectors that lie elsewhere: one piece is worked on while the next is copied."""
    pieces = list(_pieces(task_vectors, keys))
    if not pieces:
        return
    size = max(sum(map(_room, rows.values())) for _, rows in pieces)
    ahead = not all(part.values.is_pinned() for _, rows in pieces for part in rows.values())
    lanes = [_Lane(size, device, staged=ahead) for _ in range(2)]
    coming: deque[Future[Mapping[str, Rows]]] = deque()
    try:
        with ThreadPoolExecutor(1) as reader:
            begin = reader.submit if ahead else _at_once
            for turn in range(len(pieces) + 1):
                if turn < len(pieces):
                    coming.append(begin(lanes[turn % 2].fill, pieces[turn][1]))
                if turn:
                    lane, rows = lanes[(turn - 1) % 2], coming.popleft().result()
                    lane.wait()
                    yield pieces[turn - 1][0], rows
                    lane.release()
    finally:
        for lane in lanes:  # its memory is given back, to be used next by the current stream
            lane.wait()


class _Lane:
    """One of the buffers: filled, waited for, worked on, released, filled again.

    Args:
        size: Bytes.
        device: Of the buffer.
        staged: Whether what is copied to CUDA passes through page-locked memory, lest the device wait for the host.
    """

    @torch.inference_mode(False)  # the thread that fills it knows nothing of the caller's modes
    def __init__(self, size: int, device: torch.device, *, staged: bool) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=True) if staged else None
            self._stream = torch.cuda.Stream(device)
            self._filled, self._free = torch.cuda.Event(), torch.cuda.Event()
            self.release()  # whatever the memory was used for comes first

    def fill(self, rows: Mapping[str, Rows]) -> Mapping[str, Rows]:
        """Begin to copy; the copies may be read after ``wait``."""
        if not self._cuda:
            return _copied(rows, self._buffer)
        if self._staging is not None:
            self._filled.synchronize()  # of the last copy out of the same memory
            rows = _copied(rows, self._staging)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free)
            here = _copied(rows, self._buffer)
            self._filled.record()
        return here

    def wait(self) -> None:
        """Let the current stream go on when the copies are there."""
        if self._cuda:
            torch.cuda.current_stream(self._buffer.device).wait_event(self._filled)

    def release(self) -> None:
        """Allow the buffer to be filled when the current stream has come to this point."""
        if self._cuda:
            self._free.record(torch.cuda.current_stream(self._buffer.device))


def _pieces(task_vectors: Mapping[str, Tensor], keys: Iterable[str]) -> Iterator[Batch]:
    """Whole tensors together as far as a buffer holds them, larger ones a few tasks at a time."""
    together: dict[str, Rows] = {}
    for key in keys:
        rows = Rows.of(task_vectors, key)
        if together and sum(map(_room, together.values())) + _room(rows) > BUFFER:
            yield slice(None), together
            together = {}
        if _room(rows) <= BUFFER:
            together[key] = rows
            continue
        at_once = max(1, BUFFER // max(map(_room, rows.split(1))))
        for number, part in enumerate(rows.split(at_once)):
            yield slice(number * at_once, number * at_once + len(part.values)), {key: part}
    if together:
        yield slice(None), together


def _room(rows: Rows) -> int:
    """Bytes of a buffer that they take."""
    return sum(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in (rows.values, rows.scales) if tensor is not None)


def _copied(batch: Mapping[str, Rows], buffer: Tensor) -> dict[str, Rows]:
    """The same in ``buffer`` (bytes)."""
    copies, start = {}, 0
    for key, rows in batch.items():
        found = []
        for tensor in (rows.values, rows.scales):
            if tensor is not None:
                place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                found.append(place.copy_(tensor, non_blocking=True))
                start += -(-tensor.nbytes // _ALIGN) * _ALIGN
        copies[key] = Rows(found[0], found[1] if rows.scales is not None else None)
    return copies


def _at_once(fill, rows: Mapping[str, Rows]) -> Future[Mapping[str, Rows]]:
    """As an executor's ``submit``, here and now."""
    future: Future[Mapping[str, Rows]] = Future()
    future.set_result(fill(rows))
    return future
