"""What scripts/benchmark.py measures in processes of their own: both passes over τ, and whole optimiser steps."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from adamerge.bank import ParameterBank  # noqa: E402
from adamerge.bank.storage import DTYPES, StoredTaskVectors  # noqa: E402
from adamerge.files import scratch_file  # noqa: E402
from adamerge.learning.losses import passes  # noqa: E402
from adamerge.learning.recorded import Recorded  # noqa: E402
from adamerge.merging import Coefficients, MergedModel, Partition, contract  # noqa: E402
from adamerge.merging.fused import available  # noqa: E402
from adamerge.merging.merge import merge_into  # noqa: E402
from adamerge.models.open_clip import ImageEncoder  # noqa: E402
from adamerge.objectives import softmax_entropy  # noqa: E402

SIZES = {
    "mini": {"embed_dim": 128, "image_size": 32, "patch_size": 8, "width": 128, "layers": 6, "head_width": 32},
    "b32": {"embed_dim": 512, "image_size": 224, "patch_size": 32, "width": 768, "layers": 12, "head_width": 64},
    "l14": {"embed_dim": 768, "image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "head_width": 64},
}
CLASSES = (397, 196, 45, 10, 10, 43, 10, 47, 100, 10, 102, 37, 2, 7, 47, 10, 101, 10, 2, 10)
"""Of the field's 20 tasks, as the peer's driver has them."""


def shapes_of(size: str) -> dict[str, torch.Size]:
    """The tensors of a CLIP image tower in open_clip's layout."""
    cfg = SIZES[size]
    width, patch, tokens = cfg["width"], cfg["patch_size"], (cfg["image_size"] // cfg["patch_size"]) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (tokens, width),
        "visual.proj": (width, cfg["embed_dim"]),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    norms = ["ln_pre", "ln_post"]
    for index in range(cfg["layers"]):
        block = f"transformer.resblocks.{index}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes[f"visual.{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"visual.{block}.attn.in_proj_bias"] = (3 * width,)
        for name, (rows, columns) in {
            "attn.out_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }.items():
            shapes[f"visual.{block}.{name}.weight"] = (rows, columns)
            shapes[f"visual.{block}.{name}.bias"] = (rows,)
    for name in norms:
        shapes |= {f"visual.{name}.weight": (width,), f"visual.{name}.bias": (width,)}
    return {key: torch.Size(shape) for key, shape in shapes.items()}


def random_bank(pretrained: dict[str, Tensor], num_tasks: int, dtype: str, *, place: str = "auto") -> ParameterBank:
    """τ of the size that fine-tuning leaves, 0.002 per entry.

    Args:
        pretrained: θ₀ by key.
        num_tasks: K.
        dtype: Of τ.
        place: As ``bank.device`` has it, ``auto`` being where θ₀ is; or the folder of a mapped file, which is gone
            with the process.
    """
    shapes = {key: tensor.shape for key, tensor in pretrained.items()}
    there = next(iter(pretrained.values())).device if place == "auto" else torch.device("cpu")
    file = nullcontext() if place in ("auto", "host") else scratch_file(Path(place))
    with file as path, torch.device(there):
        task_vectors = StoredTaskVectors.empty(shapes, num_tasks, DTYPES[dtype], torch.float32, path)
    for key, shape in shapes.items():
        for task in range(num_tasks):
            task_vectors.store(key, task, 0.002 * torch.randn(shape, device=there))
    if place == "host":
        task_vectors.pin()
    return ParameterBank(pretrained, task_vectors, tuple(f"task{task}" for task in range(num_tasks)))


def timed(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds until the device is done, after a call that is not counted (three on CUDA, where it warms up)."""
    uncounted = 3 if device == "cuda" else 1
    return median([_once(call, device) for _ in range(uncounted + repeats)][uncounted:])


def _once(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; on CUDA between two events on the device, which has nothing else to do."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def recorded(call: Callable[[], object]) -> Callable[[], object]:
    """The same from a recording, as a step has it, lest the host's part be timed."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        call()
    return graph.replay


def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written a second, between two touched buffers of 1 GiB."""
    source, target = torch.ones(1 << 28, device=device), torch.zeros(1 << 28, device=device)
    return 2 * 4 * source.numel() / timed(lambda: target.copy_(source), 7, device)


def measure_passes(
    size: str, num_tasks: int, dtype: str, granularities: list[str], device: str = "cpu", kernels: str = "torch"
) -> dict:
    """Both passes: seconds, bytes a second, and the fraction of the copy bandwidth measured before and after each.

    ``kernels`` are those of ``torch``, or ours: in ``c`` on a CPU, in ``triton`` on CUDA. A bank that the device has no
    room for gives no figures.
    """
    shapes = shapes_of(size)
    parameters = sum(shape.numel() for shape in shapes.values())
    stored = num_tasks * DTYPES[dtype].itemsize
    row = {"size": size, "tasks": num_tasks, "dtype": dtype, "kernels": kernels}
    if kernels == "torch":
        os.environ["ADAMERGE_KERNELS"] = "torch"
    elif not available(torch.empty(0, device=device).device, DTYPES[dtype]):
        raise SystemExit("our kernels do not work on this device; leave them out with --kernels torch")
    if (
        device == "cuda" and (stored + 12) * parameters + (3 << 30) > torch.cuda.mem_get_info()[0]
    ):  # with copies' buffers
        return row | {"copy_bytes_per_second": copy_bandwidth(device), "partitions": {}}
    pretrained = {key: torch.randn(shape, device=device) for key, shape in shapes.items()}
    bank = random_bank(pretrained, num_tasks, dtype)
    gradients = {key: torch.randn(shape, device=device) for key, shape in shapes.items()}
    out = {key: torch.empty_like(tensor) for key, tensor in pretrained.items()}
    bandwidth = [copy_bandwidth(device)]
    figures: dict[str, dict] = {}
    for granularity in granularities:
        partition = Partition.build(granularity, bank.shapes)
        weights = torch.full((num_tasks, partition.num_groups), 0.3, device=device)
        figures[granularity] = {}
        for name, fixed, call in (
            ("merge", 8, lambda p=partition, w=weights: merge_into(out, bank, w, p)),
            ("gradient", 4, lambda p=partition: contract(bank, gradients, p)),
        ):
            seconds = timed(recorded(call) if device == "cuda" else call, 7, device)
            bandwidth.append(copy_bandwidth(device))
            speed = (stored + fixed) * parameters / seconds
            share = speed / (sum(bandwidth[-2:]) / 2)
            figures[granularity][name] = {"seconds": seconds, "bytes_per_second": speed, "of_copy_bandwidth": share}
    return row | {"copy_bytes_per_second": median(bandwidth), "partitions": figures}


def measure_step(
    size: str,
    num_tasks: int,
    batch: int,
    steps: int,
    contestant: str,
    folder: str | None = None,
    device: str = "cpu",
) -> dict:
    """Seconds of one optimiser step on random images, drawn on the device, and the peak memory of process and device.

    Resident memory counts pages of mapped files, which the system takes back at will; anonymous memory does not (it is
    looked at on a CPU only, since looking takes time from the thread that launches the work of a GPU).
    """
    network, pretrained, heads = _random_problem(size, num_tasks, device)
    side = SIZES[size]["image_size"]

    def draw() -> list[Tensor]:
        return [torch.randn(batch, 3, side, side, device=device) for _ in range(num_tasks)]

    if contestant == "reference":
        step = _reference_step(network, pretrained, heads)
    else:
        precision, dtype, *options = contestant.split("/")
        places = [option for option in options if option in ("host", "disk")]
        place = folder if places == ["disk"] and folder else (*places, "auto")[0]
        modes = [option for option in options if option not in (*places, "unrecorded")]
        bank = random_bank(pretrained, num_tasks, dtype, place=place)
        recorded = device == "cuda" and "unrecorded" not in options
        step = _our_step(network, bank, heads, precision, modes[0] if modes else None, recorded=recorded)
    memory = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: step(draw()), steps, device)
        memory["peak_device_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        with PeakAnonymous() as anonymous:
            seconds = timed(lambda: step(draw()), steps, device)
        memory["peak_anonymous_MiB"] = anonymous.peak / 1024
    memory["peak_rss_MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"sec_per_step": seconds, **memory}


def _random_problem(size: str, num_tasks: int, device: str) -> tuple[torch.nn.Module, dict[str, Tensor], list[Tensor]]:
    """An image tower, its weights by key, and a head per task."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    cfg = SIZES[size]
    tower = _build_vision_tower(cfg["embed_dim"], CLIPVisionCfg(**{k: v for k, v in cfg.items() if k != "embed_dim"}))
    network = ImageEncoder(tower, *([0.5] * 3, [0.25] * 3)).requires_grad_(False).to(device)
    heads = []
    for task in range(num_tasks):
        classes = torch.randn(CLASSES[task % len(CLASSES)], cfg["embed_dim"])
        heads.append(100 * torch.nn.functional.normalize(classes, dim=-1).to(device))
    return network, {name: value.detach() for name, value in network.named_parameters()}, heads


def measure_run(size: str, num_tasks: int, batch: int, steps: int, device: str, images_on: str) -> dict:
    """Seconds of a whole layer-wise run, with its Trainer and draws of 512 random images a task.

    ``images_on`` the ``host`` or the ``device`` the images lie.
    """
    import omegaconf  # noqa: F401  loading has imported it, which checkpoints need
    import pytorch_lightning as pl

    from adamerge.learning.fit import learn
    from adamerge.learning.losses import TaskLosses
    from adamerge.learning.schedule import Schedule
    from adamerge.objectives import Entropy
    from adamerge.tasks.datamodule import TaskImages

    network, pretrained, heads = _random_problem(size, num_tasks, device)
    bank, side = random_bank(pretrained, num_tasks, "bfloat16"), SIZES[size]["image_size"]
    images = {task: torch.randint(256, (512, 3, side, side), dtype=torch.uint8) for task in bank.task_names}
    rows = {task: torch.arange(512) for task in images}
    data = TaskImages(images, rows, images_per_batch=batch, batches_per_step=1, seed=0)
    data.on_device = images_on == "device"
    partition = Partition.build("tensor", bank.shapes)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        learned = learn(
            MergedModel(network, bank, partition),
            Coefficients(num_tasks, partition.num_groups, init=0.3, constraint="clamp"),
            TaskLosses(Entropy(), dict(zip(images, heads, strict=True)), dict.fromkeys(images, 1.0), "auto"),
            data,
            run_dir=Path(folder),
            make_trainer=partial(
                pl.Trainer,
                max_steps=steps,
                accelerator=device,
                devices=1,
                precision="bf16-mixed",
                limit_train_batches=steps,
                enable_progress_bar=False,
                enable_model_summary=False,
            ),
            optimizer=partial(torch.optim.Adam, lr=1e-3),
            schedule=Schedule(steps=steps, decay="constant", average=0, patience=0),
            resume=False,
        )
        seconds = time.perf_counter() - begin
    found = {"size": size, "tasks": num_tasks, "batch": batch, "images_on": images_on}
    return found | {"steps": learned.steps, "seconds": seconds}


class PeakAnonymous(threading.Thread):
    """The most anonymous memory of this process while inside, in KiB, looked at every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.partition("RssAnon:")[2].split()[0]))

    def __enter__(self) -> PeakAnonymous:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def _our_step(
    network: torch.nn.Module,
    bank: ParameterBank,
    heads: list[Tensor],
    precision: str,
    compiled: str | None,
    *,
    recorded: bool,
) -> Callable[[list[Tensor]], None]:
    device = heads[0].device
    partition = Partition.build("tensor", bank.shapes)
    coefficients = Coefficients(len(heads), partition.num_groups, init=0.3, constraint="clamp").to(device)
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=1e-3)
    model = MergedModel(network, bank, partition, compiled=compiled)

    def compute(value: Tensor, images: list[Tensor]) -> tuple[Tensor]:
        # One autocast for the whole step, as by Lightning, but for the losses, as by TaskLosses.
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            groups = passes({str(task): part for task, part in enumerate(images)})
            model.update(value, single_backward=len(groups) == 1)
            for group in groups:
                parts = [images[int(task)] for task in group]
                features = model(torch.cat(parts)).float()
                with torch.autocast(device.type, enabled=False):
                    features = torch.nn.functional.normalize(features, dim=-1).split([len(part) for part in parts])
                    losses = [softmax_entropy(f @ heads[int(t)].T).mean() for f, t in zip(features, group, strict=True)]
                    total = torch.stack(losses).sum()
                total.backward()
        return (model.coefficient_gradient(),)

    gradient_of = Recorded(compute, device) if recorded and model.recordable else compute

    def step(images: list[Tensor]) -> None:
        value = coefficients()
        (gradient,) = gradient_of(value.detach(), images)
        optimizer.zero_grad()
        value.backward(gradient)
        optimizer.step()

    return step


def _reference_step(
    network: torch.nn.Module, pretrained: dict[str, Tensor], heads: list[Tensor]
) -> Callable[[list[Tensor]], None]:
    from reference import layerwise

    experts = [{key: value + 0.002 * torch.randn_like(value) for key, value in pretrained.items()} for _ in heads]
    raw = torch.full((len(heads), len(pretrained)), 0.3, device=heads[0].device)
    optimizer = torch.optim.Adam([raw], lr=1e-3)

    def step(images: list[Tensor]) -> None:
        batches = [[part] for part in images]
        raw.grad = layerwise.gradient(
            network, pretrained, experts, heads, batches, raw, constraint="clamp", granularity="tensor"
        )
        optimizer.step()

    return step
