"""Merge eight experts of a ViT-L/14 (random weights) by every data-free method: seconds and peak resident memory.

python scripts/large_merge.py [--size l14] [--tasks 8] [--only ties tsv_merge …]

Needs about 14 GiB for the experts and the merged model alone. Results are kept row by row in
benchmarks/results/large_merge.json, and the README's table is written from them.
"""
# ruff: noqa: T201

import argparse
import json
import os
import re
import time
from pathlib import Path

import hydra.utils
import torch
from leaderboard import statics
from measures import SIZES, random_bank, shapes_of

from adamerge.cli.config import compose_config
from adamerge.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "large_merge.json"
LIMIT_GIB = 20


def resident_peak() -> float:
    """GiB since ``forget_peak``, of the whole process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20  # pyright: ignore[reportOptionalSubscript]


def forget_peak() -> None:
    """Let the peak start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def table(record: dict[str, dict]) -> str:
    """One row per method, the fastest first."""
    lines = ["| method | threads | s | peak GiB |", "|---|--:|--:|--:|"]
    for name, row in sorted(record.items(), key=lambda item: item[1]["seconds"]):
        lines.append(f"| `{name}` | {row['threads']} | {row['seconds']:,.0f} | {row['peak_GiB']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="l14")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="methods; all that need no data by default; none: write the table")
    arguments = parser.parse_args()
    names = [
        name for name, row in statics().items() if not row.anew and "searched" not in name and name != "individual"
    ]
    names = names if arguments.only is None else arguments.only
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if names:
        torch.manual_seed(0)
        pretrained = {key: torch.randn(shape) for key, shape in shapes_of(arguments.size).items()}
        bank = random_bank(pretrained, arguments.tasks, "float32")
        print(f"{sum(tensor.numel() for tensor in pretrained.values()) / 1e6:.0f} M parameters", flush=True)
    for name in names:
        method = hydra.utils.instantiate(compose_config("train", [f"method={name}"])[0].method)
        forget_peak()
        begin = time.perf_counter()
        _, merged = next(method.candidates(bank))  # with the first scaling, where it is searched for
        seconds, peak = time.perf_counter() - begin, resident_peak()
        finite = all(tensor.isfinite().all() for tensor in merged.values())
        del merged
        print(f"{name}: {seconds:.1f} s, peak {peak:.2f} GiB", flush=True)
        if peak > LIMIT_GIB or not finite:
            raise SystemExit(f"{name}: {'more than the limit' if finite else 'not finite'}")
        record[name] = {
            "seconds": seconds,
            "peak_GiB": peak,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        }
        if arguments.size == "l14":
            write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    readme = ROOT / "README.md"
    begin, end = "<!-- large -->\n", "\n<!-- /large -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    readme.write_text(pattern.sub(lambda _: begin + table(record) + end, readme.read_text()))


if __name__ == "__main__":
    main()
