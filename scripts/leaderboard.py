"""Run every method on some suites with several seeds, and write the tables of the README from the results.

python scripts/leaderboard.py --suites mini ../shared/real8 [--only adamerge …] [--seeds 5]

Every run is a fresh process of train.py. Results are kept row by row in benchmarks/results/leaderboard.json, so that a
script that is stopped goes on where it was; ``--again`` runs what is there already once more. Static methods run with
three seeds where something is drawn (masks, images), else with one.
"""
# ruff: noqa: T201

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import hydra.utils
from omegaconf import OmegaConf
from safetensors import safe_open

from adamerge.cli.config import cache_dir, compose_config, options
from adamerge.tasks.problem import suite_named

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "leaderboard.json"

LEARNERS: dict[str, list[str]] = {
    "adamerging_taskwise": [],
    "adamerging_taskwise_pp": [],
    "adamerging_blockwise": [],
    "adamerging_layerwise": [],
    "adamerging_layerwise_pp": [],
    "concrete_task_arithmetic": ["schedule.steps=500"],
    "concrete_adamerging_taskwise": ["schedule.steps=500"],
    "concrete_adamerging_layerwise": ["schedule.steps=500"],
    "self_positioning": [],
    "frank_wolfe_hard": [],
    "frank_wolfe_soft": [],
    "expert_merging": [],
    "expert_merging_pp": [],
    "atlas_tta": [],
    "atlas_fewshot": [],
    "atlas_partition": ["method.target=null"],
    "atlas_addition": [],
    "adamerge": [],
}
SUPERVISED = ("atlas_fewshot", "atlas_partition", "atlas_addition")
BY_TARGET = ("atlas_tta", "atlas_fewshot")
"""Learners that make a model for one task at a time."""
SEARCHED = ("task_arithmetic", "ties", "tsv_merge", "iso_c", "iso_cts")
"""Static methods that get a second row, with their scaling searched on the labelled split."""
ABLATION: dict[str, list[str]] = {
    "adamerge": [],
    "one λ per tensor": ["method.granularity=tensor"],
    "eight λ per tensor": ["method.granularity='chunk(8)'"],
    "60 steps": ["schedule.steps=60"],
    "never ends early": ["schedule.patience=0"],
    "λ in [0, 1]": ["method.constraint=clamp"],
    "entropy for agreement": ["objective=entropy", "method.grid=[]"],
    "10 images per task": ["data.images_per_task=10", "data.split_seed=${seed}"],
    "scored on the other half": ["data.adapt=half"],
}
CORRUPTIONS = ("gaussian_noise", "contrast", "jpeg")


@dataclass(frozen=True)
class Experiment:
    """What the runs of a row have in common.

    Attributes:
        options: Of the command line.
        data: What the method is given beside weights: ``none``, ``images`` or ``labels``.
        seeds: How many seeds are enough.
        anew: Whether nothing may come from a cache, since computing it is part of the method's cost.
        by_target: Whether every task is the method's target once. Figures are then means over the targets, of their own
            accuracy, but for λ and seconds, which add up.
    """

    options: tuple[str, ...]
    data: str
    seeds: int = 5
    anew: bool = False
    by_target: bool = False


def statics() -> dict[str, Experiment]:
    """Static methods of conf/method that must be told nothing about a suite, those that search besides."""
    found = {}
    for name in options("method"):
        config, _ = compose_config("train", [f"method={name}"])
        if OmegaConf.missing_keys(config):
            continue
        method = hydra.utils.instantiate(config.method)
        if hasattr(method, "prepare"):
            continue
        statistic = getattr(method, "statistic", None)
        data = {"nothing": "none"}.get(statistic.needs, statistic.needs) if statistic else "none"
        data = "labels" if config.method.get("scaling") == "search" else data
        seeds = 3 if statistic or "seed" in config.method or "seed" in (config.method.get("transform") or {}) else 1
        found[name] = Experiment((f"method={name}",), data, seeds, anew=statistic is not None)
        if name in SEARCHED:
            found[f"{name}, searched"] = Experiment((f"method={name}", "method.scaling=search"), "labels", seeds)
    return found


def experiments() -> dict[str, Experiment]:
    """Name of a row to its runs."""
    learned = {name: [f"method={name}", *options] for name, options in LEARNERS.items()}
    learned |= {f"ablation/{name}": ["method=adamerge", *options] for name, options in ABLATION.items()}
    for corruption in CORRUPTIONS:
        for method in ("adamerging_layerwise", "adamerge"):
            learned[f"{corruption}/{method}"] = [f"method={method}", f"data.corruption={corruption}"]
    return {
        name: Experiment(tuple(given), "labels" if name in SUPERVISED else "images", by_target=name in BY_TARGET)
        for name, given in learned.items()
    } | {f"static/{name}": experiment for name, experiment in statics().items()}


def run(experiment: Experiment, suite: str, seed: int) -> dict:
    """One seed's figures."""
    named = ["suite=mini"] if suite == "mini" else ["suite=folder", f"suite.root='{suite}'"]
    settings = [*experiment.options, *named, f"seed={seed}"]
    targets = [None]
    if experiment.by_target:
        cache = cache_dir(compose_config("train", [])[0])
        targets = [task.name for task in suite_named(suite, suite, None, cache).tasks]
    scores, runs = [], []
    for target in targets:
        results, count = train([*settings, *([f"method.target={target}"] if target else [])], anew=experiment.anew)
        scores += [results["tasks"][target]] if target else results["tasks"].values()
        runs.append((results, count))
    return {
        "accuracy": 100 * mean(score["merged"] for score in scores),
        "normalized": 100 * mean(score["normalized"] for score in scores),
        "pretrained": 100 * mean(score["pretrained"] for score in scores),
        "lowest_gain": 100 * min(score["merged"] - score["pretrained"] for score in scores),
        "coefficients": sum(count for _, count in runs),
        "seconds": sum(results["seconds"]["adapt"] for results, _ in runs),
        "peak_MiB": max(results["peak_memory_bytes"] for results, _ in runs) / 2**20,
        "steps": max(results["steps"] for results, _ in runs),
        "labels": experiment.data == "labels",
    }


def train(settings: list[str], *, anew: bool) -> tuple[dict, int]:
    """A run's results and how many coefficients it has learned."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *settings]
        command += [f"paths.run_dir={folder}/run", "export.figures=false", "export.checkpoint=false"]
        if anew:
            command.append(f"paths.cache_dir={folder}/cache")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        results = json.loads(Path(folder, "run", "results.json").read_text())
        coefficients = Path(folder, "run", "coefficients.safetensors")
        if not coefficients.exists():
            return results, 0
        with safe_open(coefficients, framework="pt") as file:
            return results, file.get_tensor("coefficients").numel()


def spread(runs: list[dict], name: str, digits: int = 1) -> str:
    """Mean ± standard error."""
    values = [run[name] for run in runs]
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def table(record: dict[str, dict[str, list[dict]]], suites: list[str], names: dict[str, str]) -> str:
    """Rows ``names`` (key → title) over suites: accuracy, normalised accuracy, and what they cost."""
    columns = [part for suite in suites for part in (f"{suite}, %", "normalised", "s")]
    lines = [f"| | labels | λ | {' | '.join(columns)} | peak MiB |"]
    lines += ["|---|---|--:|" + "--:|" * (len(columns) + 1)]
    for key, title in names.items():
        by_suite = record.get(key, {})
        if not all(suite in by_suite for suite in suites):
            continue
        cells = []
        for suite in suites:
            runs = by_suite[suite]
            cells += [spread(runs, "accuracy"), f"{mean(run['normalized'] for run in runs):.1f}"]
            cells.append(f"{min(run['seconds'] for run in runs):.0f}")
        every = [run for suite in suites for run in by_suite[suite]]
        counts = " / ".join(dict.fromkeys(f"{by_suite[suite][0]['coefficients']:,}" for suite in suites))
        labels = "yes" if every[0]["labels"] else "no"
        peak = max(run["peak_MiB"] for run in every)
        lines.append(f"| {title} | {labels} | {counts} | {' | '.join(cells)} | {peak:,.0f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def static_table(record: dict[str, dict[str, list[dict]]], suites: list[str]) -> str:
    """All static methods over suites; the best on the last one last."""
    columns = [part for suite in suites for part in (f"{suite}, %", "normalised", "s")]
    lines = [f"| | data | {' | '.join(columns)} | peak MiB |", "|---|---|" + "--:|" * (len(columns) + 1)]
    rows = []
    for name, experiment in statics().items():
        by_suite = record.get(f"static/{name}", {})
        if not all(suite in by_suite for suite in suites):
            continue
        cells = []
        for suite in suites:
            runs = by_suite[suite]
            cells += [spread(runs, "accuracy"), f"{mean(run['normalized'] for run in runs):.1f}"]
            cells.append(f"{min(run['seconds'] for run in runs):.1f}")
        every = [run for suite in suites for run in by_suite[suite]]
        peak = max(run["peak_MiB"] for run in every)
        title = f"`{name}`" if ", " not in name else f"`{name.split(', ')[0]}`, searched"
        merit = mean(run["accuracy"] for run in by_suite[suites[-1]])
        rows.append((merit, f"| {title} | {experiment.data} | {' | '.join(cells)} | {peak:,.0f} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))]) if rows else ""


def write_readme(record: dict, suites: list[str]) -> None:
    """Put the tables between the README's markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    tables = {
        "learners": table(record, suites, {name: f"`{name}`" for name in LEARNERS}),
        "static": static_table(record, suites),
        "ablation": table(record, suites, {f"ablation/{name}": name for name in ABLATION}),
        "corruptions": table(
            record,
            suites,
            {
                f"{corruption}/{method}": f"{corruption}, `{method}`"
                for corruption in CORRUPTIONS
                for method in ("adamerging_layerwise", "adamerge")
            },
        ),
    }
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(lambda _, b=begin, m=lines, e=end: b + m + e, text)
    readme.write_text(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["mini"], help="mini, or folders with a suite.yaml")
    parser.add_argument("--only", nargs="*", help="rows to run; none: only write the tables")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    every = experiments()
    chosen = every if arguments.only is None else {name: every[name] for name in arguments.only}
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, experiment in chosen.items():
        for suite in arguments.suites:
            title = Path(suite).name
            runs = [] if arguments.again else record.get(name, {}).get(title, [])
            for seed in range(len(runs), min(arguments.seeds, experiment.seeds)):
                runs.append(run(experiment, suite, seed))
                record.setdefault(name, {})[title] = runs
                RESULTS.write_text(json.dumps(record, indent=1) + "\n")
                print(name, title, seed, json.dumps(runs[-1]), flush=True)
    write_readme(record, [Path(suite).name for suite in arguments.suites])


if __name__ == "__main__":
    main()
