"""FW-Merging: steps towards the experts that a linear model of the loss points to, within their convex hull."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Coefficients, MergedModel, Partition, contract
from adamerge.methods.learned.gram import gram_matrices, tensor_groups
from adamerge.methods.learned.learner import Learner, column
from adamerge.methods.learned.simplex import project_to_simplex


@dataclass(frozen=True, kw_only=True)
class FrankWolfe(Learner):
    """min L over the convex hull of the start and all experts, by the steps of ``HardFrankWolfe`` or
    ``SoftFrankWolfe``, whichever is the optimiser.

    An expert is a one-hot λ, and the hull is one of λ's, in every group by itself: a step costs one pass over τ for the
    merge and one for the gradient, and holds no weights but the bank's, however many experts there are.

    Args:
        granularity: What goes its own way through the hull, as ``Partition.build`` takes it: ``task`` is the paper's
            task-wise form, ``tensor`` its layer-wise one.
        init: λ of the start, one number or one per task: that of Task Arithmetic; 0: the pretrained model.

    Differs: the paper's hull is that of the experts alone; as in the reference code the start belongs to it, lest the
    first iterates lie outside. The objective is entropy, without labels; the published one is
    ``objective=cross_entropy``, on labelled images. The published soft form starts at the pretrained model, from which
    entropy gives a task up on the embedded suite. Where the reference code's merge function would shorten the step by
    a factor of 0.3, optimizer.lr alone says how far it goes.

    Source: FW-Merging, arXiv:2503.12649.
    """

    granularity: str
    init: float | Sequence[float]

    def prepare(self, bank: ParameterBank) -> tuple[Partition, Coefficients]:
        partition = Partition.build(self.granularity, bank.shapes)
        return partition, Coefficients(
            bank.num_tasks, partition.num_groups, init=column(self.init), constraint="identity"
        )


class HardFrankWolfe(torch.optim.Optimizer):
    """λ ← λ + η_t (s − λ), η_t = lr · 2 / (t + 2) for t = 0, 1, …, towards the vertex s that the oracle chooses in
    every group.

    Vertices are the experts and the start, which is where the first step finds λ. A group stays where it is if by the
    linear model no vertex is better, and all of them do once the gap has fallen to the tolerance.

    Args:
        parameters: λ itself, one parameter (K, G).
        lr: At most 1; with 1 the first step ends in a vertex, and the start counts for nothing.
        oracle: What is least at the vertex s = θ_s: ``inner_product``, ⟨g, θ_s − θ_t⟩ for g = ∂L/∂θ; or ``cosine``,
            Σ_l cos(g_l, θ_s,l) over the tensors l of a group, 0 where either is zero.
        tolerance: The run ends at a gap that is not above it, in the loss's unit.

    Attributes:
        gap: Σ_groups max_s ⟨g, θ_t − θ_s⟩, in the loss's unit, at the λ before the last step: by so much at most could
            the loss fall within the hull, if it were convex.

    Raises:
        ConfigError: If an option is out of range, or the cosine oracle is to choose for parts of tensors.

    Differs: the paper's oracle is the inner product, and so is the default; the reference code's is the cosine, with
    lr = 0.03.

    Source: FW-Merging, arXiv:2503.12649.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, oracle: str, tolerance: float) -> None:
        if not 0 < lr <= 1:
            raise ConfigError(f"optimizer.lr lies in (0, 1] for Frank-Wolfe steps, found {lr:g}.")
        super().__init__(parameters, {"lr": lr})
        self.gap: Tensor | None = None
        self.tolerance = tolerance
        self._vertices = _Vertices(self, oracle)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step; the closure is called first, if there is one."""
        loss = _called(closure)
        vertices = self._vertices
        coefficients, state = vertices.coefficients, vertices.state
        slopes = vertices.slopes()
        gaps = vertices.gaps(slopes)  # (G,)
        self.gap = gaps.sum()
        best = vertices.scores(slopes).argmin(0, keepdim=True)  # (1, G)
        rate = self.param_groups[0]["lr"] * 2 / (state["step"] + 2)
        moves = (gaps > 0) & (self.gap > self.tolerance)
        coefficients.lerp_(vertices.mixed(best, torch.ones_like(slopes[:1])), rate * moves.to(coefficients))
        state["step"] += 1
        return loss


class SoftFrankWolfe(torch.optim.Optimizer):
    """Every few steps the oracle chooses the best vertices; each step then moves λ within the hull of those and of
    where the choice was made, by projected gradient on its weights w: w ← Π_Δ(w − lr · ∂L/∂w).

    Args:
        parameters: λ itself, one parameter (K, G).
        lr: Rate of w, per unit of the loss.
        vertices: How many of the experts and the start are chosen; all if there are no more.
        choose_every: Steps from one choice to the next.
        shared: Whether all groups get the same vertices, those of the least sum of scores, though weights of their own.
        oracle: As ``HardFrankWolfe`` takes it.
        tolerance: Likewise.

    Attributes:
        gap: As ``HardFrankWolfe`` has it.

    Raises:
        ConfigError: If an option is out of range, or the cosine oracle is to choose for parts of tensors.

    Differs: the reference code chooses one expert by each task's own gradient, by cosine; then it learns unbounded
    factors of θ_s − θ_t, one per tensor, by 500 steps of Adam, so that what it finds need not lie in the hull, and it
    projects onto no simplex. What is here is the paper's form.

    Source: FW-Merging, arXiv:2503.12649.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        vertices: int,
        choose_every: int,
        shared: bool,
        oracle: str,
        tolerance: float,
    ) -> None:
        if not lr > 0 or vertices < 1 or choose_every < 1:
            raise ConfigError(
                "optimizer.lr is above 0, optimizer.vertices and optimizer.choose_every are at least 1, found "
                f"{lr:g}, {vertices} and {choose_every}."
            )
        super().__init__(parameters, {"lr": lr})
        self.gap: Tensor | None = None
        self.tolerance = tolerance
        self._vertices = _Vertices(self, oracle)
        self._count, self._choose_every, self._shared = vertices, choose_every, shared

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step; the closure is called first, if there is one."""
        loss = _called(closure)
        vertices = self._vertices
        coefficients, state = vertices.coefficients, vertices.state
        slopes = vertices.slopes()
        self.gap = vertices.gaps(slopes).sum()
        if state["step"] % self._choose_every == 0:
            scores = vertices.scores(slopes)
            if self._shared:
                scores = scores.sum(1, keepdim=True).expand_as(scores)
            state["chosen"] = scores.topk(min(self._count, len(scores)), dim=0, largest=False).indices  # (k, G)
            state["from"] = coefficients.clone()
            state["weights"] = torch.cat([torch.ones_like(slopes[:1]), torch.zeros_like(state["chosen"]).to(slopes)])
        chosen = state["chosen"].long()  # a state that is loaded has the parameter's dtype
        slope = torch.cat([vertices.slope(state["from"]), slopes.gather(0, chosen)])  # ∂L/∂w, (1 + k, G)
        weights = state["weights"] = project_to_simplex(state["weights"] - self.param_groups[0]["lr"] * slope)
        coefficients.copy_(weights[0] * state["from"] + vertices.mixed(chosen, weights[1:]))
        state["step"] += 1
        return loss


class _Vertices:
    """The corners of λ's hull: K experts, then the start.

    Args:
        optimizer: Of one parameter, λ; its state keeps the start. For the cosine oracle it gets ``observe``, which the
            learner calls before a step, and only then keeps the gradients of all weights.
        oracle: As ``HardFrankWolfe`` takes it.

    Raises:
        ConfigError: If there is no such oracle.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, oracle: str) -> None:
        if oracle not in ("inner_product", "cosine"):
            raise ConfigError(f"optimizer.oracle is 'inner_product' or 'cosine', found '{oracle}'.")
        self._optimizer = optimizer
        self._gram: Tensor | None = None
        self._cosines: Tensor | None = None
        self._by_cosine = oracle == "cosine"
        if self._by_cosine:
            optimizer.observe = self._observe  # type: ignore[attr-defined]

    @property
    def coefficients(self) -> nn.Parameter:
        """λ, (K, G)."""
        return self._optimizer.param_groups[0]["params"][0]

    @property
    def state(self) -> dict[str, Any]:
        """What outlasts a step; a checkpoint holds it."""
        state = self._optimizer.state[self.coefficients]
        if not state:
            state.update(step=0, start=self.coefficients.detach().clone())
        return state

    def slope(self, coefficients: Tensor) -> Tensor:
        """⟨g, θ − θ₀⟩ of any λ, (1, G)."""
        gradient = self.coefficients.grad
        assert gradient is not None
        return (coefficients * gradient).sum(0, keepdim=True)

    def slopes(self) -> Tensor:
        """The same of every vertex, (K + 1, G)."""
        gradient = self.coefficients.grad
        assert gradient is not None
        return torch.cat([gradient, self.slope(self.state["start"])])

    def gaps(self, slopes: Tensor) -> Tensor:
        """By how much the best vertex's is below that of λ, (G,)."""
        return self.slope(self.coefficients)[0] - slopes.amin(0)

    def scores(self, slopes: Tensor) -> Tensor:
        """What the oracle wants least of, (K + 1, G)."""
        if not self._by_cosine:
            return slopes
        if self._cosines is None:
            raise ConfigError("the cosine oracle must see the gradients first. Call observe(model) before every step.")
        cosines, self._cosines = self._cosines, None
        return cosines.to(slopes)

    def mixed(self, chosen: Tensor, weights: Tensor) -> Tensor:
        """Σ_i w_i s_i as λ (K, G), of vertices by number (k, G) and their weights (k, G)."""
        start = self.state["start"]
        shares = torch.zeros_like(start[:1]).repeat(len(start) + 1, 1).scatter_(0, chosen, weights)
        return shares[:-1] + shares[-1] * start

    @torch.no_grad()
    def _observe(self, model: MergedModel) -> None:
        """Take Σ_l cos(g_l, θ_s,l) of every vertex, before a step.

        A vertex is θ₀ + Σ_k c_k τ_k: inner products of g with θ₀ and every τ_k, and of those among each other, tell
        its cosine. That takes one more pass over τ, and at the first look another.

        Args:
            model: Its merged weights have gradients.
        """
        bank, start = model.bank, self.state["start"]
        groups = torch.tensor(tensor_groups(model.partition, list(bank.pretrained)), device=start.device)
        if self._gram is None:
            self._gram = gram_matrices(bank)
        gradients = _gradients(model)
        products = contract(bank, gradients, Partition.build("tensor", bank.shapes))  # (K, L)
        base = torch.stack([gradients[key].flatten() @ tensor.flatten() for key, tensor in bank.pretrained.items()])
        norms = torch.stack([gradients[key].norm() for key in bank.pretrained])
        products = torch.cat([base[None], products]).T.to(self._gram)  # (L, 1 + K)
        experts = torch.eye(len(start)).to(self._gram).expand(len(groups), -1, -1)
        corners = torch.cat([experts, start.T[groups, None].to(self._gram)], 1)  # (L, K + 1, K)
        corners = torch.cat([torch.ones_like(corners[..., :1]), corners], 2)  # (L, K + 1, 1 + K)
        lengths = (corners @ self._gram * corners).sum(2).clamp(min=0).sqrt() * norms[:, None].to(self._gram)
        cosines = torch.where(lengths > 0, (corners @ products[..., None])[..., 0] / lengths, 0).clamp(-1, 1)
        total = cosines.new_zeros(model.partition.num_groups, len(start) + 1)
        self._cosines = total.index_add_(0, groups, cosines).T  # (K + 1, G)


def _gradients(model: MergedModel) -> dict[str, Tensor]:
    """∂L/∂θ by key, over all ranks."""
    found = {}
    for key, gradient in model.gradients.items():
        found[key] = torch.zeros_like(model.bank.pretrained[key]) if gradient is None else gradient
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found[key])
    return found


def _called(closure: Callable[[], Any] | None) -> Any:
    """What a step's closure gives."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
