"""A statistic of every expert of a problem: computed once, kept by content, read tensor by tensor."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import adamerge
from adamerge.bank import hash_tensors
from adamerge.errors import ConfigError
from adamerge.files import atomic_file, sha256_file
from adamerge.methods import Statistic
from adamerge.tasks.datamodule import split_indices
from adamerge.tasks.problem import Problem


@dataclass(frozen=True)
class Expert:
    """One expert and its own task's images.

    Attributes:
        task: The task's name.
        network: Images, uint8 or normalised floats (B, 3, H, W), to features (B, d), by the expert's weights; frozen,
            on ``device``. A statistic may change it (hooks, requires_grad) and puts it back.
        head: Zero-shot head (C, d), logit scale included, on ``device``.
        images: uint8 (N, 3, H, W) on the CPU; None for a statistic that needs none.
        labels: int64 (N,); None unless the statistic needs them.
        keys: Names of the tensors that are merged; of some of them, where a method asks for no more.
        device: Where to compute.
        precision: As Lightning's Trainer takes it.
        batch_size: Images per forward pass where nothing else decides.
    """

    task: str
    network: nn.Module
    head: Tensor
    images: Tensor | None
    labels: Tensor | None
    keys: tuple[str, ...]
    device: torch.device
    precision: str
    batch_size: int


def gather(
    statistic: Statistic,
    problem: Problem,
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
    seed: int,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
    replaced: Mapping[str, Tensor] | None = None,
    keys: Iterable[str] | None = None,
) -> Mapping[str, Tensor]:
    """The statistic of every expert, (K, …) by name.

    What is computed lies in the problem's cache by the content that it depends on (weights, images, options, code), one
    file per expert, and is read from there; a file that is damaged is computed anew. Peak memory is one expert and one
    expert's statistic.

    Args:
        statistic: What to compute.
        problem: Experts and images: those to adapt on, or of the labelled split where labels are needed.
        device: Where to compute.
        precision: As Lightning's Trainer takes it.
        batch_size: Images per forward pass.
        seed: Of the choice of images.
        track: Wraps the loop over tasks.
        replaced: Tensors that take the place of every expert's own. What is then computed is not kept.
        keys: Names of the tensors that it is wanted for; all that are merged by default.

    Returns:
        ``Kept``, unless something is replaced.

    Raises:
        ConfigError: If the statistic is to be of no images.
        DataError: If labels are needed and missing.
    """
    if statistic.images_per_task is not None and statistic.images_per_task < 1:
        raise ConfigError(f"images_per_task of a statistic is null or at least 1, found {statistic.images_per_task}.")
    bank, clip = problem.bank, problem.clip
    network = deepcopy(clip.image_encoder).to(device)
    parameters = dict(network.named_parameters())
    labelled = problem.labelled() if statistic.needs == "labels" else {}
    wanted = tuple(bank.pretrained if keys is None else keys)
    described, code = statistic.to_json(), [_code_version(), _source_hash(type(statistic))]
    files, found = {}, []
    for task in track(bank.task_names):
        weights = {**bank.expert(task), **(replaced or {})}
        with torch.no_grad():
            for key, tensor in weights.items():
                parameters[key].copy_(tensor)
        del weights
        images, labels, identity = _images(statistic, problem, task, labelled, seed)
        expert = Expert(
            task,
            network,
            problem.heads[task].to(device),
            images,
            labels,
            wanted,
            device,
            precision,
            batch_size,
        )
        if replaced is not None:
            found.append({name: value.cpu() for name, value in statistic(expert).items()})
            continue
        parts = {
            "statistic": described,
            "task": task,
            "keys": wanted,
            "weights": hash_tensors(parameters),
            "head": hash_tensors({"head": expert.head}),
            "images": identity,
            "preprocessing": clip.preprocess_cfg,
            "precision": precision,
            "device": device.type,
            "code": code,
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
        file = problem.cache_dir / "statistics" / f"{digest}.safetensors"
        if not _is_whole(file):
            values = {name: value.detach().cpu().contiguous() for name, value in statistic(expert).items()}
            with atomic_file(file) as temporary:
                save_file(values, temporary, metadata={"content": hash_tensors(values)})
            del values
        files[task] = file
    if replaced is not None:
        return {name: torch.stack([of_task[name] for of_task in found]) for name in found[0]}
    return Kept(described, files)


def _images(
    statistic: Statistic, problem: Problem, task: str, labelled: Mapping, seed: int
) -> tuple[Tensor | None, Tensor | None, str]:
    """Images, labels and what identifies them."""
    if statistic.needs == "nothing":
        return None, None, ""
    split = labelled[task] if statistic.needs == "labels" else problem.unlabeled[task]
    rows = torch.arange(len(split.images)) if statistic.needs == "labels" else problem.adapt_indices[task]
    chosen, _ = split_indices(
        len(rows), task, adapt="all", split_seed=seed, fraction=1, images_per_task=statistic.images_per_task
    )
    rows = rows[chosen]
    labels = split.labels[rows] if statistic.needs == "labels" and split.labels is not None else None
    return split.images[rows], labels, f"{split.key} {hash_tensors({'rows': rows})}"


class Kept(Mapping[str, Tensor]):
    """A statistic of K experts, (K, …) by name, out of one file each, which are mapped into memory.

    Args:
        described: Its name and options.
        files: By task, in order.
    """

    def __init__(self, described: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        self._described, self._paths = described, files
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(safe_open(file, framework="pt")) for file in files.values()]
        self._names = list(self._files[0].keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return torch.stack([file.get_tensor(name) for file in self._files])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def to_json(self) -> dict[str, Any]:
        """Name, options, and each task's file with its SHA-256: what a run keeps of where its merge comes from."""
        files = {task: {"file": str(file), "sha256": sha256_file(file)} for task, file in self._paths.items()}
        return {"statistic": dict(self._described), "files": files}


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            return (opened.metadata() or {}).get("content") == hash_tensors(values)
    except (SafetensorError, OSError):  # never computed, or damaged
        return False


def _source_hash(kind: type) -> str:
    """SHA-256 of the file that defines a statistic, which may lie outside this package."""
    try:
        source = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # defined in a notebook or at a prompt
        source = None
    return sha256_file(Path(source)) if source and Path(source).is_file() else ""


@cache
def _code_version() -> str:
    """SHA-256 over the sources that a statistic depends on: models and statistics."""
    root = Path(adamerge.__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*root.glob("models/*.py"), *root.glob("statistics/*.py")]):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()
