"""SLERP: task vectors, or experts, joined one after another along great circles."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Partition
from adamerge.methods.learned.gram import gram_matrices, tensor_groups
from adamerge.methods.protocol import Context
from adamerge.methods.slerp import join, unit_gram
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.static.weighted_average import TaskWeights, normalized


@dataclass(frozen=True, kw_only=True)
class SlerpMerging(Scaled):
    """θ₀ + scaling · V_K, where V_1 = τ_1 and

    V_i = [sin((1 - β)α) V_{i-1} + sin(βα) τ_i] / sin α,  β = a_i / (a_i + what stands for a_1 … a_{i-1}),

    with α the angle between V_{i-1} and τ_i; or θ₀ + scaling · (V_K - θ₀), where experts take the place of task
    vectors. Where α is almost 0° or 180°, or a vector is zero, the step is linear. What comes out depends on the order
    of the tasks (suite.tasks), unless there are two.

    Args:
        of: ``task_vectors``, as published for more than two, or ``weights``: the experts themselves.
        granularity: What is joined as one vector: ``task`` the whole model; ``block`` or ``tensor`` each of those.
        weights: a by task or in the order of the tasks, up to a factor; equal ones if there are none. Of two,
            (1 - t, t) make β the usual fraction t.
        against: What a_i is weighed against: ``mean`` of the weights before it, as published, so that equal ones halve
            the share of all that came before; or their ``sum``, so that equal ones give equal shares.
        parallel: Magnitude of a cosine above which a step is linear.

    Differs: mergekit and FusionBench join two experts, tensor by tensor: ``of=weights granularity=tensor``. They take
    a zero vector for one at a right angle to all others.

    Raises:
        ConfigError: If an option is out of range, or the weights are not one for every task.

    Source: the iteration: Self Positioning, arXiv:2410.15035; SLERP is Shoemake's, SIGGRAPH 1985.
    """

    of: Literal["task_vectors", "weights"]
    granularity: str
    weights: TaskWeights
    against: Literal["mean", "sum"]
    parallel: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("task_vectors", "weights"):
            raise ConfigError(f"method.of is 'task_vectors' or 'weights', found '{self.of}'.")
        if self.against not in ("mean", "sum"):
            raise ConfigError(f"method.against is 'mean' or 'sum', found '{self.against}'.")
        if not 0 <= self.parallel <= 1:
            raise ConfigError(f"method.parallel is a cosine in [0, 1], found {self.parallel:g}.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        shares = normalized(self.weights, bank.task_names)
        partition = Partition.build(self.granularity, bank.shapes)
        groups = dict(zip(bank.pretrained, tensor_groups(partition, list(bank.pretrained)), strict=True))
        by_tensor = gram_matrices(bank)  # (L, 1 + K, 1 + K)
        gram = by_tensor.new_zeros(partition.num_groups, *by_tensor.shape[1:])
        gram.index_add_(0, torch.tensor(list(groups.values()), device=gram.device), by_tensor)
        joined = self._joined(gram, shares)  # (K, G)
        of_pretrained = joined.sum(0) - 1  # of θ₀ in V - θ₀, (G,)

        def merge(key: str, task_vectors: Tensor) -> Tensor:
            group = groups[key]
            vector = torch.tensordot(joined[:, group].to(task_vectors), task_vectors, dims=1)
            if self.of == "weights":
                vector += of_pretrained[group].to(vector) * bank.pretrained[key].to(vector)
            return vector

        return merge

    def _joined(self, gram: Tensor, shares: list[float]) -> Tensor:
        """The coefficients of V_K, (K, G).

        Args:
            gram: Inner products of θ₀ and all τ, (G, 1 + K, 1 + K).
            shares: a, K of them.
        """
        products = gram[:, 1:, 1:]
        if self.of == "weights":
            products = products + gram[:, 1:, :1] + gram[:, :1, 1:] + gram[:, :1, :1]
        gram = unit_gram(products)
        coefficients, square = torch.ones_like(gram[:, :1, 0]).T, gram[:, 0, 0]
        for task in range(1, len(shares)):
            before = sum(shares[:task]) / (task if self.against == "mean" else 1)
            total = shares[task] + before
            new = torch.full_like(square, shares[task] / total if total else 0)
            coefficients, square = join(coefficients, square, gram, 1 - new, new, parallel=1 - self.parallel**2)
        return coefficients
