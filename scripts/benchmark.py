"""Time both passes over τ and the whole optimiser step, beside the copy bandwidth and beside FusionBench.

python scripts/benchmark.py                                   # passes and steps, a table and a JSON file
python scripts/benchmark.py --gpu                             # the same on a CUDA device, for more banks and partitions
python scripts/benchmark.py --peer .peer/bin/python --peer-script ../shared/peer/fusionbench_step.py

The peer lives in an environment of its own: uv venv .peer && uv pip install --python .peer/bin/python
fusion-bench==0.2.33. Every contestant runs in a fresh process, one after another, ``--rounds`` times round; figures are
medians. Bytes of a pass are those that it cannot avoid: K·b·P of τ plus 4·P for every float32 tensor read or written.
On a GPU, images are drawn on the device, and the peer, which draws them on the host, is charged for its phases alone.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from measures import measure_passes, measure_run, measure_step

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from adamerge.bank.storage import DTYPES  # noqa: E402
from adamerge.cli.lightning import best_precision  # noqa: E402
from adamerge.learning.losses import TaskLosses  # noqa: E402
from adamerge.merging import MergedModel  # noqa: E402

IN_BF16 = ["bf16-mixed/bfloat16"] if best_precision(torch.device("cpu")) == "bf16-mixed" else []
"""Our default on this CPU, unless that is float32."""

DEFAULTS = {
    "cpu": {
        "threads": 2,
        "passes": ["b32"],
        "tasks": [8],
        "partitions": ["task", "tensor", "block", "chunk(8)"],
        "kernels": ["c"],
        "contestants": [*IN_BF16, "32-true/float32", "reference"],
        "steps": 3,
        "runs_of": [],
    },
    "cuda": {
        "threads": 8,
        "passes": ["b32", "l14"],
        "tasks": [2, 4, 8, 16, 32, 64],
        "partitions": ["task", "tensor", "block", "chunk(8)", "row", "random(8)"],
        "kernels": ["triton", "torch"],
        "contestants": [
            "bf16-mixed/bfloat16",
            "bf16-mixed/bfloat16/unrecorded",
            "32-true/float32",
            "bf16-mixed/bfloat16/host",
            "reference",
        ],
        "steps": 20,
        "runs_of": ["b32:8"],
    },
}
"""Of the options, by device."""


def measure_accuracy(suite: str, optimizer: str, seed: int, every: int) -> dict:
    """Mean accuracy of layer-wise AdaMerging after every few steps, with the seconds that learning took until then."""
    import hydra.utils
    import pytorch_lightning as pl

    from adamerge.cli.config import compose_config, settle
    from adamerge.cli.lightning import quiet
    from adamerge.cli.loading import load
    from adamerge.evaluation.evaluator import Evaluator
    from adamerge.learning.fit import learn
    from adamerge.learning.schedule import Schedule
    from adamerge.tasks.datamodule import TaskImages

    quiet()
    named = ["suite=mini"] if suite == "mini" else ["suite=folder", f"suite.root='{suite}'"]
    config, _ = compose_config("train", ["method=adamerging_layerwise", f"optimizer={optimizer}", *named])
    settle(config, learned=True)
    problem = load(config)
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
                task |= {"steps": arguments.steps, "device": arguments.device}
                task |= {"folder": arguments.disk} if "/disk" in contestant else {}
                found.setdefault(contestant, []).append(run_alone("step", task, arguments.threads))
            if arguments.peer:
                found.setdefault("FusionBench", []).append(run_peer(size, num_tasks, arguments))
        for contestant, runs in found.items():
            measured = ("sec_per_step", "peak_rss_MiB", "peak_anonymous_MiB", "peak_device_MiB")
            figures = {key: median(run[key] for run in runs) for key in measured if key in runs[0]}
            rows.append(
                {"size": size, "tasks": num_tasks, "batch": arguments.batch, "contestant": contestant, **figures}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def run_peer(size: str, num_tasks: int, arguments: argparse.Namespace) -> dict:
    """One run of FusionBench, in its environment."""
    command = [arguments.peer, arguments.peer_script, "--size", size, "--tasks", str(num_tasks)]
    command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps), "--device", arguments.device]
    run = in_process([*command, "--threads", str(arguments.threads)])
    if arguments.device == "cuda":
        run["sec_per_step"] = sum(run[f"t_{phase}"] for phase in ("forward", "backward", "optim", "merge"))
        run["peak_device_MiB"] = run["cuda_peak_MiB"]
    return run


def run_alone(what: str, task: dict, threads: int) -> dict:
    """``what`` in a fresh process."""
    return in_process([sys.executable, __file__, "--threads", str(threads), "--alone", what, json.dumps(task)])


def table(record: dict[str, list[dict]]) -> str:
    """Everything in Markdown."""
    steps = record["steps"]
    lines = ["| τ | K | partition | kernels | merge, ms | GB/s | % of copy | gradient, ms | GB/s | % of copy |"]
    lines += ["|---|--:|---|---|--:|--:|--:|--:|--:|--:|"]
    for entry in record["passes"]:
        for granularity, both in entry["partitions"].items():
            cells = [
                f"{entry['size']} {entry['dtype']}",
                str(entry["tasks"]),
                granularity,
                entry.get("kernels", "torch"),
            ]
            for name in ("merge", "gradient"):
                speed = both[name]["of_copy_bandwidth"] * entry["copy_bytes_per_second"]
                speed = both[name].get("bytes_per_second", speed)
                cells += [f"{1000 * both[name]['seconds']:.3g}", f"{speed / 1e9:.0f}"]
                cells += [f"{100 * both[name]['of_copy_bandwidth']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model | K × images | step | s / step | peak MiB | times as fast as FusionBench | of its peak |"]
    lines += ["|---|---|---|--:|--:|--:|--:|"]
    peer = {(e["size"], e["tasks"], e["batch"]): e for e in steps if e["contestant"] == "FusionBench"}
    for entry in steps:
        base = peer.get((entry["size"], entry["tasks"], entry["batch"]))
        memory = "peak_device_MiB" if "peak_device_MiB" in entry else "peak_rss_MiB"
        ratio = f"{base['sec_per_step'] / entry['sec_per_step']:.2f}" if base else "–"
        share = f"{100 * entry[memory] / base[memory]:.0f} %" if base else "–"
        lines.append(
            f"| {entry['size']} | {entry['tasks']} × {entry['batch']} | {entry['contestant']} | "
            f"{entry['sec_per_step']:.4g} | {entry[memory]:.0f} | {ratio} | {share} |"
        )
    lines += ["", "| suite | recipe | seeds | steps | seconds | accuracy, % | steps to goal | seconds to goal |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    for entry in record["accuracy"]:
        goal = [f"{entry[name]:.0f}" if entry[name] else "–" for name in ("steps_to_goal", "seconds_to_goal")]
        lines.append(
            f"| {entry['suite']} | {entry['optimizer']} | {entry['seeds']} | {entry['steps']:.0f} | "
            f"{entry['seconds']:.0f} | {100 * entry['accuracy']:.2f} | {' | '.join(goal)} |"
        )
    for entry in record["runs"]:
        lines += [
            "",
            f"{entry['steps']} steps of {entry['size']}, {entry['tasks']} × {entry['batch']} images, from the",
        ]
        lines[-1] += f" first draw to the last checkpoint, images on the {entry['images_on']}: {entry['seconds']:.1f} s"
        if "first" in entry:
            lines[-1] += f" (the first time, with what had to be compiled: {entry['first']:.1f} s)"
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", dest="device", action="store_const", const="cuda", default="cpu", help="on CUDA")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--passes", nargs="*", help="sizes whose passes are timed")
    parser.add_argument("--tasks", type=int, nargs="+", help="K of the passes")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--partitions", nargs="+")
    parser.add_argument(
        "--kernels", nargs="+", choices=["c", "triton", "torch"], help="of the passes; c without --gpu, triton with it"
    )
    parser.add_argument("--steps-of", nargs="*", default=["b32:8"], help="SIZE:TASKS of the steps")
    parser.add_argument("--runs-of", nargs="*", help="SIZE:TASKS of whole runs of 500 steps")
    parser.add_argument("--batch", type=int, default=16, help="images per task")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--contestants",
        nargs="+",
        help="PRECISION/DTYPE of τ, with /host or /disk for τ that is streamed from there, and /MODE of torch.compile "
        "(default, reduce-overhead, …), with /unrecorded to launch kernels one by one; or "
        "reference, the plain implementation",
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
    parser.set_defaults(**DEFAULTS[parser.parse_known_args()[0].device])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.alone:
        measures = {"step": measure_step, "passes": measure_passes, "accuracy": measure_accuracy, "run": measure_run}
        measure = measures[arguments.alone[0]]
        print(json.dumps(measure(**json.loads(arguments.alone[1]))))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device, and torch finds none. Leave --gpu out to measure on the CPU.")
    if (other := "triton" if arguments.device == "cpu" else "c") in arguments.kernels:
        parser.error(f"--kernels {other} is not for {arguments.device}")
    if bool(arguments.peer) != bool(arguments.peer_script):
        parser.error("--peer and --peer-script go together")
    for name in ("steps_of", "runs_of"):
        parts = [item.partition(":") for item in getattr(arguments, name)]
        setattr(arguments, name, [(size, int(tasks)) for size, _, tasks in parts])
    passes = []
    for size, num_tasks, dtype, kernels in product(
        arguments.passes, arguments.tasks, arguments.dtypes, arguments.kernels
    ):
        task = {"size": size, "num_tasks": num_tasks, "dtype": dtype, "granularities": arguments.partitions}
        task |= {"device": arguments.device, "kernels": kernels}
        passes.append(run_alone("passes", task, arguments.threads))
        print(json.dumps(passes[-1]), flush=True)
    steps = compare_steps(arguments)
    accuracy = compare_accuracy(arguments)
    runs = []
    for (size, num_tasks), images_on in product(arguments.runs_of, ("host", "device")):
        task = {"size": size, "num_tasks": num_tasks, "batch": arguments.batch, "steps": 500}
        task |= {"device": arguments.device, "images_on": images_on}
        times = [run_alone("run", task, arguments.threads) for _ in range(arguments.rounds)]
        runs.append(times[0] | {"seconds": median(run["seconds"] for run in times), "first": times[0]["seconds"]})
        print(json.dumps(runs[-1]), flush=True)
    if arguments.device == "cuda":
        chip, device = "gpu", torch.cuda.get_device_name()
    else:
        capability = torch.backends.cpu.get_cpu_capability()  # two CPUs of one name may differ in it, or in AMX
        capability += " AMX" if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16") else ""
        chip, device = "cpu", f"{processor()} {capability} {arguments.threads} threads"
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(out.read_text()) if out.exists() else {}
    record["torch"], record[chip] = torch.__version__, processor() if chip == "cpu" else device
    identities = {
        "passes": ("size", "tasks", "dtype", "kernels"),
        "steps": ("size", "tasks", "batch", "contestant"),
        "accuracy": ("suite", "optimizer"),
        "runs": ("size", "tasks", "batch", "images_on"),
    }
    for (kind, names), new in zip(identities.items(), (passes, steps, accuracy, runs), strict=True):
        found = {tuple(row.get(name, "torch") for name in names): row for row in [*record.get(kind, []), *new]}
        record[kind] = list(found.values())
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def processor() -> str:
    """What the operating system calls this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
