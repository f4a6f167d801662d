"""The one differentiable merge: one pass over τ forward, one contraction over τ backward.

Either pass takes τ as it comes to the device (bank/streaming.py); one launch does what it can of that (fused.py), and
torch's operations do the rest tensor by tensor (kernels.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.bank import ParameterBank
from adamerge.bank.streaming import streamed
from adamerge.errors import ShapeError, shortlist
from adamerge.merging.fused import add_all, contract_all
from adamerge.merging.kernels import add_task_vectors, contract_task_vectors
from adamerge.merging.partition import Partition

_TOGETHER = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Bytes of gradients that a contraction waits for: few launches, and little memory that could be free."""


def merge(bank: ParameterBank, coefficients: Tensor, partition: Partition) -> dict[str, Tensor]:
    """θ₀ + Σ_k λ[k, g(p)] · τ_k[p] for every entry p.

    Differentiable in ``coefficients`` alone, once. The graph has one node, whatever the number of tasks and tensors.

    Args:
        bank: P parameters, K tasks.
        coefficients: λ, (K, G).
        partition: The map g into G groups.

    Returns:
        Merged tensors by key, shapes and dtype of ``bank.pretrained``.

    Raises:
        ShapeError: If ``coefficients`` is not (K, G).

    Source: Task Arithmetic, arXiv:2212.04089; AdaMerging, arXiv:2310.02575.
    """
    check_coefficients(bank, coefficients, partition)
    merged = _Merge.apply(coefficients, bank, partition)
    return dict(zip(bank.pretrained, merged, strict=True))  # type: ignore[arg-type]


@torch.no_grad()
def merge_into(
    out: Mapping[str, Tensor], bank: ParameterBank, coefficients: Tensor, partition: Partition
) -> Mapping[str, Tensor]:
    """``merge`` without a graph, into tensors that exist already."""
    weights = coefficients.detach()
    device = next(iter(bank.pretrained.values())).device
    for tasks, rows in streamed(bank.task_vectors, bank.pretrained, device):
        start = out if tasks.start else bank.pretrained  # tasks that come later are added to those before
        for key, part in add_all(out, start, rows, weights[tasks], partition).items():
            base = start[key].reshape(-1)
            add_task_vectors(out[key].view(-1), base, part, weights[tasks].to(base), partition.of(key))
    return out


@torch.no_grad()
def contract(bank: ParameterBank, gradients: Mapping[str, Tensor | None], partition: Partition) -> Tensor:
    """∂L/∂λ[k, g] = Σ_{p: g(p) = g} ∂L/∂θ[p] · τ_k[p], from the gradient of the merged weights.

    Args:
        bank: K tasks.
        gradients: ∂L/∂θ by key; a missing or None entry counts as zero.
        partition: G groups.

    Returns:
        (K, G), in the bank's dtype, added up in float64.
    """
    contraction = Contraction(bank, partition)
    found = {key: gradients.get(key) for key in bank.pretrained}
    contraction.add_all({key: gradient for key, gradient in found.items() if gradient is not None})
    return contraction.result()


class Contraction:
    """``contract``, one tensor at a time, so that a gradient can be freed as soon as it has been used.

    Args:
        bank: K tasks.
        partition: G groups.
    """

    def __init__(self, bank: ParameterBank, partition: Partition) -> None:
        self._bank, self._partition = bank, partition
        reference = next(iter(bank.pretrained.values()))
        wide = torch.float32 if reference.device.type == "mps" else torch.float64
        self._total = torch.zeros(partition.num_groups, bank.num_tasks, dtype=wide, device=reference.device)
        self._dtype = reference.dtype
        self._waiting: dict[str, Tensor] = {}

    def add(self, key: str, gradient: Tensor) -> None:
        """Take one tensor's ∂L/∂θ, of its shape. It must not change until ``result``: a few wait together."""
        if key in self._waiting:
            self._take_waiting()
        self._waiting[key] = gradient
        waiting = sum(tensor.nbytes for tensor in self._waiting.values())
        if waiting >= _TOGETHER.get(gradient.device.type, 0):
            self._take_waiting()

    @torch.no_grad()
    def add_all(self, gradients: Mapping[str, Tensor]) -> None:
        """Take ∂L/∂θ of some tensors at once, each of its tensor's shape."""
        for tasks, rows in streamed(self._bank.task_vectors, gradients, self._total.device):
            total = self._total[:, tasks]
            for key, part in contract_all(gradients, rows, self._partition, total).items():
                contract_task_vectors(part, gradients[key].reshape(-1), self._partition.of(key), total)

    def _take_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        self.add_all(waiting)

    def result(self) -> Tensor:
        """The sum over what was added, (K, G)."""
        self._take_waiting()
        return self._total.t().to(self._dtype).contiguous()


def check_coefficients(bank: ParameterBank, coefficients: Tensor, partition: Partition) -> None:
    """Raise ShapeError unless ``coefficients`` is (K, G) and the partition is one of the bank's tensors."""
    expected = (bank.num_tasks, partition.num_groups)
    if tuple(coefficients.shape) != expected:
        raise ShapeError(
            f"coefficients have shape {tuple(coefficients.shape)}, expected {expected}: one row per task and one "
            f"column per group of granularity '{partition.granularity}'."
        )
    sizes = partition.sizes
    if bad := [key for key, base in bank.pretrained.items() if sizes.get(key) != base.numel()]:
        raise ShapeError(
            f"the partition does not cover {shortlist(bad)}: it was built for other tensors. "
            "Build it from the shapes of this bank."
        )


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients: Tensor, bank: ParameterBank, partition: Partition) -> tuple[Tensor, ...]:
        ctx.bank, ctx.partition, ctx.dtype = bank, partition, coefficients.dtype
        ctx.set_materialize_grads(False)
        out = {
            key: torch.empty_like(base, memory_format=torch.contiguous_format) for key, base in bank.pretrained.items()
        }
        return tuple(merge_into(out, bank, coefficients, partition).values())

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        by_key = dict(zip(ctx.bank.pretrained, gradients, strict=True))
        return contract(ctx.bank, by_key, ctx.partition).to(ctx.dtype), None, None
