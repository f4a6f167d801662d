"""RegMean: every linear layer by least squares on the inputs of the experts, and RegMean++: on those that will come."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.keys import block_of
from adamerge.errors import ConfigError
from adamerge.merging import Partition
from adamerge.methods.protocol import Context, Statistic
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class RegMean(Scaled):
    """θ₀ + scaling · v, where v makes linear layers put out what the experts' do, on each expert's own inputs.

    With G_k = X_kᵀX_k / N_k of the inputs X_k of a linear layer of expert k, G̃_k = non_diagonal · G_k off the diagonal
    and G_k on it, and D = diag(Σ_k G_k), the merged weight W (out, n) minimises

        Σ_k tr((W − W_k) G̃_k (W − W_k)ᵀ) + ridge · tr((W − W̄) D (W − W̄)ᵀ),   W̄ the mean of the W_k.

    It is solved for W − W̄ by Cholesky in float64 (float32 on mps), so that directions in which no expert has any input
    take the mean, equal Gram matrices give exactly the mean and one expert alone exactly itself. All other tensors
    (biases, norms, convolutions, embeddings) and those without a Gram matrix take the mean.

    With ``preceding: merged`` (RegMean++) the network is merged block by block: X_k of a block are what expert k's
    images become in the merged blocks before it. Within the block they pass expert k's own layers, as in the published
    code, so that a tower of L blocks costs L + 1 passes of its images. A transform changes what is merged, not the
    experts that the inputs come from, and the merged blocks of the walk are those of a scaling of 1.

    Args:
        inputs: Gram matrices of the inputs by key; ``adamerge.statistics.InputGrams``.
        non_diagonal: What is kept of the entries off the diagonal, in [0, 1]; the papers' α or γ.
        ridge: Pull towards the mean, as a fraction of each input's mean square; 0 for none.
        preceding: Whose blocks the images pass before a layer: ``own`` or ``merged``.

    Differs: the papers have no ridge and invert; with non_diagonal below 1, 1e-6 is far below what that itself adds.
    RegMean's paper sums over the tokens where its code, as here, takes their mean; it uses training images, this the
    unlabeled ones that learners adapt on. FusionBench leaves CLIP's projection pretrained, here ``visual.proj`` is
    merged as it belongs to the experts (``inputs.exclude`` gives it the mean); in RegMean++ it also leaves the last
    norm pretrained.

    Raises:
        ConfigError: If an option is out of range, statistics are missing, or Gram matrices are singular.

    Source: RegMean, arXiv:2212.09849; RegMean++, arXiv:2508.03121.
    """

    inputs: Statistic
    non_diagonal: float
    ridge: float
    preceding: Literal["own", "merged"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.non_diagonal <= 1:
            raise ConfigError(f"non_diagonal is the fraction of entries kept, in [0, 1]; found {self.non_diagonal}.")
        if not self.ridge >= 0:
            raise ConfigError(f"ridge is at least 0, found {self.ridge}.")
        if self.preceding not in ("own", "merged"):
            raise ConfigError(f"preceding is 'own' or 'merged', found '{self.preceding}'.")

    @property
    def statistic(self) -> Statistic:
        return self.inputs

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        if self.preceding == "merged":
            vectors = self._walk(bank, context)
            return lambda key, task_vectors: vectors[key]
        if not context.statistics:
            raise ConfigError("RegMean needs Gram matrices of the experts' inputs. Exclude less in method.inputs.")
        return self._merge_on(context.statistics)

    def _walk(self, bank: ParameterBank, context: Context) -> dict[str, Tensor]:
        """Merged vectors by key, from the embedding to the output."""
        if context.recompute is None:
            raise ConfigError("RegMean++ needs a context that recomputes the experts' inputs. Give one.")
        vectors: dict[str, Tensor] = {}
        for block in context.track(list(Partition.build("block", bank.shapes).groups)):
            keys = [key for key in bank.pretrained if block_of(key) == block]
            before = {key: bank.pretrained[key] + vector for key, vector in vectors.items()}
            merge = self._merge_on(context.recompute(before, keys))
            del before
            for key in keys:
                vectors[key] = merge(key, bank.task_vectors[key]).to(bank.pretrained[key].dtype)
        return vectors

    def _merge_on(self, grams: Mapping[str, Tensor]) -> MergeVectors:
        known = set(grams)

        def merge(key: str, task_vectors: Tensor) -> Tensor:
            wide = torch.float32 if task_vectors.device.type == "mps" else torch.float64
            mean = task_vectors.mean(0, dtype=wide)
            if key not in known:
                return mean
            of_key = grams[key].to(mean.device)
            if key.endswith("weight"):
                return mean + self._correction(key, of_key, task_vectors, mean)
            return mean + self._correction(key, of_key, task_vectors.mT, mean.mT).mT  # visual.proj is stored (n, out)

        return merge

    def _correction(self, key: str, grams: Tensor, rows: Tensor, center: Tensor) -> Tensor:
        """What the minimum is away from the mean, (out, n).

        Args:
            key: Whose.
            grams: (K, n, n).
            rows: Task vectors (K, out, n).
            center: Their mean (out, n) in the dtype to compute in.
        """
        total, pull = center.new_zeros(grams.shape[1:]), torch.zeros_like(center)
        for gram, row in zip(grams, rows, strict=True):
            weakened = gram.to(center.dtype) * self.non_diagonal
            weakened.diagonal().copy_(gram.diagonal())
            total += weakened
            pull += (row - center) @ weakened
        size = total.diagonal().sqrt()
        unused = size == 0
        size = size.masked_fill(unused, 1)
        total /= size.outer(size)
        total.diagonal().add_(self.ridge).masked_fill_(unused, 1)
        factor, failed = torch.linalg.cholesky_ex(total)
        if failed:
            raise ConfigError(
                f"the Gram matrices of '{key}' are singular. Raise method.ridge (found {self.ridge}) or lower "
                f"method.non_diagonal (found {self.non_diagonal})."
            )
        return torch.cholesky_solve((pull / size).mT, factor).mT / size
