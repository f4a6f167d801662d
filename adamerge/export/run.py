"""Everything that a run leaves in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge.evaluation.figures import coefficients_heatmap, loss_figure, mean_coefficient_figure
from adamerge.evaluation.importance_figure import importance_figure
from adamerge.evaluation.report import Results
from adamerge.export.coefficients import SavedCoefficients, write_coefficients, write_coefficients_csv
from adamerge.export.manifest import write_manifest
from adamerge.export.model_card import model_card
from adamerge.export.writers import write_heads, write_open_clip_folder
from adamerge.learning.fit import Learned
from adamerge.tasks.problem import Problem


def export_run(
    run_dir: Path,
    problem: Problem,
    results: Results,
    *,
    config: Mapping[str, Any],
    merged: Mapping[str, Tensor] | None,
    coefficients: SavedCoefficients | None,
    learned: Learned | None,
) -> None:
    """Write the merged model, heads, coefficients, figures and the manifest.

    Args:
        config: Resolved, plain data; its ``export`` says what to leave out.
        merged: Merged tensors by key, or None if there is no single model.
        coefficients: λ, if the method has them.
        learned: The history, if anything was learned in this run.

    Raises:
        OutputError: If a file cannot be written.
    """
    tasks = problem.bank.task_names
    if merged is not None and config["export"]["checkpoint"]:
        card = model_card(
            suite=results.suite,
            base=f"{problem.clip.arch}, {problem.suite.model.pretrained}",
            experts={task.name: Path(task.expert).name for task in problem.suite.tasks},
            method=results.method,
            settings={
                "seed": results.seed,
                "steps": results.steps,
                "data.adapt": results.adapt,
                "data.fraction": results.fraction,
            },
            table=results.markdown(),
        )
        write_open_clip_folder(run_dir / "merged", problem.clip, merged, card=card)
    write_heads(run_dir / "heads.safetensors", problem.heads, problem.class_names)
    if coefficients is not None:
        write_coefficients(run_dir / "coefficients.safetensors", coefficients)
        write_coefficients_csv(run_dir / "coefficients.csv", coefficients)
        if config["export"]["figures"]:
            groups = coefficients.partition.groups
            coefficients_heatmap(coefficients.coefficients, groups, tasks, run_dir / "figures" / "coefficients.png")
    if learned is not None and learned.steps and config["export"]["figures"]:
        objective = config["objective"]["_target_"].rpartition(".")[2]
        loss_figure(learned.losses, learned.tasks, run_dir / "figures" / "losses.png", loss_name=objective)
        mean_coefficient_figure(learned.mean_coefficients, tasks, run_dir / "figures" / "mean_coefficients.png")
        if learned.shares:
            importance_figure(learned.shares, run_dir / "figures" / "importance.png")
    inputs: dict[str, Path | str] = {"pretrained": problem.suite.model.pretrained, **problem.clip.files}
    for task in problem.suite.tasks:
        inputs |= {f"expert/{task.name}": task.expert, f"data/{task.name}": task.data}
    write_manifest(run_dir / "manifest.json", method=results.method, config=config, inputs=inputs)
