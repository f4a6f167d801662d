"""What comparisons with another library need: experts, the library in a process of its own, our method, and a bound."""

import json
import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra.utils
import torch
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.cli.config import compose_config
from adamerge.methods import Context
from adamerge.methods.static.scaling import Scaled
from adamerge.methods.transforms import Dare

State = dict[str, Tensor]
WIDTH, OUTPUT = 16, 12
CONVOLUTION, MATRIX = "visual.conv1.weight", "visual.transformer.resblocks.1.mlp.c_fc.weight"


def _shapes() -> dict[str, tuple[int, ...]]:
    """Of an image tower of open_clip with two blocks."""
    norms = {f"visual.{name}.{kind}": (WIDTH,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    found = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (5, WIDTH),
        "visual.proj": (WIDTH, OUTPUT),
        "visual.conv1.weight": (WIDTH, 3, 4, 4),
        **norms,
    }
    for block in range(2):
        prefix = f"visual.transformer.resblocks.{block}"
        found |= {f"{prefix}.{name}.{kind}": (WIDTH,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        found |= {
            f"{prefix}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{prefix}.attn.in_proj_bias": (3 * WIDTH,),
            f"{prefix}.attn.out_proj.weight": (WIDTH, WIDTH),
            f"{prefix}.attn.out_proj.bias": (WIDTH,),
            f"{prefix}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"{prefix}.mlp.c_fc.bias": (4 * WIDTH,),
            f"{prefix}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            f"{prefix}.mlp.c_proj.bias": (WIDTH,),
        }
    return found


SHAPES = _shapes()


class Models(NamedTuple):
    """θ₀ and experts, float64 with entries that float32 has, too."""

    pretrained: State
    experts: list[State]


def make_models(num_tasks: int = 3, *, change: float = 0.01, common: float = 0.5) -> Models:
    """θ₀ with entries about 0.02, or 1 in norms, and experts that differ by about ``change``, partly in ``common``."""
    generator = torch.Generator().manual_seed(num_tasks)

    def draw(size: float) -> State:
        drawn = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        return {key: size * tensor for key, tensor in drawn.items()}

    pretrained = {
        key: tensor + 1 if ".ln_" in key and "weight" in key else tensor for key, tensor in draw(0.02).items()
    }
    shared = draw(change * common)
    changes = [draw(change) for _ in range(num_tasks)]
    experts = [{key: tensor + shared[key] + own[key] for key, tensor in pretrained.items()} for own in changes]
    return Models(_double(pretrained), [_double(expert) for expert in experts])


def _double(state: State) -> State:
    return {key: tensor.double() for key, tensor in state.items()}


def bank_of(models: Models, dtype: torch.dtype = torch.float64) -> ParameterBank:
    """Tasks task0, task1, …."""
    pretrained, *experts = (
        {key: tensor.to(dtype) for key, tensor in state.items()} for state in (models.pretrained, *models.experts)
    )
    named = {f"task{task}": expert for task, expert in enumerate(experts)}
    return ParameterBank.from_experts(pretrained, named, list(pretrained), dtype=dtype)


def with_first_at(models: Models, key: str, value: Tensor) -> Models:
    """The first expert has ``value`` there."""
    first, *others = models.experts
    return Models(models.pretrained, [first | {key: value}, *others])


def changes(state: State, models: Models) -> State:
    """Minus θ₀."""
    return {key: tensor - models.pretrained[key] for key, tensor in state.items()}


def ours(name: str, options: Sequence[str]) -> Scaled:
    """A method of conf/method."""
    before = HydraConfig.instance().cfg
    given = [f"method.{option}" for option in options]
    config, _ = compose_config("train", [f"method={name}", "suite=folder", "suite.root=x", *given])
    HydraConfig.instance().cfg = before
    return hydra.utils.instantiate(config.method)


def masks(dare: Dare, models: Models) -> list[State]:
    """What it keeps of every expert: 1, else 0."""
    bank = bank_of(models)
    keep = replace(dare, rescale=False).fit(bank)
    kept = {key: keep(key, torch.ones_like(task_vectors)) for key, task_vectors in bank.task_vectors.items()}
    return [{key: kept[key][task] for key in kept} for task in range(bank.num_tasks)]


class PeerError(Exception):
    """What the other library raised, with its trace."""


class Peer:
    """Another library, behind one of the drivers: it is imported once.

    Args:
        python: That has the library.
        driver: A script beside this file.
        folder: For the models' files.
    """

    def __init__(self, python: Path, driver: str, folder: Path) -> None:
        self._folder, self._errors = folder, (folder / "stderr.txt").open("w")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        script = Path(__file__).with_name(driver)
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=folder,
        )
        self.version = self._read()

    def merge(self, method: str, models: Models, options: Mapping[str, Any], **given: list[State]) -> State:
        """What the library makes of the models; ``given`` are further state dicts by task, as the driver reads them."""
        for file in self._folder.glob("*.safetensors"):
            file.unlink()
        save_file(models.pretrained, self._folder / "pretrained.safetensors")
        for name, states in (("expert", models.experts), *given.items()):
            for task, state in enumerate(states):
                contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
                save_file(contiguous, self._folder / f"{name}_{task}.safetensors")
        job = {"folder": str(self._folder), "method": method, "options": dict(options)}
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(job)}\n")
        self._process.stdin.flush()
        if error := json.loads(self._read())["error"]:
            raise PeerError(error)
        return load_file(self._folder / "merged.safetensors")

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _read(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line.strip()
        raise PeerError(f"the driver died: {(self._folder / 'stderr.txt').read_text()}")


class Pair(NamedTuple):
    """A method of ours and its options in conf/method, the peer's and its, and keys of tensors that must not agree."""

    ours: str
    options: list[str]
    theirs: str
    their_options: dict[str, Any]
    but: Collection[str] = ()


def assert_agree(
    pair: Pair, peer: Peer, models: Models, statistics: Mapping[str, Tensor] | None = None, **given: list[State]
) -> None:
    """Ours, in float64 and in float32, changes every tensor as the peer's in float64 does, to 1e-5 of that change.

    Args:
        pair: The methods. What ours would draw, where it is DARE, is what theirs draws.
        peer: The library.
        models: To merge.
        statistics: For ours.
        given: For theirs.
    """
    method = ours(pair.ours, pair.options)
    if isinstance(method.transform, Dare):
        given["mask"] = masks(method.transform, models)
    expected = peer.merge(pair.theirs, models, pair.their_options, **given)
    assert not any(torch.equal(expected[key], tensor) for key, tensor in models.pretrained.items() if "c_fc.w" in key)
    for dtype in (torch.float64, torch.float32):
        found = method(bank_of(models, dtype), Context(statistics=statistics or {}))
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        relative = differences(found, expected, models.pretrained)
        assert {key for key, value in relative.items() if not value <= 1e-5} == set(pair.but)


def differences(found: State, expected: State, pretrained: State) -> dict[str, float]:
    """By key the largest difference, beyond what rounding weights to ours' dtype makes, over the largest change."""
    assert set(found) == set(expected)
    relative = {}
    for key, tensor in expected.items():
        rounding = torch.finfo(found[key].dtype).eps * tensor.abs().max()
        beyond = (found[key].double() - tensor).abs().max() - rounding
        relative[key] = float(beyond.clamp(min=0) / (tensor - pretrained[key]).abs().max().clamp(min=1e-12))
    return relative
