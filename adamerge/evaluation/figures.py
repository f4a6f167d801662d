"""Pictures of what was learned: λ per tensor, λ over the steps, and the losses.

Figures are drawn with matplotlib's object interface, so no pyplot state, no display and no backend choice of the caller
is touched, and they appear whole or not at all.
"""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamerge.bank.keys import block_of
from adamerge.errors import ShapeError
from adamerge.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from numpy.typing import NDArray

_DPI = 150
_MOST_TENSOR_LABELS = 60  # columns whose names stay legible side by side
_MOST_COLUMNS = 1000  # that are each a pixel or more wide
_MOST_VALUES = 200  # cells that can hold their number
# Okabe and Ito's palette without its yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("solid", "dashed", "dotted", "dashdot")


def coefficients_heatmap(
    coefficients: Tensor, group_names: Sequence[str], task_names: Sequence[str], path: Path
) -> None:
    """Draw λ as a heat map: a row per task, a column per group, in the order in which an image passes through them.

    Columns of one transformer block stand together between lines, with the block's label below. Of more groups than
    have a place side by side (those of rows), the mean over each tensor's is drawn, as the title then says.

    Args:
        coefficients: λ, (K, G).
        group_names: As in ``Partition.groups``, of any granularity.
        path: The PNG to write.

    Raises:
        ShapeError: If the names do not fit λ.
        OutputError: If the file cannot be written.
    """
    _check_shape("coefficients", coefficients, (len(task_names), len(group_names)))
    title = "Merging coefficients λ"
    if len(group_names) > _MOST_COLUMNS:
        coefficients, group_names = _tensor_means(coefficients, group_names)
        title += ", mean over each tensor's groups"
    blocks = [block_named(name) for name in group_names]
    order = sorted(range(len(blocks)), key=lambda column: depth_of(blocks[column]))
    values = coefficients.detach().to("cpu", torch.float32)[:, order].numpy()  # (K, G)
    runs = [(block, len(list(run))) for block, run in groupby(blocks[column] for column in order)]
    names = [_short_name(group_names[column], blocks[column]) for column in order]
    with_names = len(runs) < len(names) <= _MOST_TENSOR_LABELS

    num_tasks, num_groups = values.shape
    with_values = values.size <= _MOST_VALUES and num_groups <= 20
    cell = 0.5 if with_values else 0.17 if with_names else 0.095
    width = min(max(cell * num_groups, 0.42 * len(runs), 4.0), 15.0)
    figure = new_figure(width + 2.6, 0.32 * num_tasks + (3.0 if with_names else 1.8))
    axes = figure.subplots()
    colours, low, high = _colour_range(values)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, vmin=low, vmax=high)
    axes.set_title(title)
    axes.set_yticks(range(num_tasks), task_names)
    axes.set_xlabel("part of the image tower, from input to output")
    figure.colorbar(image, ax=axes, label="λ", pad=0.015, aspect=25)

    edges = [0]
    for _, length in runs:
        edges.append(edges[-1] + length)
    for edge in edges[1:-1]:
        axes.axvline(edge - 0.5, color="white", linewidth=1.2)
    centres = [(start + stop - 1) / 2 for start, stop in pairwise(edges)]
    labels = [block_label(block) for block, _ in runs]
    rotation = 45 if _collide(centres, labels, num_groups / width) else 0
    if with_names:
        axes.set_xticks(range(num_groups), names, rotation=90, fontsize=6.5)
        above = axes.secondary_xaxis("top")
        above.set_xticks(centres, labels, fontsize=8, rotation=rotation, ha="left" if rotation else "center")
        above.tick_params(length=0)
        _as_plain_text(above.get_xticklabels())
    else:
        axes.set_xticks(centres, labels, rotation=rotation, ha="right" if rotation else "center")
    if with_values:
        _write_values(axes, values, low, high)
    _as_plain_text([*axes.get_xticklabels(), *axes.get_yticklabels()])
    save(figure, path)


def loss_figure(losses: Tensor, task_names: Sequence[str], path: Path, *, loss_name: str = "entropy (nats)") -> None:
    """Draw the loss of every task over the steps: a panel per task, each step faint and the running mean strong.

    Args:
        losses: Row s holds the losses of step s + 1, (S, K). Values that are not finite are left out, so rows of steps
            that never ran may be NaN.
        path: The PNG to write.
        loss_name: What the objective measures, with its unit.

    Raises:
        ShapeError: If the names do not fit the losses.
        OutputError: If the file cannot be written.
    """
    _check_shape("losses", losses, (losses.shape[0], len(task_names)))
    values = losses.detach().to("cpu", torch.float64)
    num_tasks = len(task_names)
    columns = min(4, num_tasks)
    rows = math.ceil(num_tasks / columns)
    figure = new_figure(max(2.6 * columns, 5.0) + 0.6, max(1.75 * rows, 2.4) + 0.9)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[num_tasks:]:
        axes.remove()
    for task, (name, axes) in enumerate(zip(task_names, panels, strict=False)):
        steps, series = _finite(values[:, task])
        if len(series):
            marker = "o" if len(series) < 3 else None
            axes.plot(steps, series, color=COLOURS[4], linewidth=0.7, alpha=0.55, marker=marker)
            axes.plot(steps, _running_mean(series), color=COLOURS[0], linewidth=1.6)
        else:
            axes.text(0.5, 0.5, "no steps", transform=axes.transAxes, ha="center", va="center")
        _as_plain_text([axes.set_title(name, fontsize=10)])
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="y", nbins=5)
        _whole_steps(axes)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        if task + columns >= num_tasks:  # nothing below in this column
            axes.tick_params(labelbottom=True)
    figure.suptitle("Loss per task: every step, and its running mean")
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(loss_name, fontsize=10)
    save(figure, path)


def mean_coefficient_figure(means: Tensor, task_names: Sequence[str], path: Path) -> None:
    """Draw every task's mean λ over the steps.

    Args:
        means: Row s holds the means over the groups after step s + 1, (S, K). Rows that are not finite are left out.
        path: The PNG to write.

    Raises:
        ShapeError: If the names do not fit the means.
        OutputError: If the file cannot be written.
    """
    _check_shape("means", means, (means.shape[0], len(task_names)))
    values = means.detach().to("cpu", torch.float64)
    figure = new_figure(8.0, max(4.2, 0.26 * len(task_names) + 1.2))
    axes = figure.subplots()
    lines, finals = [], []
    for task in range(len(task_names)):
        steps, series = _finite(values[:, task])
        style = _DASHES[task // len(COLOURS) % len(_DASHES)]
        marker = "o" if len(series) < 3 else None
        lines += axes.plot(steps, series, color=COLOURS[task % len(COLOURS)], linestyle=style, marker=marker)
        finals.append(series[-1] if len(series) else -math.inf)
    order = sorted(range(len(task_names)), key=lambda task: -finals[task])  # as the line ends stand, from the top
    legend = axes.legend(
        [lines[task] for task in order],
        [str(task) for task in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        handlelength=2.6,
    )
    for text, task in zip(legend.get_texts(), order, strict=True):
        text.set_text(task_names[task])  # set afterwards: a legend drops labels with a leading underscore
    _as_plain_text(legend.get_texts())
    axes.set_title("Mean merging coefficient per task")
    axes.set_xlabel("step")
    _whole_steps(axes)
    axes.set_ylabel("mean λ over the groups")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    save(figure, path)


def block_named(group: str) -> str:
    """``embedding``, ``block.i`` or ``output`` for a group of any granularity, ``all`` for that of ``task``."""
    if group in ("all", "embedding", "output") or re.fullmatch(r"block\.\d+", group):
        return group
    return block_of(_tensor_name(group))


def _tensor_name(group: str) -> str:
    return re.sub(r"\[\d+\]$", "", group)  # a chunk's group is called key[i]


def _tensor_means(coefficients: Tensor, group_names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """λ averaged over the groups of each tensor, (K, L), and the tensors' names."""
    names = [_tensor_name(group) for group in group_names]
    index = {name: column for column, name in enumerate(dict.fromkeys(names))}
    columns = torch.tensor([index[name] for name in names])
    values = coefficients.detach().to("cpu", torch.float32)
    total = values.new_zeros(len(values), len(index)).index_add_(1, columns, values)
    return total / columns.bincount(), list(index)


def depth_of(block: str) -> tuple[int, int]:
    if block.startswith("block."):
        return 1, int(block.removeprefix("block."))
    return (2 if block == "output" else 0), 0


def block_label(block: str) -> str:
    return {"all": "all tensors", "embedding": "embed"}.get(block, block.replace(".", " "))


def _collide(centres: Sequence[float], labels: Sequence[str], columns_per_inch: float) -> bool:
    """Whether neighbouring labels, written level, would touch."""
    widths = [0.09 * len(label) + 0.08 for label in labels]  # inches, in the default ten points
    gaps = [(right - left) / columns_per_inch for left, right in pairwise(centres)]
    return any(gap < (left + right) / 2 for gap, (left, right) in zip(gaps, pairwise(widths), strict=True))


def _short_name(group: str, block: str) -> str:
    """A tensor's name inside its block: ``attn.in_proj_weight``."""
    number = block.removeprefix("block.")
    _, separator, rest = group.rpartition(f".{number}.")
    if block.startswith("block.") and separator:
        return rest
    return group.removeprefix("visual.")


def _colour_range(values: "NDArray") -> tuple[str, float, float]:
    """A sequential map from 0 for λ ≥ 0, one centred on 0 where some λ are negative; both safe for the colour-blind."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        reach = max(-low, high)
        return "PuOr_r", -reach, reach
    return "viridis", 0.0, high or 1.0


def _write_values(axes: "Axes", values: "NDArray", low: float, high: float) -> None:
    middle = (low + high) / 2
    for row, column in ((r, c) for r in range(values.shape[0]) for c in range(values.shape[1])):
        value = values[row, column]
        extreme = abs(value - middle) > 0.3 * (high - low) if low < 0 else value < middle
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if extreme else "black"
        )


def _finite(series: Tensor) -> tuple[list[float], list[float]]:
    """Steps (from 1) and values where the value is finite."""
    steps = torch.isfinite(series).nonzero().flatten()
    return (steps + 1).tolist(), series[steps].tolist()


def _running_mean(series: list[float]) -> list[float]:
    """Mean over a centred window of a twentieth of the series, cut off at its ends."""
    reach = max(len(series) // 40, 1)
    total = [0.0]
    for value in series:
        total.append(total[-1] + value)
    bounds = [(max(i - reach, 0), min(i + reach + 1, len(series))) for i in range(len(series))]
    return [(total[stop] - total[start]) / (stop - start) for start, stop in bounds]


def _whole_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step
        axes.set_xlim(left - 0.5, right + 0.5)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeError(f"{name} have the shape {tuple(tensor.shape)}, but the names given ask for {expected}.")


def _as_plain_text(texts: "Iterable[Text]") -> None:
    """Names are shown as they are: a $ in them starts no formula."""
    for text in texts:
        text.set_parse_math(False)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of ``width`` × ``height`` inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    with atomic_file(path) as temporary, warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the run is none the worse for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.draw_without_rendering()  # settles the ticks, whose width the layout needs
        figure.savefig(temporary, format="png", dpi=_DPI)
