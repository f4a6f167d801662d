"""Expert Merging and Expert Merging++: coefficients that make the merged model agree with each expert on its task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Coefficients, Partition
from adamerge.methods.learned.learner import Learner, column


@dataclass(frozen=True, kw_only=True)
class ExpertMerging(Learner):
    """λ per task and tensor, held near its start; with a budget then, anew, more of them where more is at stake.

    The loss is an objective that compares with the experts (``adamerge.objectives.Alignment``), summed over tasks, plus
    anchor · (1 / (K·G)) Σ |λ − init|. The second stage, Expert Merging++, starts from ``init`` again, with
    ``share_out``'s number of contiguous chunks per tensor; a tensor of none keeps ``init``.

    Args:
        constraint: As ``Coefficients`` takes it.
        init: Initial λ, one number or one per task: that of Task Arithmetic.
        anchor: γ, what the mean distance from ``init`` costs.
        budget: B, chunks of the second stage per tensor on average; None: there is no second stage.
        exponent: κ, 0 shares the chunks out evenly, above 1 it concentrates them on few tensors.

    Raises:
        ConfigError: If an option is out of range.

    Differs: the reference code learns the logit of λ (``method.constraint=sigmoid``) and divides the anchor by the
    number of tensors alone, so that its γ is ours divided by K. It excludes embeddings, norms, biases and the vision
    tower, all of a language model; here every tensor of the image tower takes part. It takes one image a step and
    accumulates 8 steps; here a step takes all images of all tasks. Its ++ only reads chunk counts from a file; they
    are computed here, as the paper says, with its B taken as a multiple of the number of tensors.

    Source: Expert Merging, arXiv:2509.25712.
    """

    constraint: str
    init: float | Sequence[float]
    anchor: float
    budget: float | None
    exponent: float

    def __post_init__(self) -> None:
        if self.anchor < 0:
            raise ConfigError(f"method.anchor is at least 0, found {self.anchor}.")
        if self.budget is not None and self.budget <= 0:
            raise ConfigError(f"method.budget is null or above 0, found {self.budget}.")
        if self.exponent < 0:
            raise ConfigError(f"method.exponent is at least 0, found {self.exponent}.")

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        partition = Partition.build("tensor", bank.shapes)
        init = column(self.init)
        return partition, Coefficients(bank.num_tasks, partition.num_groups, init=init, constraint=self.constraint)

    def penalty(self, coefficients: Tensor, raw: Tensor) -> Tensor | None:
        if self.anchor == 0:
            return None
        init = column(self.init).to(coefficients) if isinstance(self.init, Sequence) else self.init
        return self.anchor * (coefficients - init).abs().mean()

    def refine(
        self, stage: int, bank: ParameterBank, partition: Partition, coefficients: Tensor
    ) -> tuple[Partition, Coefficients] | None:
        counts = {key: count for key, (_, count) in self.shares(bank, coefficients).items()} if stage == 1 else {}
        if not counts:
            return None
        if not any(counts.values()):
            raise ConfigError(
                f"method.budget={self.budget:g} leaves no tensor a coefficient at method.exponent={self.exponent:g}. "
                "Raise the budget."
            )
        refined = Partition.in_chunks("importance", bank.shapes, {key: max(1, count) for key, count in counts.items()})
        fixed = torch.tensor([[counts.get(group) == 0 for group in refined.groups]])  # a single group lends the key
        return refined, Coefficients(
            bank.num_tasks, refined.num_groups, init=column(self.init), constraint=self.constraint, fixed=fixed
        )

    def shares(self, bank: ParameterBank, coefficients: Tensor) -> Mapping[str, tuple[float, int]]:
        if self.budget is None:
            return {}
        weights = self.importance(bank, coefficients)
        if not weights.any():
            return {}  # no expert differs from the pretrained model
        sizes = [shape.numel() for shape in bank.shapes.values()]
        counts = share_out(weights, sizes, budget=self.budget, exponent=self.exponent)
        return dict(zip(bank.shapes, zip(weights.tolist(), counts, strict=True), strict=True))

    def importance(self, bank: ParameterBank, coefficients: Tensor) -> Tensor:
        """Share of every tensor in what is added to the pretrained weights: Σ_k |λ_k| · ‖τ_k‖₁, of sum 1.

        (‖τ‖₁ is the paper's mean |τ| times the number of entries.)

        Args:
            bank: L tensors, read one at a time.
            coefficients: λ of the first stage, (K, L).

        Returns:
            (L,), float64; all 0 if nothing is added.
        """
        norms = torch.stack(
            [bank.task_vectors[key].flatten(1).abs().sum(1, dtype=torch.float64) for key in bank.pretrained]
        )
        weights = (norms * coefficients.abs().T.to(norms)).sum(1)
        return weights / weights.sum() if weights.any() else weights


def share_out(importance: Tensor, sizes: Sequence[int], *, budget: float, exponent: float) -> list[int]:
    """Chunks per tensor: ⌊budget · L · I^exponent / Σ I^exponent⌋, but never more than it has entries.

    Args:
        importance: I, (L,), at least 0 and not all 0.
        sizes: Entries of the L tensors.
        budget: B, chunks per tensor on average, were nothing rounded down.
        exponent: κ.

    Returns:
        L numbers from 0.
    """
    shares = importance**exponent
    exact = budget * len(sizes) * shares / shares.sum()
    whole = (exact + 1e-9).floor().long().tolist()  # a whole number stays one, whatever its last bit
    return [min(count, size) for count, size in zip(whole, sizes, strict=True)]
