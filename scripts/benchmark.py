"""Time both passes over τ and the whole optimiser step, beside the copy bandwidth and beside FusionBench.

python scripts/benchmark.py                                   # passes and steps, a table and a JSON file
python scripts/benchmark.py --peer .peer/bin/python --peer-script ../shared/peer/fusionbench_step.py

The peer lives in an environment of its own: uv venv .peer && uv pip install --python .peer/bin/python
fusion-bench==0.2.33. Every contestant runs in a fresh process, one after another, ``--rounds`` times round; figures are
medians. Bytes of a pass are those that it cannot avoid: K·b·P of τ plus 4·P for every float32 tensor read or written.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import subprocess
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
from adamerge.learning.losses import TaskLosses, passes  # noqa: E402
from adamerge.merging import Coefficients, MergedModel, Partition, contract  # noqa: E402
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


def random_bank(
    pretrained: dict[str, Tensor], num_tasks: int, dtype: str, *, folder: str | None = None
) -> ParameterBank:
    """τ of the size that fine-tuning leaves, 0.002 per entry; in a mapped file in ``folder``, gone with the process."""
    shapes = {key: tensor.shape for key, tensor in pretrained.items()}
    file = scratch_file(Path(folder)) if folder else nullcontext()
    with file as path:
        task_vectors = StoredTaskVectors.empty(shapes, num_tasks, DTYPES[dtype], torch.float32, path)
    for key, shape in shapes.items():
        for task in range(num_tasks):
            task_vectors.store(key, task, 0.002 * torch.randn(shape))
    return ParameterBank(pretrained, task_vectors, tuple(f"task{task}" for task in range(num_tasks)))


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median seconds, after one call that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second, between two touched buffers of 1 GiB."""
    source, target = torch.ones(1 << 28), torch.zeros(1 << 28)
    return 2 * 4 * source.numel() / timed(lambda: target.copy_(source), 7)


def measure_passes(size: str, num_tasks: int, dtype: str, granularities: list[str]) -> dict:
    """Both passes, as fractions of the copy bandwidth that is measured before and after each."""
    bandwidth = [copy_bandwidth()]
    pretrained = {key: torch.randn(shape) for key, shape in shapes_of(size).items()}
    bank = random_bank(pretrained, num_tasks, dtype)
    gradients = {key: torch.randn(shape) for key, shape in shapes_of(size).items()}
    out = {key: torch.empty_like(tensor) for key, tensor in pretrained.items()}
    parameters = sum(tensor.numel() for tensor in pretrained.values())
    stored = num_tasks * DTYPES[dtype].itemsize
    rows = []
    for granularity in granularities:
        partition = Partition.build(granularity, bank.shapes)
        weights = torch.full((num_tasks, partition.num_groups), 0.3)
        figures = {}
        for name, fixed, call in (
            ("merge", 8, lambda p=partition, w=weights: merge_into(out, bank, w, p)),
            ("gradient", 4, lambda p=partition: contract(bank, gradients, p)),
        ):
            seconds = timed(call, 7)
            bandwidth.append(copy_bandwidth())
            share = (stored + fixed) * parameters / seconds / (sum(bandwidth[-2:]) / 2)
            figures[name] = {"seconds": seconds, "of_copy_bandwidth": share}
        rows.append((granularity, figures))
    return {
        "size": size,
        "tasks": num_tasks,
        "dtype": dtype,
        "copy_bytes_per_second": median(bandwidth),
        "partitions": dict(rows),
    }


def measure_step(size: str, num_tasks: int, batch: int, steps: int, contestant: str, folder: str | None = None) -> dict:
    """Seconds of one optimiser step on random images, and the peak memory of the process.

    Resident memory counts pages of mapped files, which the system takes back at will; anonymous memory does not.
    """
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    cfg = SIZES[size]
    tower = _build_vision_tower(cfg["embed_dim"], CLIPVisionCfg(**{k: v for k, v in cfg.items() if k != "embed_dim"}))
    network = ImageEncoder(tower, *([0.5] * 3, [0.25] * 3)).requires_grad_(False)
    pretrained = {name: value.detach() for name, value in network.named_parameters()}
    heads = [
        100 * torch.nn.functional.normalize(torch.randn(CLASSES[task % len(CLASSES)], cfg["embed_dim"]), dim=-1)
        for task in range(num_tasks)
    ]
    side = cfg["image_size"]

    def draw() -> list[Tensor]:
        return [torch.randn(batch, 3, side, side) for _ in range(num_tasks)]

    if contestant == "reference":
        step = _reference_step(network, pretrained, heads)
    else:
        step = _our_step(network, pretrained, heads, *contestant.split("/")[:2], folder)
    with PeakAnonymous() as anonymous:
        seconds = timed(lambda: step(draw()), steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"sec_per_step": seconds, "peak_rss_MiB": peak / 1024, "peak_anonymous_MiB": anonymous.peak / 1024}


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
    pretrained: dict[str, Tensor],
    heads: list[Tensor],
    precision: str,
    dtype: str,
    folder: str | None,
) -> Callable[[list[Tensor]], None]:
    bank = random_bank(pretrained, len(heads), dtype, folder=folder)
    partition = Partition.build("tensor", bank.shapes)
    coefficients = Coefficients(len(heads), partition.num_groups, init=0.3, constraint="clamp")
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=1e-3)
    model = MergedModel(network, bank, partition)

    def step(images: list[Tensor]) -> None:
        value = coefficients()
        groups = passes({str(task): part for task, part in enumerate(images)})
        model.update(value, single_backward=len(groups) == 1)
        for group in groups:
            parts = [images[int(task)] for task in group]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                features = model(torch.cat(parts))
            features = torch.nn.functional.normalize(features.float(), dim=-1).split([len(part) for part in parts])
            losses = [softmax_entropy(f @ heads[int(t)].T).mean() for f, t in zip(features, group, strict=True)]
            torch.stack(losses).sum().backward()
        optimizer.zero_grad()
        value.backward(model.coefficient_gradient())
        optimizer.step()

    return step


def _reference_step(
    network: torch.nn.Module, pretrained: dict[str, Tensor], heads: list[Tensor]
) -> Callable[[list[Tensor]], None]:
    from reference import layerwise

    experts = [{key: value + 0.002 * torch.randn_like(value) for key, value in pretrained.items()} for _ in heads]
    raw = torch.full((len(heads), len(pretrained)), 0.3)
    optimizer = torch.optim.Adam([raw], lr=1e-3)

    def step(images: list[Tensor]) -> None:
        batches = [[part] for part in images]
        raw.grad = layerwise.gradient(
            network, pretrained, experts, heads, batches, raw, constraint="clamp", granularity="tensor"
        )
        optimizer.step()

    return step


def measure_accuracy(suite: str, optimizer: str, seed: int, every: int) -> dict:
    """Mean accuracy of layer-wise AdaMerging after every few steps, with the seconds that learning took until then."""
    import hydra.utils
    import pytorch_lightning as pl

    from adamerge.cli.config import cache_dir, compose_config, settle
    from adamerge.cli.lightning import quiet
    from adamerge.evaluation.evaluator import Evaluator
    from adamerge.learning.fit import learn
    from adamerge.learning.schedule import Schedule
    from adamerge.tasks.datamodule import TaskImages
    from adamerge.tasks.problem import load_problem, suite_named

    quiet()
    named = ["suite=mini"] if suite == "mini" else ["suite=folder", f"suite.root='{suite}'"]
    config, _ = compose_config("train", [f"optimizer={optimizer}", *named])
    settle(config, learned=True)
    cache = cache_dir(config)
    options = {"adapt": config.data.adapt, "split_seed": config.data.split_seed, "fraction": config.data.fraction}
    options |= {"include": [], "exclude": [], "strict_dtype": True, "device": "auto", "dtype": config.bank.dtype}
    options["images_per_task"] = config.data.images_per_task
    problem = load_problem(suite_named(config.suite.name, config.suite.root, None, cache), cache_dir=cache, **options)
    partition, coefficients = hydra.utils.instantiate(config.method).prepare(problem.bank)
    model = MergedModel(problem.clip.image_encoder, problem.bank, partition)
    evaluator = Evaluator(problem, torch.device("cpu"), config.trainer.precision, config.data.eval_batch_size)
    curve: list[tuple[int, float, float]] = []

    class Scores(pl.Callback):
        def __init__(self) -> None:
            self.seconds, self.start = 0.0, time.perf_counter()

        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            self.seconds += time.perf_counter() - self.start
            if trainer.global_step % every == 0 or trainer.global_step == trainer.max_steps:
                model.update(coefficients().detach())
                scores = [score for score in evaluator(model.weights()).values() if score is not None]
                curve.append((trainer.global_step, self.seconds, sum(scores) / len(scores)))
            self.start = time.perf_counter()

    images = {task: part.images for task, part in problem.unlabeled.items()}
    sizes = {name: config.data[name] for name in ("images_per_batch", "batches_per_step")}
    with tempfile.TemporaryDirectory() as folder:
        learn(
            model,
            coefficients,
            TaskLosses(
                hydra.utils.instantiate(config.objective),
                problem.heads,
                dict.fromkeys(problem.bank.task_names, 1.0),
                config.data.fuse_tasks,
            ),
            TaskImages(images, problem.adapt_indices, seed=seed, **sizes),
            run_dir=Path(folder),
            make_trainer=partial(hydra.utils.instantiate(config.trainer), enable_progress_bar=False),
            optimizer=hydra.utils.instantiate(config.optimizer),
            schedule=Schedule(**config.schedule),
            resume=False,
            callbacks=[Scores()],
        )
    return {"curve": curve}


def compare_accuracy(arguments: argparse.Namespace) -> list[dict]:
    """Both recipes on every suite: final accuracy, and steps and seconds until 0.3 points below the paper's recipe."""
    rows = []
    for suite in arguments.accuracy_of:
        runs: dict[str, list[list]] = {}
        for seed in range(arguments.seeds):
            for optimizer in ("adam", "fast"):
                task = {"suite": suite, "optimizer": optimizer, "seed": seed, "every": 10}
                runs.setdefault(optimizer, []).append(run_alone("accuracy", task, arguments.threads)["curve"])
        goal = sum(curve[-1][2] for curve in runs["adam"]) / arguments.seeds - 0.003
        for optimizer, curves in runs.items():
            mean = [
                [sum(column) / len(curves) for column in zip(*points, strict=True)]
                for points in zip(*curves, strict=True)
            ]
            reached = next((point for point in mean if point[2] >= goal), [None, None])
            row = {"suite": Path(suite).name, "optimizer": optimizer, "seeds": arguments.seeds}
            row |= {"steps": mean[-1][0], "seconds": mean[-1][1], "accuracy": mean[-1][2]}
            rows.append(row | {"steps_to_goal": reached[0], "seconds_to_goal": reached[1]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def in_process(command: list[str]) -> dict:
    """The last line that a process prints, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_steps(arguments: argparse.Namespace) -> list[dict]:
    """Every contestant in turn, ``rounds`` times round."""
    rows = []
    contestants = list(arguments.contestants)
    for size, num_tasks in arguments.steps_of:
        found: dict[str, list[dict]] = {}
        for _ in range(arguments.rounds):
            for contestant in contestants:
                task = {"size": size, "num_tasks": num_tasks, "batch": arguments.batch, "contestant": contestant}
                task |= {"steps": arguments.steps}
                task |= {"folder": arguments.disk} if contestant.endswith("/disk") else {}
                found.setdefault(contestant, []).append(run_alone("step", task, arguments.threads))
            if arguments.peer:
                command = [arguments.peer, arguments.peer_script, "--size", size, "--tasks", str(num_tasks)]
                command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
                found.setdefault("FusionBench", []).append(in_process([*command, "--threads", str(arguments.threads)]))
        for contestant, runs in found.items():
            measured = ("sec_per_step", "peak_rss_MiB", "peak_anonymous_MiB")
            figures = {key: median(run[key] for run in runs) for key in measured if key in runs[0]}
            rows.append(
                {"size": size, "tasks": num_tasks, "batch": arguments.batch, "contestant": contestant, **figures}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def run_alone(what: str, task: dict, threads: int) -> dict:
    """``what`` in a fresh process."""
    return in_process([sys.executable, __file__, "--threads", str(threads), "--alone", what, json.dumps(task)])


def table(passes: list[dict], steps: list[dict], accuracy: list[dict]) -> str:
    """Everything in Markdown."""
    lines = ["| τ | K | partition | merge, % of copy | gradient, % of copy |", "|---|--:|---|--:|--:|"]
    for entry in passes:
        for granularity, both in entry["partitions"].items():
            share = [f"{100 * both[name]['of_copy_bandwidth']:.0f}" for name in ("merge", "gradient")]
            lines.append(
                f"| {entry['size']} {entry['dtype']} | {entry['tasks']} | {granularity} | {' | '.join(share)} |"
            )
    lines += ["", "| model | K × images | step | s / step | peak MiB | times as fast as FusionBench | of its peak |"]
    lines += ["|---|---|---|--:|--:|--:|--:|"]
    peer = {(e["size"], e["tasks"], e["batch"]): e for e in steps if e["contestant"] == "FusionBench"}
    for entry in steps:
        base = peer.get((entry["size"], entry["tasks"], entry["batch"]))
        ratio = f"{base['sec_per_step'] / entry['sec_per_step']:.2f}" if base else "–"
        memory = f"{100 * entry['peak_rss_MiB'] / base['peak_rss_MiB']:.0f} %" if base else "–"
        lines.append(
            f"| {entry['size']} | {entry['tasks']} × {entry['batch']} | {entry['contestant']} | "
            f"{entry['sec_per_step']:.3f} | {entry['peak_rss_MiB']:.0f} | {ratio} | {memory} |"
        )
    lines += ["", "| suite | recipe | seeds | steps | seconds | accuracy, % | steps to goal | seconds to goal |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    for entry in accuracy:
        goal = [f"{entry[name]:.0f}" if entry[name] else "–" for name in ("steps_to_goal", "seconds_to_goal")]
        lines.append(
            f"| {entry['suite']} | {entry['optimizer']} | {entry['seeds']} | {entry['steps']:.0f} | "
            f"{entry['seconds']:.0f} | {100 * entry['accuracy']:.2f} | {' | '.join(goal)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", nargs="*", default=["b32"], help="sizes whose passes are timed")
    parser.add_argument("--tasks", type=int, nargs="+", default=[8], help="K of the passes")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--partitions", nargs="+", default=["task", "tensor", "block", "chunk(8)"])
    parser.add_argument("--steps-of", nargs="*", default=["b32:8"], help="SIZE:TASKS of the steps")
    parser.add_argument("--batch", type=int, default=16, help="images per task")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=["bf16-mixed/bfloat16", "32-true/float32", "reference"],
        help="PRECISION/DTYPE of τ, with /disk for τ in a mapped file; or reference, the plain implementation",
    )
    parser.add_argument("--accuracy-of", nargs="*", default=[], help="mini, or folders of suites: accuracy over steps")
    parser.add_argument("--seeds", type=int, default=5, help="of --accuracy-of")
    parser.add_argument("--disk", default=str(ROOT / "outputs"), help="folder of the mapped file")
    parser.add_argument("--peer", help="Python of the environment that has fusion-bench")
    parser.add_argument("--peer-script", help="fusionbench_step.py")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file, whose rows are replaced one by one; benchmarks/results/<device>.json by default",
    )
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.alone:
        measure = {"step": measure_step, "passes": measure_passes, "accuracy": measure_accuracy}[arguments.alone[0]]
        print(json.dumps(measure(**json.loads(arguments.alone[1]))))
        return
    if bool(arguments.peer) != bool(arguments.peer_script):
        parser.error("--peer and --peer-script go together")
    arguments.steps_of = [(size, int(tasks)) for size, _, tasks in (item.partition(":") for item in arguments.steps_of)]
    passes = []
    for size in arguments.passes:
        for num_tasks in arguments.tasks:
            for dtype in arguments.dtypes:
                task = {"size": size, "num_tasks": num_tasks, "dtype": dtype, "granularities": arguments.partitions}
                passes.append(run_alone("passes", task, arguments.threads))
                print(json.dumps(passes[-1]), flush=True)
    steps = compare_steps(arguments)
    accuracy = compare_accuracy(arguments)
    device = re.sub(r"\W+", "-", f"{platform.machine()}-{arguments.threads}-threads").lower()
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(out.read_text()) if out.exists() else {}
    record["torch"], record["cpu"] = torch.__version__, processor()
    identities = {
        "passes": ("size", "tasks", "dtype"),
        "steps": ("size", "tasks", "batch", "contestant"),
        "accuracy": ("suite", "optimizer"),
    }
    for (kind, names), new in zip(identities.items(), (passes, steps, accuracy), strict=True):
        found = {tuple(row[name] for name in names): row for row in [*record.get(kind, []), *new]}
        record[kind] = list(found.values())
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["passes"], record["steps"], record["accuracy"]))


def processor() -> str:
    """What the operating system calls this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
