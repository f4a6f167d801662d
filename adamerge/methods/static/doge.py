"""DOGE: one correction for all task vectors, found by gradient descent outside of the directions that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.optim import Adam

from adamerge.bank import ParameterBank
from adamerge.bank.keys import block_of
from adamerge.errors import ConfigError
from adamerge.methods.matrices import blocks_of, check_patterns, nonzero, svd
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.static.wudi import check_descent
from adamerge.methods.transforms.quantiles import kth_smallest


@dataclass(frozen=True, kw_only=True)
class Doge(Scaled):
    """Per matrix of a transformer block Σ_k λ_k m_k (τ_k + Δ) with λ_k = eta/‖τ_k‖; other tensors stay at θ₀.

    Δ, the same for all tasks, starts at zero and is moved by Adam to lower

        L = Σ_k Σ_rows (Σ_columns τ_k (τ_k - Σ_j λ_j τ_j - (Σ_j λ_j) Δ))²,

    what the merge takes from each task, by its inner product with the task's own rows; of the gradient g only
    g - P Pᵀ g is used. P holds the directions that the tasks share: of the matrix of each task's ⌊r/K⌋ leading left
    singular vectors, r = min(m, n), the ⌊r/shared_divisor⌋ leading left singular vectors. The mask m_k keeps τ_k's
    largest entries, by one magnitude for all these matrices together.

    The published code takes, of a model in Hugging Face's layout, the keys with ``encoder`` and ``weight`` in them but
    not ``layer_norm``: the projections of queries, keys, values and of attention's output, and both of the MLP, in
    every block. Those are the tensors of two dimensions in transformer blocks, which here are taken by that rule: in
    open_clip's layout ``attn.in_proj_weight`` (the first three beside each other, hence ``split_in_proj``),
    ``attn.out_proj.weight``, ``mlp.c_fc.weight`` and ``mlp.c_proj.weight``.

    Args:
        eta: Norm of every task's share in every matrix, before it is masked.
        density: Fraction of each task's entries that the mask keeps, in (0, 1].
        shared_divisor: How many times fewer directions are shared than the matrix has, 1 or more.
        lr: Of Adam.
        steps: Of Adam.
        exclude: Shell patterns of keys whose matrices stay at θ₀, too.
        split_in_proj: Take packed projections of queries, keys and values (3n x n) for three matrices, as the published
            code has them.

    Differs: this is the published code's loss; the documentation page's does not have τ_k as a factor. The published
    code takes whatever singular vectors LAPACK gives for singular values that are zero, and divides by ‖τ_k‖ = 0; here
    a task takes no part in a matrix that it left alone, and zero directions none in P. (With a single task, or where
    the tasks' vectors are orthogonal, all directions are shared alike and P is the decomposition's choice.)

    Raises:
        ConfigError: If an option is out of range, or nothing that is merged is such a matrix.

    Source: Adaptive Projective Gradient Descent, arXiv:2501.01230.
    """

    eta: float
    density: float
    shared_divisor: float
    lr: float
    steps: int
    exclude: Sequence[str]
    split_in_proj: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta > 0:
            raise ConfigError(f"method.eta is above 0, found {self.eta}.")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is the fraction of entries kept, in (0, 1]; found {self.density}.")
        if not self.shared_divisor >= 1:
            raise ConfigError(f"method.shared_divisor is 1 or more, found {self.shared_divisor}.")
        check_descent(self.lr, self.steps)

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        check_patterns(self.exclude, bank.pretrained)
        chosen = [key for key, shape in bank.shapes.items() if self._is_corrected(key, shape)]
        if not chosen:
            raise ConfigError(
                "DOGE merges the matrices of transformer blocks, of which there is none among the "
                f"{len(bank.pretrained)} merged tensors. Loosen model.include, model.exclude and method.exclude."
            )
        size = sum(bank.pretrained[key].numel() for key in chosen)
        limit = kth_smallest(
            lambda: (bank.task_vectors[key].abs() for key in context.track(chosen)),
            [max(1, size - int(self.density * size))],
        )[0]

        def merge(key: str, task_vectors: Tensor) -> Tensor:
            if key not in chosen:
                return torch.zeros_like(task_vectors[0])
            parts = blocks_of(key, task_vectors, exclude=(), split_in_proj=self.split_in_proj)
            return torch.cat([self._merge(part, limit) for part in parts])

        return merge

    def _is_corrected(self, key: str, shape: torch.Size) -> bool:
        excluded = any(fnmatchcase(key, pattern) for pattern in self.exclude)
        return len(shape) == 2 and block_of(key).startswith("block.") and not excluded

    def _merge(self, task_vectors: Tensor, limit: Tensor) -> Tensor:
        """(K, m, n), least magnitude that each task keeps (K,) → (m, n)."""
        norms = torch.linalg.matrix_norm(task_vectors)  # (K,)
        factors = torch.where(norms > 0, self.eta / torch.where(norms > 0, norms, 1), 0)
        shared = shared_directions(task_vectors, self.shared_divisor)
        correction = self._correction(task_vectors, factors, shared)
        merged = torch.zeros_like(correction)
        for task_vector, factor, least in zip(task_vectors, factors, limit, strict=True):
            kept = task_vector.abs().float() >= least
            merged += (factor * kept) * (task_vector + correction)
        return merged

    def _correction(self, task_vectors: Tensor, factors: Tensor, shared: Tensor) -> Tensor:
        """Δ, (m, n); of task vectors (K, m, n), λ (K,) and P (m, q)."""
        summed = factors.sum()
        by_row = task_vectors.transpose(0, 1).contiguous()  # (m, K, n), as both products of a step read it
        moved = torch.einsum("k,kmn->mn", factors, task_vectors)
        missing = torch.linalg.vecdot(by_row, by_row).unsqueeze(1)  # (m, 1, K), what is lost of each row where Δ = 0
        missing -= moved.unsqueeze(1) @ by_row.mT
        correction = torch.zeros_like(moved)
        descent = Adam([correction], lr=self.lr, fused=True)
        for _ in range(self.steps):
            lost = missing - summed * (correction.unsqueeze(1) @ by_row.mT)
            gradient = ((-2 * summed * lost) @ by_row).squeeze(1)  # (m, n)
            correction.grad = torch.addmm(gradient, shared, shared.mT @ gradient, alpha=-1)
            descent.step()
        return correction.detach()


def shared_directions(task_vectors: Tensor, divisor: float) -> Tensor:
    """P of ``Doge``, (m, q) with orthonormal columns, of task vectors (K, m, n)."""
    size = min(task_vectors.shape[1:])
    leading = [svd(matrix, size // len(task_vectors)) for matrix in task_vectors]
    stacked = torch.cat([left[:, nonzero(values)] for left, values, _ in leading], dim=1)
    if not stacked.numel():
        return stacked
    left, values, _ = svd(stacked, int(size / divisor))
    return left[:, nonzero(values)]
