"""WUDI: a merged vector whose distance to each task vector lies outside of what that task's inputs span."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.coordinates import total
from adamerge.methods.matrices import svd
from adamerge.methods.protocol import Context
from adamerge.methods.static.matrixwise import matrixwise
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class WudiMerging(Scaled):
    """Per matrix Δ that lowers Σ_k ‖(Δ - τ_k) τ_kᵀ‖²/‖τ_k‖² from Δ = Σ_k τ_k, any other tensor (1/K) Σ_k τ_k.

    The rows of τ_k are combinations of inputs that the layer was fine-tuned on, so that they stand for these. As
    published, Adam is stopped long before the minimum; with ``solver=closed`` Δ is the minimum, of all such the one
    nearest to Σ_k τ_k. What depends on the tasks is gathered once in an n x n matrix, as ``Interference`` says. A task
    that left the matrix alone takes no part.

    Args:
        solver: ``adam`` or ``closed``.
        lr: Of Adam.
        steps: Of Adam.
        ridge: Of the closed form: adds ridge · ‖Δ - Σ_k τ_k‖² to what is minimised. Without it directions are left
            alone in which the τ_k, beside their largest one, hold nothing but rounding.
        exclude: Shell patterns of keys whose matrices are merged by the mean, too.
        split_in_proj: Merge packed projections of queries, keys and values (3n x n) as three matrices, as models in
            Hugging Face's layout have them.

    Differs: the original code differentiates the loss, from τ, in every step; here the same gradient comes from Gram
    matrices. FusionBench takes 400 steps, has CLIP's projection to features (visual.proj) transposed, and divides by
    the norm of a matrix that a task left alone. The closed form is neither's.

    Raises:
        ConfigError: If an option is out of range.

    Source: WUDI-Merging, arXiv:2503.08099.
    """

    solver: Literal["adam", "closed"]
    lr: float
    steps: int
    ridge: float
    exclude: Sequence[str]
    split_in_proj: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in ("adam", "closed"):
            raise ConfigError(f"unknown solver '{self.solver}'. Choose adam or closed.")
        check_descent(self.lr, self.steps)
        if not self.ridge >= 0:
            raise ConfigError(f"method.ridge is 0 or more, found {self.ridge}.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return matrixwise(self._merge, bank, exclude=self.exclude, split_in_proj=self.split_in_proj)

    def _merge(self, task_vectors: Tensor) -> Tensor:
        """(K, m, n) → (m, n)."""
        start = total(task_vectors)
        changed = (matrix.to(start.dtype) for matrix in task_vectors if matrix.any())
        loss = Interference(start, ((matrix, matrix / matrix.norm()) for matrix in changed))
        if self.solver == "closed":
            return loss.minimum(self.ridge).to(task_vectors.dtype)
        return loss.descend(lambda free: Adam(free, lr=self.lr, fused=True), self.steps, task_vectors.dtype)


class Interference:
    """L(Δ) = Σ_k ‖(Δ - target_k) rows_kᵀ‖², as a quadratic in X = Δ - start.

    Its gradient is 2 (C + X H) with H = Σ_k rows_kᵀ rows_k, (n, n), and C = Σ_k (start - target_k) rows_kᵀ rows_k,
    (m, n). They are computed once; a step of descent is then one product of (m, n) and (n, n) whatever K, or two
    smaller ones where all rows together are less than half as many as columns. Where ``start`` is the target of the
    only task C is exactly zero, so that nothing moves.

    Args:
        start: (m, n), float64 where the device has it.
        terms: Per task a target (m, n) and rows (r, n) of the same dtype.
    """

    def __init__(self, start: Tensor, terms: Iterable[tuple[Tensor, Tensor]]) -> None:
        columns = start.shape[1]
        self.start = start
        self.constant = torch.zeros_like(start)
        self.gram = start.new_zeros(columns, columns)
        self.rows: Tensor | None = start.new_zeros(0, columns)  # of all tasks, as long as they are few
        for target, rows in terms:
            gram = rows.mT @ rows
            self.gram += gram
            apart = start - target
            self.constant += apart @ rows.mT @ rows if 2 * len(rows) < columns else apart @ gram
            if self.rows is not None:
                stacked = torch.cat([self.rows, rows])
                self.rows = stacked if 2 * len(stacked) < columns else None

    def descend(self, optimizer: Callable[[list[Tensor]], Optimizer], steps: int, dtype: torch.dtype) -> Tensor:
        """Δ after so many steps from ``start``, (m, n), computed in ``dtype``."""
        moved = torch.zeros_like(self.start, dtype=dtype)
        constant = 2 * self.constant.to(dtype)
        right = 2 * (self.gram if self.rows is None else self.rows).to(dtype)
        left = None if self.rows is None else self.rows.mT.to(dtype)
        descent = optimizer([moved])
        for _ in range(steps):
            moved.grad = torch.addmm(constant, moved if left is None else moved @ left, right)
            descent.step()
        return (self.start + moved.detach()).to(dtype)

    def descend_apart(self, optimizer: Callable[[list[Tensor]], Optimizer], steps: int) -> Tensor:
        """Δ after so many steps from ``start``, (m, n) in its dtype, by an optimiser linear in gradients, as SGD is.

        Whatever their number it takes one decomposition and two products. From 0 such steps stay at X = C V diag(x) Vᵀ,
        on the eigenvectors V of H with the eigenvalues h, and each direction descends by itself: the gradient of X is
        2 C V diag(1 + x h) Vᵀ.
        """
        values, vectors = self._directions()
        moved = torch.zeros_like(values)
        descent = optimizer([moved])
        for _ in range(steps):
            moved.grad = 2 * (1 + moved * values)
            descent.step()
        return self.start + ((self.constant @ vectors) * moved.detach()) @ vectors.mT

    def minimum(self, ridge: float) -> Tensor:
        """start - C (H + ridge I)⁻¹, (m, n), on the eigenvectors of H whose eigenvalue is more than rounding.

        An eigenvalue is the square of a singular value of all rows below each other, and counts above 16 units of
        float32's rounding of the largest singular value, squared.
        """
        values, vectors = self._directions()
        kept = values > (16 * torch.finfo(torch.float32).eps) ** 2 * values.max()
        inverse = torch.where(kept, 1 / torch.where(kept, values + ridge, 1), 0)
        return self.start - ((self.constant @ vectors) * inverse) @ vectors.mT

    def _directions(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (q,) and eigenvectors (n, q) of H, without some whose value is 0 and in which C holds nothing."""
        if self.rows is not None:
            _, values, right = svd(self.rows)
            return values.square(), right.mT
        gram = self.gram.cpu() if self.gram.device.type == "mps" else self.gram
        values, vectors = torch.linalg.eigh(gram)
        return values.to(self.gram.device), vectors.to(self.gram.device)


def check_descent(lr: float, steps: int) -> None:
    """Raise ConfigError unless ``lr`` is above 0 and ``steps`` a count."""
    if not lr > 0:
        raise ConfigError(f"method.lr is above 0, found {lr}.")
    if steps < 0:
        raise ConfigError(f"method.steps is a count, 0 or more; found {steps}.")
