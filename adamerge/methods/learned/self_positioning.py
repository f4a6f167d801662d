"""Self Positioning: the weights of an iterated spherical interpolation and its norm, learned on a few images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Coefficients, Partition
from adamerge.methods.learned.gram import gram_matrices, tensor_groups
from adamerge.methods.learned.learner import Learner, column
from adamerge.methods.learned.slerp import Slerp


@dataclass(frozen=True, kw_only=True)
class SelfPositioning(Learner):
    """θ₀ + s · V: V joins the task vectors one after another by SLERP with weights a; a and s are learned.

    The loss is an objective on a probe set, data.images_per_task images of each task, plus norm_cost · s for its mean
    over tasks. What is learned and saved depends on the order of the tasks (suite.tasks), though its start does not.

    Args:
        granularity: What is joined as one vector: ``task`` the whole model, as published; ``block`` or ``tensor`` each
            of those, with a and s of its own.
        init: Initial λ, one number or one per task, at least 0; a and s that give it are computed.
        norm_cost: μ, what a norm s of 1 costs, the mean over groups if there are several.

    Raises:
        ConfigError: If an option is out of range.

    Differs: the paper's objective is contrastive, on pairs of texts; here it is entropy, without labels, or
    (``objective=cross_entropy``) the loss of a supervised learner. We found no word on its start, its optimiser's rate
    and steps: ours starts from equal λ, since equal a would halve the share of all earlier tasks at every step, and it
    learns log a, which keeps a positive.

    Source: Self Positioning, arXiv:2410.15035.
    """

    granularity: str
    init: float | Sequence[float]
    norm_cost: float

    def __post_init__(self) -> None:
        if self.norm_cost < 0:
            raise ConfigError(f"method.norm_cost is at least 0, found {self.norm_cost}.")

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        partition = Partition.build(self.granularity, bank.shapes)
        groups = torch.tensor(tensor_groups(partition, list(bank.pretrained)))
        by_tensor = gram_matrices(bank)[:, 1:, 1:].cpu()  # (L, K, K)
        gram = by_tensor.new_zeros(partition.num_groups, *by_tensor.shape[1:]).index_add_(0, groups, by_tensor)
        return partition, Coefficients(
            bank.num_tasks, partition.num_groups, init=column(self.init), constraint=Slerp(gram)
        )

    def penalty(self, coefficients: Tensor, raw: Tensor) -> Tensor | None:
        # The loss is a sum over tasks, which a cost beside their mean is a fraction of.
        return self.norm_cost * len(coefficients) * raw[-1].mean() if self.norm_cost else None
