"""Both passes over τ for many tensors on a CPU, in C that is compiled when it is first needed (native.c).

It takes a second and nothing but a C compiler: ``CC`` of the environment, or ``cc``, ``gcc`` or ``clang``. A process
compiles for the CPU that it runs on and keeps nothing on disk.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

BLOCK = 4096
"""Entries of a tile at most: long streams, whose sums still lie in a core's first cache."""

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Of task vectors, as native.c numbers them."""

_TILES_OF_A_THREAD = 16
"""What is worth starting one for."""


def run(
    name: Literal["add", "contract"],
    dtype: torch.dtype,
    tiles: Tensor,
    draws: Tensor | None,
    tensors: Tensor,
    numbers: Tensor,
    num_tasks: int,
    columns: int,
) -> None:
    """One pass, in as many threads as torch uses.

    Args:
        name: Which.
        dtype: Of τ.
        tiles: (T, 5), as in ``Tiles.table``; of at most ``BLOCK`` entries, unless there are draws.
        draws: As in ``Tiles.draws``.
        tensors: (tensors, 7): addresses of output or gradient, θ₀, τ and its scales; entries, rows, whether aligned.
        numbers: float32: weights (K, G) of ``add``, sums (K, T · slots) to be written by ``contract``.
        num_tasks: K.
        columns: Of ``numbers``.

    Raises:
        RuntimeError: If there is no compiler.
        OSError: If what it made cannot be loaded.
        subprocess.CalledProcessError: If it fails.
    """
    threads = max(1, min(torch.get_num_threads(), len(tiles) // _TILES_OF_A_THREAD))
    _library(BLOCK).run(
        ctypes.c_int(("add", "contract").index(name)),
        ctypes.c_int(KINDS.index(dtype)),
        ctypes.c_int(threads),
        ctypes.c_void_p(tiles.data_ptr()),
        ctypes.c_int64(len(tiles)),
        ctypes.c_void_p(tensors.data_ptr()),
        ctypes.c_void_p(None if draws is None else draws.data_ptr()),
        ctypes.c_void_p(numbers.data_ptr()),
        ctypes.c_int64(num_tasks),
        ctypes.c_int64(columns),
    )


@cache
def _library(block: int) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC", "")) or [
        next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    ]
    if not compiler[0]:
        raise RuntimeError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "native.so")
        command = [*compiler, "-O3", "-w", "-shared", "-fPIC", "-pthread", f"-DBLOCK={block}"]
        command += [str(Path(__file__).with_suffix(".c")), "-o", str(made)]
        if subprocess.run([*command, "-march=native"], capture_output=True, check=False).returncode:
            subprocess.run([*command, "-mcpu=native"], capture_output=True, check=True)  # as other processors have it
        return ctypes.CDLL(str(made))
