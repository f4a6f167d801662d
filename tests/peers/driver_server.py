"""What the drivers share: jobs come in a line each, models lie in folders; for a peer's Python, without adamerge.

A job is a JSON object ``{"folder", "method", "options"}``. Of the folder's files ``NAME_K.safetensors`` those named
``expert`` are the experts, tasks 0, 1, …; others are what a method is given besides. The merged weights are written
beside them, and the answer is a line ``{"error"}``. The first line of all is the library's version.
"""

import json
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
Merge = Callable[[str, State, list[State], dict[str, Any], dict[str, list[State]]], State]
"""``(method, pretrained, experts, options, what else is given, by name) → merged``."""


def serve(library: str, merge: Merge) -> None:
    """Answer jobs until there are no more. What the library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    print(version(library), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"error": _error(line, merge)}), file=answers, flush=True)


def _error(line: str, merge: Merge) -> str | None:
    """What went wrong in doing the job, if anything did."""
    job = json.loads(line)
    folder = Path(job["folder"])
    try:
        given: dict[str, list[State]] = defaultdict(list)
        for file in sorted(folder.glob("*_?.safetensors")):
            given[file.stem[:-2]].append(load_file(file))
        experts = given.pop("expert")
        merged = merge(job["method"], load_file(folder / "pretrained.safetensors"), experts, job["options"], given)
        merged = {key: tensor.detach().contiguous() for key, tensor in merged.items()}
        save_file(merged, folder / "merged.safetensors")
    except Exception:
        return traceback.format_exc()
    return None
