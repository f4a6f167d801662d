"""WIDEN written down a second time, column by column (SPECS B16); plain loops, nothing of adamerge."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def significance(pretrained: np.ndarray, expert: np.ndarray) -> tuple[list[float], list[float]]:
    """How far magnitude and direction of every column of (m, n) moved, n each."""
    magnitudes, directions = [], []
    for column in range(pretrained.shape[1]):
        old, new = pretrained[:, column], expert[:, column]
        old_length, new_length = float(np.sqrt((old**2).sum())), float(np.sqrt((new**2).sum()))
        magnitudes.append(abs(new_length - old_length))
        if old_length and new_length:
            directions.append(1 - float((old / old_length) @ (new / new_length)))
        else:
            directions.append(0.0 if old_length == new_length else 1.0)
    return magnitudes, directions


def ranks(values: Sequence[float]) -> list[Fraction]:
    """Of each value the number of smaller ones, or equal ones before it, over how many there are."""
    n = len(values)
    before = [sum(values[j] < values[i] or (values[j] == values[i] and j < i) for j in range(n)) for i in range(n)]
    return [Fraction(count, n) for count in before]


def scores(of_experts: Sequence[Sequence[float | Fraction]], ratio: float, calibration: float) -> np.ndarray:
    """Softmax over K experts of n values each; important ones get the calibration: (K, n)."""
    found = np.zeros((len(of_experts), len(of_experts[0])))
    for k, values in enumerate(of_experts):
        mean = sum(map(Fraction, values)) / len(values)
        for i, value in enumerate(values):
            others = sum(np.exp(float(other[i])) for other in of_experts)
            found[k, i] = calibration if value > Fraction(ratio) * mean else np.exp(float(value)) / others
    return found


def merged(pretrained: np.ndarray, experts: Sequence[np.ndarray], ratio: float, calibration: float) -> np.ndarray:
    """Of matrices (m, n) or of vectors (n,)."""
    if pretrained.ndim == 1:
        moved = [list(np.abs(expert - pretrained)) for expert in experts]
        weights = scores(moved, ratio, calibration)
    else:
        pairs = [significance(pretrained, expert) for expert in experts]
        weights = sum(scores([ranks(pair[i]) for pair in pairs], ratio, calibration) for i in (0, 1)) / 2
    return pretrained + sum(weight * (expert - pretrained) for weight, expert in zip(weights, experts, strict=True))


# A worked example: θ₀ is a matrix of two outputs and two inputs, of which expert 1 stretches column 0 from 2 to 4 and
# turns column 1 by a right angle, and expert 2 stretches column 1 from 1 to 2.
#
#   θ₀ = 2 0    θ₁ = 4 1    θ₂ = 2 0    τ₁ = 2  1    τ₂ = 0 0
#        0 1         0 0         0 2         0 -1         0 1
#
#   magnitudes  expert 1: (2, 0), ranks over n (1/2, 0), mean 1/4: column 0 is important
#               expert 2: (0, 1), ranks over n (0, 1/2):           column 1 is
#   directions  expert 1: (0, 1):                                  column 1 is
#               expert 2: (0, 0), of equals the first has the smaller rank: (0, 1/2): column 1 is
#
#   magnitude scores, softmax over the experts where not 1:
#               expert 1: (1, e^0 / (e^0 + e^½)) = (1, q), q = 1 / (1 + √e)
#               expert 2: (e^0 / (e^½ + e^0), 1) = (q, 1)
#   direction scores:
#               expert 1: (½, 1)   expert 2: (½, 1)
#   s           expert 1: (3/4, (1 + q)/2)   expert 2: ((q + ½)/2, 1)
#
#   merged = θ₀ + 3/4 · 2 in the corner, (1 + q)/2 · (1, -1) in column 1 of τ₁, and 1 · 1 of τ₂.
Q = 1 / (1 + np.exp(0.5))
WORKED_PRETRAINED = ((2.0, 0.0), (0.0, 1.0))
WORKED_EXPERTS = (((4.0, 1.0), (0.0, 0.0)), ((2.0, 0.0), (0.0, 2.0)))
WORKED_MERGED = ((3.5, (1 + Q) / 2), (0.0, 1 - (1 + Q) / 2 + 1))
