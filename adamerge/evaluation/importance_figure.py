"""A picture of what each tensor weighs in a merge, and of how many coefficients it was given for that."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from adamerge.evaluation import figures


def importance_figure(shares: Mapping[str, tuple[float, int]], path: Path) -> None:
    """Draw two bars per tensor, one above the other, in the order in which an image passes through the tensors.

    Args:
        shares: By key the tensor's importance and its number of λ per task, as ``Learner.shares`` gives them.
        path: The PNG to write.

    Raises:
        OutputError: If the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    keys = sorted(shares, key=lambda key: figures.depth_of(figures.block_named(key)))
    blocks = [figures.block_named(key) for key in keys]
    edges = [0, *(i for i in range(1, len(keys)) if blocks[i] != blocks[i - 1]), len(keys)]
    centres = [(start + stop - 1) / 2 for start, stop in pairwise(edges)]
    figure = figures.new_figure(min(max(0.1 * len(keys), 0.5 * len(centres), 5.0), 15.0) + 1.0, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(range(len(keys)), [shares[key][0] for key in keys], color=figures.COLOURS[0])
    upper.set_title("Importance of each tensor, and how many λ it was given")
    upper.set_ylabel("importance")
    upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    lower.bar(range(len(keys)), [shares[key][1] for key in keys], color=figures.COLOURS[1])
    lower.set_ylabel("λ per task")
    lower.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    lower.set_xlabel("part of the image tower, from input to output")
    labels = [figures.block_label(blocks[start]) for start in edges[:-1]]
    lower.set_xticks(
        centres, labels, rotation=45 if len(labels) > 8 else 0, ha="right" if len(labels) > 8 else "center"
    )
    for axes in (upper, lower):
        axes.set_xlim(-0.6, len(keys) - 0.4)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        for edge in edges[1:-1]:
            axes.axvline(edge - 0.5, color="0.8", linewidth=0.8)
    figures.save(figure, path)
