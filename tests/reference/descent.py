"""Adam and SGD with momentum, written out entry by entry; numpy, nothing of adamerge or torch."""

from collections.abc import Callable
from math import sqrt

import numpy as np

Gradient = Callable[[np.ndarray], np.ndarray]


def adam(gradient: Gradient, start: np.ndarray, lr: float, steps: int, beta: float = 0.9) -> np.ndarray:
    """As in the paper (arXiv:1412.6980), β₂ = 0.999 and ε = 1e-8."""
    found = start.copy()
    first, second = np.zeros_like(found), np.zeros_like(found)
    for step in range(1, steps + 1):
        slope = gradient(found)
        for place in np.ndindex(found.shape):
            first[place] = beta * first[place] + (1 - beta) * slope[place]
            second[place] = 0.999 * second[place] + 0.001 * slope[place] ** 2
            mean, square = first[place] / (1 - beta**step), second[place] / (1 - 0.999**step)
            found[place] -= lr * mean / (sqrt(square) + 1e-8)
    return found


def sgd(gradient: Gradient, start: np.ndarray, lr: float, steps: int, momentum: float) -> np.ndarray:
    """v ← momentum · v + g, x ← x - lr · v."""
    found, velocity = start.copy(), np.zeros_like(start)
    for _ in range(steps):
        velocity = momentum * velocity + gradient(found)
        found = found - lr * velocity
    return found
