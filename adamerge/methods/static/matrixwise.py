"""What merges of matrices have in common: matrices by a rule of their own, any other tensor by its mean."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.methods.matrices import blocks_of, check_patterns
from adamerge.methods.static.scaling import MergeVectors

MergeMatrices = Callable[[Tensor], Tensor]
"""``task vectors of a matrix (K, m, n) → merged (m, n)``."""


def matrixwise(
    merge: MergeMatrices, bank: ParameterBank, *, exclude: Sequence[str], split_in_proj: bool
) -> MergeVectors:
    """Merge matrices by ``merge``; other tensors by the mean over tasks; matrices that nobody changed not at all.

    Args:
        merge: Is given only what is not zero altogether.
        bank: Whose keys the patterns must match.
        exclude: Shell patterns of keys that are not to be taken for matrices.
        split_in_proj: Whether packed projections of queries, keys and values are three matrices.

    Raises:
        ConfigError: If a pattern matches no key.
    """
    check_patterns(exclude, bank.pretrained)

    def merge_tensor(key: str, task_vectors: Tensor) -> Tensor:
        blocks = blocks_of(key, task_vectors, exclude=exclude, split_in_proj=split_in_proj)
        if not blocks:
            return task_vectors.mean(0)
        return torch.cat([merge(block) if block.any() else block[0] for block in blocks])

    return merge_tensor
