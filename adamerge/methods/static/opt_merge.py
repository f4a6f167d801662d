"""OptMerge: WUDI with the task vectors' noise left out by low ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.optim import SGD, Adam

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.coordinates import total
from adamerge.methods.matrices import svd
from adamerge.methods.protocol import Context
from adamerge.methods.static.matrixwise import matrixwise
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.static.wudi import Interference, check_descent


@dataclass(frozen=True, kw_only=True)
class OptMerge(Scaled):
    """Per matrix Δ that lowers Σ_k ‖(Δ - τ̂_k) R_kᵀ‖²/‖τ_k‖², any other tensor (1/K) Σ_k τ_k.

    With the best approximation []_r of rank r = ⌊min(m, n)/K⌋, R_k are the rows of [τ_k]_r (in their singular basis,
    S_r V_rᵀ), and the target τ̂_k is [τ_k - τ̄]_r + τ̄ about the mean τ̄, or [τ_k]_r. Descent starts at the sum or the
    mean of the τ_k and stops long before the minimum. A task that left the matrix alone takes no part but in τ̄; with
    more tasks than rows or columns r is 0, and Δ the start.

    Published are two forms: for experts that were fine-tuned in full ``centered=true start=sum optimizer=adam
    lr=1e-5``, and for those fine-tuned by LoRA ``centered=false start=mean optimizer=sgd lr=1e-4``.

    Args:
        centered: Whether targets are approximated about the mean.
        start: ``sum`` or ``mean``.
        optimizer: ``adam`` or ``sgd``.
        lr: Its learning rate.
        momentum: Of SGD; of Adam the first of its two decay rates.
        steps: How many.
        exclude: Shell patterns of keys whose matrices are merged by the mean, too.
        split_in_proj: Merge packed projections of queries, keys and values (3n x n) as three matrices, as models in
            Hugging Face's layout have them.

    Differs: the original scripts differentiate the loss in every step; here the same gradient comes from Gram matrices,
    and SGD's steps are taken together. One of the scripts takes a scaling of 0.1 for multimodal language models.

    Raises:
        ConfigError: If an option is out of range.

    Source: OptMerge (WUDI v2), arXiv:2505.19892.
    """

    centered: bool
    start: Literal["sum", "mean"]
    optimizer: Literal["adam", "sgd"]
    lr: float
    momentum: float
    steps: int
    exclude: Sequence[str]
    split_in_proj: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("sum", "mean"):
            raise ConfigError(f"descent starts at the 'sum' or the 'mean' of task vectors, found '{self.start}'.")
        if self.optimizer not in ("adam", "sgd"):
            raise ConfigError(f"unknown optimizer '{self.optimizer}'. Choose adam or sgd.")
        check_descent(self.lr, self.steps)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"method.momentum is in [0, 1), found {self.momentum}.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return matrixwise(self._merge, bank, exclude=self.exclude, split_in_proj=self.split_in_proj)

    def _merge(self, task_vectors: Tensor) -> Tensor:
        """(K, m, n) → (m, n)."""
        summed = total(task_vectors)
        mean = summed / len(task_vectors)
        rank = min(task_vectors.shape[1:]) // len(task_vectors)

        def terms() -> Iterator[tuple[Tensor, Tensor]]:
            center = mean.to(task_vectors.dtype)
            for matrix in task_vectors:
                if not matrix.any():
                    continue
                low, rows = _truncate(matrix, rank)
                if self.centered:
                    low = _truncate(matrix - center, rank)[0] + center
                yield low.to(summed.dtype), rows.to(summed.dtype) / matrix.norm()

        loss = Interference(summed if self.start == "sum" else mean, terms())
        if self.optimizer == "sgd":
            descent = partial(SGD, lr=self.lr, momentum=self.momentum)
            return loss.descend_apart(descent, self.steps).to(task_vectors.dtype)
        descent = partial(Adam, lr=self.lr, betas=(self.momentum, 0.999), fused=True)
        return loss.descend(descent, self.steps, task_vectors.dtype)


def _truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a rank, (m, n), and S Vᵀ of it, or rows with the same Gram matrix: (m, n), (r, n)."""
    if rank == min(matrix.shape):
        return matrix, matrix
    left, values, right = svd(matrix, rank)
    rows = values.unsqueeze(1) * right
    return left @ rows, rows
