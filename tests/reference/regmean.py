"""RegMean written down a second time (SPECS B13): normal equations by an explicit inverse; numpy, nothing of adamerge.

Also a small network whose inputs are followed by hand, and examples worked out by hand.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Weights = Mapping[str, np.ndarray]


def gram(tokens: np.ndarray) -> np.ndarray:
    """The mean of x xᵀ over tokens x, (N, n) → (n, n)."""
    total = np.zeros((tokens.shape[1], tokens.shape[1]))
    for token in tokens:
        total += np.outer(token, token)
    return total / len(tokens)


def weaken(matrix: np.ndarray, non_diagonal: float) -> np.ndarray:
    """γ G + (1 − γ) diag G."""
    return non_diagonal * matrix + (1 - non_diagonal) * np.diag(np.diag(matrix))


def solve(
    weights: Sequence[np.ndarray], grams: Sequence[np.ndarray], non_diagonal: float, ridge: float = 0.0
) -> np.ndarray:
    """Wᵀ = (Σ G̃_k + r D)⁻¹ (Σ G̃_k W_kᵀ + r D W̄ᵀ) with D = diag Σ G_k; (out, n)."""
    weak = [weaken(matrix, non_diagonal) for matrix in grams]
    pull = ridge * np.diag(np.diag(sum(grams)))
    left = sum(weak) + pull
    right = sum(matrix @ weight.T for matrix, weight in zip(weak, weights, strict=True))
    right = right + pull @ np.mean(weights, axis=0).T
    return (np.linalg.inv(left) @ right).T


def objective(
    merged: np.ndarray, weights: Sequence[np.ndarray], grams: Sequence[np.ndarray], non_diagonal: float, ridge: float
) -> float:
    """Σ_k tr((W − W_k) G̃_k (W − W_k)ᵀ) + r tr((W − W̄) D (W − W̄)ᵀ)."""
    far = [merged - weight for weight in weights]
    fit = sum(np.trace(d @ weaken(g, non_diagonal) @ d.T) for d, g in zip(far, grams, strict=True))
    from_mean = merged - np.mean(weights, axis=0)
    return float(fit + ridge * np.trace(from_mean @ np.diag(np.diag(sum(grams))) @ from_mean.T))


# A network of two blocks of two layers each, then a projection that is stored input-major:
#   h ← h + W_down · relu(W_up · h + b_up) for each block, features = h · P.

BLOCKS = (0, 1)


def up(block: int) -> str:
    return f"visual.resblocks.{block}.up.weight"


def bias(block: int) -> str:
    return f"visual.resblocks.{block}.up.bias"


def down(block: int) -> str:
    return f"visual.resblocks.{block}.down.weight"


PROJECTION = "visual.proj"


def inputs(weights: Weights, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """What every matrix is fed with, by its name, and what every block is, the output side last; (N, n) each."""
    fed, states = {}, [tokens]
    for block in BLOCKS:
        state = states[-1]
        hidden = np.maximum(state @ weights[up(block)].T + weights[bias(block)], 0)
        fed[up(block)], fed[down(block)] = state, hidden
        states.append(state + hidden @ weights[down(block)].T)
    fed[PROJECTION] = states[-1]
    return fed, states


def _merge_keys(
    keys: Sequence[str], experts: Sequence[Weights], fed: Sequence[Weights], non_diagonal: float, ridge: float
) -> dict[str, np.ndarray]:
    merged = {}
    for key in keys:
        weights = [expert[key] for expert in experts]
        if key not in fed[0]:
            merged[key] = np.mean(weights, axis=0)
            continue
        grams = [gram(of_task[key]) for of_task in fed]
        if key == PROJECTION:
            merged[key] = solve([weight.T for weight in weights], grams, non_diagonal, ridge).T
        else:
            merged[key] = solve(weights, grams, non_diagonal, ridge)
    return merged


def regmean(
    experts: Sequence[Weights], tokens: Sequence[np.ndarray], non_diagonal: float, ridge: float
) -> dict[str, np.ndarray]:
    """Every matrix on its own expert's inputs; ``tokens`` by task."""
    fed = [inputs(expert, of_task)[0] for expert, of_task in zip(experts, tokens, strict=True)]
    return _merge_keys(list(experts[0]), experts, fed, non_diagonal, ridge)


def regmean_pp(
    experts: Sequence[Weights], tokens: Sequence[np.ndarray], non_diagonal: float, ridge: float
) -> dict[str, np.ndarray]:
    """Block by block, carrying every task's states through the merged blocks; inside a block by the expert's layers."""
    merged: dict[str, np.ndarray] = {}
    states = list(tokens)
    for block in BLOCKS:
        keys = [up(block), bias(block), down(block)]
        fed = []
        for expert, state in zip(experts, states, strict=True):
            hidden = np.maximum(state @ expert[up(block)].T + expert[bias(block)], 0)
            fed.append({up(block): state, down(block): hidden})
        merged |= _merge_keys(keys, experts, fed, non_diagonal, ridge)
        for task, state in enumerate(states):
            hidden = np.maximum(state @ merged[up(block)].T + merged[bias(block)], 0)
            states[task] = state + hidden @ merged[down(block)].T
    merged |= _merge_keys([PROJECTION], experts, [{PROJECTION: state} for state in states], non_diagonal, ridge)
    return merged


# Worked examples, one output each.
#
# Two inputs that are correlated for the first task, γ = ½:
#   G₁ = [2 1; 1 2] → G̃₁ = [2 ½; ½ 2], G₂ = G̃₂ = I, W₁ = (1 0), W₂ = (0 1).
#   Σ G̃ = [3 ½; ½ 3], of determinant 35/4; Σ G̃ Wᵀ = (2, ½) + (0, 1) = (2, 3/2).
#   Wᵀ = 4/35 · [3 −½; −½ 3] (2, 3/2) = 4/35 · (21/4, 7/2) = (3/5, 2/5).
#   (γ = 1: [3 1; 1 3]⁻¹ (2, 1 + 1) = 1/8 · (4, 4) = (½, ½). γ = 0: (2/3, 1/3).)
CORRELATED = {
    "grams": (((2.0, 1.0), (1.0, 2.0)), ((1.0, 0.0), (0.0, 1.0))),
    "weights": (((1.0, 0.0),), ((0.0, 1.0),)),
    "merged": {0.5: (3 / 5, 2 / 5), 1.0: (1 / 2, 1 / 2), 0.0: (2 / 3, 1 / 3)},
}
# Three inputs: the first is used by task 1 only, the second by task 2 only, the third by none: W₁₁, W₂₂ and the mean.
DISJOINT = {
    "grams": (np.diag((4.0, 0.0, 0.0)).tolist(), np.diag((0.0, 0.5, 0.0)).tolist()),
    "weights": (((1.0, 2.0, 3.0),), ((-1.0, 5.0, 7.0),)),
    "merged": (1.0, 5.0, 5.0),
}
# One input, G₁ = 2, G₂ = 0, W₁ = 1, W₂ = 0, ridge 1: D = 2, W̄ = ½, W = (2·1 + 2·½) / (2 + 2) = ¾.
RIDGE = {"grams": (((2.0,),), ((0.0,),)), "weights": (((1.0,),), ((0.0,),)), "ridge": 1.0, "merged": (0.75,)}
