"""OPCM: experts merged one after another, each without what it has in common with those before it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import CheckpointError, ConfigError, KeyMismatchError, shortlist
from adamerge.methods.matrices import blocks_of, check_patterns, nonzero, svd
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class Opcm(Scaled):
    """θ₀ + scaling · Δ_K, where Δ₁ = τ₁ and Δ_t = (λ_{t-1} Δ_{t-1} + τ̃_t)/λ_t.

    λ_t makes the norm of Δ_t, over all tensors, the mean of ‖τ₁‖, …, ‖τ_t‖. Per matrix, with Δ_{t-1} = U diag(σ) Vᵀ
    and r the number of leading σ whose shares of Σσ add up to at most dominant_share, τ̃ is τ without the leading r x r
    block of Uᵀ τ V and without its diagonal. Other tensors: τ̃ = τ. The result depends on the order of the tasks. Since
    λ_t Δ_t = τ₁ + τ̃₂ + … + τ̃_t, and a factor changes neither U, V nor r, every tensor can be merged by itself, and what
    is left for the end is a single factor.

    A bank holds all experts at once; ``ContinualOpcm`` takes them as they come, and says how.

    Args:
        dominant_share: α, of the sum of singular values.
        shuffle: Whether the order is drawn, from ``seed`` and the tasks' names; else it is that of suite.tasks.
        seed: Of the order.
        exclude: Shell patterns of keys that are not to be taken for matrices.
        split_in_proj: Take packed projections of queries, keys and values (3n x n) for three matrices.

    Differs: FusionBench, the authors' own code, leaves parameters that belong to no leaf module (class_embedding) at
    the first expert's value, shrunk by every λ; here they are summed as others are. It takes whole bases U and V also
    where σ is zero, and so removes a diagonal in directions of LAPACK's choosing; here those with σ > 0. Its r is 0,
    not all, where α is 1. In open_clip's layout q, k and v are one matrix (``split_in_proj``), in FusionBench's three.

    Raises:
        ConfigError: If ``dominant_share`` is out of range.

    Source: Merging Models on the Fly Without Retraining, arXiv:2501.09522.
    """

    dominant_share: float
    shuffle: bool
    seed: int
    exclude: Sequence[str]
    split_in_proj: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dominant_share <= 1:
            raise ConfigError(f"method.dominant_share is from 0 to 1, found {self.dominant_share}.")

    def order(self, task_names: Sequence[str]) -> list[int]:
        """Indices of the tasks in the order in which they are merged."""

        def drawn(index: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/{task_names[index]}".encode()).digest()

        indices = range(len(task_names))
        return sorted(indices, key=drawn) if self.shuffle else list(indices)

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        check_patterns(self.exclude, bank.pretrained)
        order = self.order(bank.task_names)
        sums: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for key in context.track(list(bank.pretrained)):
            task_vectors = _wide(bank.task_vectors[key])
            total = task_vectors[order[0]].clone()
            for index in order[1:]:
                total += self.projected(key, total, task_vectors[index])
            norms.append(torch.stack([_norm(vector) for vector in (*task_vectors, total)]))
            sums[key] = total
        *own, merged = torch.linalg.vector_norm(torch.stack(norms), dim=0).tolist()
        factor = sum(own) / len(own) / merged if merged else 1
        return lambda key, task_vectors: sums.pop(key).mul_(factor)

    def projected(self, key: str, total: Tensor, task_vector: Tensor) -> Tensor:
        """τ̃ of one tensor, given a multiple of Δ_{t-1}; a new tensor unless it is τ itself."""
        options = {"exclude": self.exclude, "split_in_proj": self.split_in_proj}
        before, new = blocks_of(key, total[None], **options), blocks_of(key, task_vector[None], **options)
        if not (before and total.any() and task_vector.any()):
            return task_vector
        return torch.cat([self._project(*pair) for pair in zip(before, new, strict=True)], dim=1)[0]

    def _project(self, before: Tensor, new: Tensor) -> Tensor:
        """(1, m, n), (1, m, n) → (1, m, n)."""
        left, values, right = (part[0] for part in svd(before))
        known = nonzero(values)
        left, values, right = left[:, known], values[known], right[known]
        inner = left.mT @ new[0]  # (r, n)
        sums = (values.double() if values.device.type != "mps" else values).cumsum(0)
        leading = int((sums <= self.dominant_share * sums[-1:]).sum())
        removed = (inner * right).sum(1, keepdim=True) * right  # the diagonal
        removed[:leading] = inner[:leading] @ right[:leading].mT @ right[:leading]
        return new - left @ removed


class ContinualOpcm:
    """OPCM for experts that come one at a time; each may be deleted as soon as it has been accepted.

    >>> continual = ContinualOpcm(method, pretrained)
    >>> continual.accept(read_checkpoint(Path("mnist.safetensors")))  # whenever one arrives
    >>> weights = continual.merged()  # of all so far
    >>> torch.save(continual.state_dict(), "opcm.pt")  # to go on another day: load_state_dict

    Beside θ₀ it holds one vector of the model's size and two numbers, however many experts it has seen. The result is
    that of ``Opcm`` on a bank of the same experts in the order of their arrival.

    Args:
        method: The options; its order and transform have no say.
        pretrained: θ₀, of the keys that are to be merged (``bank.select_keys``) and no others; shared, not copied.

    Raises:
        ConfigError: If a pattern of ``exclude`` matches no key.
    """

    def __init__(self, method: Opcm, pretrained: Mapping[str, Tensor]) -> None:
        check_patterns(method.exclude, pretrained)
        self.method = method
        self.pretrained = pretrained
        self.num_experts = 0
        self._norms = 0.0
        self._sum = {key: _wide(torch.zeros_like(base)) for key, base in pretrained.items()}

    @torch.no_grad()
    def accept(self, expert: Mapping[str, Tensor]) -> None:
        """Merge one more expert, given by its weights; other keys than those of θ₀ are ignored.

        Raises:
            KeyMismatchError: If it lacks a key of the pretrained model or has another shape there.
            CheckpointError: If it holds NaN or Inf. After either error it counts as not accepted.
        """
        self._check(expert, "the expert")
        if bad := [key for key in self.pretrained if not expert[key].isfinite().all()]:
            raise CheckpointError(
                f"the expert holds NaN or Inf in {shortlist(bad)}. Fine-tune it again or leave it out."
            )
        squares = 0.0
        for key, base in self.pretrained.items():
            task_vector = _wide(expert[key].to(base)) - _wide(base)
            squares += float(_norm(task_vector)) ** 2
            self._sum[key] += self.method.projected(key, self._sum[key], task_vector)
        self._norms += squares**0.5
        self.num_experts += 1

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """θ₀ + scaling · Δ of all experts so far, in the dtypes of θ₀; θ₀ before the first.

        Raises:
            ConfigError: If the method's scaling is to be searched for.
        """
        if isinstance(self.method.scaling, str):
            raise ConfigError("a continual merge has no labelled split to search on. Give the scaling as a number.")
        norm = sum(float(_norm(total)) ** 2 for total in self._sum.values()) ** 0.5
        factor = self.method.scaling * self._norms / self.num_experts / norm if norm else 0
        return {key: base + (self._sum[key] * factor).to(base.dtype) for key, base in self.pretrained.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on in another process, beside θ₀: numbers and a dict of tensors, shared, not copied."""
        return {"num_experts": self.num_experts, "norms": self._norms, "sum": self._sum}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            KeyMismatchError: If it belongs to another pretrained model's keys or shapes.
        """
        self._check(state["sum"], "the saved state")
        for key, total in self._sum.items():
            total.copy_(state["sum"][key])
        self.num_experts, self._norms = state["num_experts"], state["norms"]

    def _check(self, tensors: Mapping[str, Tensor], name: str) -> None:
        if bad := [
            key for key, base in self.pretrained.items() if key not in tensors or tensors[key].shape != base.shape
        ]:
            raise KeyMismatchError(
                f"{name} lacks {len(bad)} tensors of the pretrained model, or has them in another shape "
                f"({shortlist(bad)}). Does it belong to this model?"
            )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=tensor.dtype if tensor.device.type == "mps" else torch.float64)
