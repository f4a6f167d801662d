"""The diagonal of the Fisher information of every expert's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from adamerge.errors import ConfigError, shortlist
from adamerge.statistics.gather import Expert
from adamerge.tasks.datamodule import generator_for

_FORMS = ("exact", "sampled", "batch")


@dataclass(frozen=True)
class Fisher:
    """F = E_x E_{y ~ p(y|x)} (∂ log p(y|x) / ∂θ)², entry by entry, of unlabeled images and the expert's own classes.

    ``exact`` takes the expectation over the classes. With f the normalised features of an image, W the head and
    p = softmax(W f) it is Σ_r σ_r² (∂ v_rᵀf / ∂θ)², where σ and v are singular values and right singular vectors of the
    rows √p_c (w_c − Σ_j p_j w_j): one backward pass of one image for each, min(C − 1, d) at most, of which few matter.
    The largest, up to ``share`` of Σ σ², are taken one by one; all others together, added up with random signs, in one
    pass more, whose expectation is exact too. ``sampled`` draws one label from p for each image: one pass. ``batch`` is
    FusionBench's, one pass for each batch b: (∂ Σ_{x∈b} Σ_c √p_c log p_c / ∂θ)², p under the root held fixed, added up
    over batches and divided by the number of images. It holds products of different images and classes and is no Fisher
    information.

    Passes run in the network's dtype, whatever the precision of a run, along unit vectors, so that no square underflows
    however sure the expert is of its classes; squares are added up in float32 or wider.

    Args:
        form: ``exact``, ``sampled`` or ``batch``.
        share: Of each image's Σ σ², in [0, 1], that is taken one by one; of ``exact`` alone.
        batch_size: Images of a batch; of ``batch`` alone.
        images_per_task: Images to look at; None for all.
        seed: Of random signs and labels.

    Differs: the reference code has ``exact`` class by class; MergeLM's, carried over to FusionBench, ``batch`` and from
    labelled training images, with their labels unused.

    Raises:
        ConfigError: If an option is unknown or out of range, or features or gradients are NaN or Inf.

    Source: Fisher merging, arXiv:2111.09832.
    """

    form: Literal["exact", "sampled", "batch"]
    share: float
    batch_size: int
    images_per_task: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise ConfigError(f"unknown form '{self.form}' of the Fisher information. Choose {', '.join(_FORMS)}.")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is a fraction of each image's Fisher information, in [0, 1]; found {self.share}.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is at least 1, found {self.batch_size}.")

    @property
    def needs(self) -> Literal["images"]:
        return "images"

    def __call__(self, expert: Expert) -> dict[str, Tensor]:
        """F by key, with the shapes of ``expert.keys``, float32 or wider."""
        assert expert.images is not None
        total = _SquaredGradients(expert)
        images = expert.images.split(self.batch_size if self.form == "batch" else 1)
        head = expert.head.cpu().double()
        generator = generator_for("fisher", self.seed, expert.task)
        with _differentiable(total.parameters), torch.enable_grad():
            for some in images:
                features = normalize(expert.network(some.to(expert.device)), dim=-1)  # (B, d)
                if not features.isfinite().all():
                    raise ConfigError(f"task '{expert.task}': features of an image are NaN or Inf. Leave the task out.")
                if self.form == "batch":
                    logs = (features @ expert.head.to(features.dtype).T).log_softmax(-1)
                    total.add((logs * (logs.detach() / 2).exp()).sum(), None, 1.0)
                    continue
                directions = self._directions(features.detach().cpu().double()[0], head, generator)
                sizes = directions.norm(dim=1)
                for direction, size in zip(directions[sizes > 0], sizes[sizes > 0], strict=True):
                    total.add(features, (direction / size)[None].to(features), float(size) ** 2)
        found = {key: value / len(expert.images) for key, value in total.sums.items()}
        if bad := [key for key, value in found.items() if not value.isfinite().all()]:
            raise ConfigError(f"task '{expert.task}': the gradients of {shortlist(bad)} are NaN or Inf. Leave it out.")
        return found

    def to_json(self) -> dict[str, Any]:
        return {"name": "fisher", **asdict(self)}

    def _directions(self, features: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
        """Vectors u (R, d) whose Σ u uᵀ is Wᵀ (diag p − p pᵀ) W, or has it as its expectation.

        Args:
            features: Of one image, normalised, float64 (d,).
            head: W, float64 (C, d).
            generator: Of random signs or the label.
        """
        chances = (head @ features).softmax(0)
        scores = head - chances @ head  # (C, d), ∂ log p_c / ∂f
        if self.form == "sampled":
            return scores[torch.multinomial(chances, 1, generator=generator)]
        rows = chances.sqrt()[:, None] * scores
        _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
        rank = int((sizes > sizes[0] * len(rows) * torch.finfo(sizes.dtype).eps).sum())
        rows, squares = (sizes[:, None] * vectors)[:rank], sizes[:rank].square()
        alone = int((squares.cumsum(0) - squares < self.share * squares.sum()).sum())  # those before fall short of it
        signs = torch.randint(2, (1, rank - alone), generator=generator).to(rows) * 2 - 1
        return torch.cat([rows[:alone], signs @ rows[alone:]])


class _SquaredGradients:
    """Σ w (∂s/∂θ)² by key."""

    def __init__(self, expert: Expert) -> None:
        named = dict(expert.network.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {key: named[key] for key in expert.keys}
        self.sums = {
            key: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for key, parameter in self.parameters.items()
        }

    def add(self, output: Tensor, direction: Tensor | None, weight: float) -> None:
        """Differentiate Σ output · direction, square, and add ``weight`` times that."""
        again = direction is not None  # in other directions
        gradients = torch.autograd.grad(
            output, list(self.parameters.values()), direction, retain_graph=again, materialize_grads=True
        )
        with torch.no_grad():
            for total, gradient in zip(self.sums.values(), gradients, strict=True):
                wide = gradient.to(total.dtype)
                total.addcmul_(wide, wide, value=weight)


@contextmanager
def _differentiable(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """With respect to ``parameters``; as before at the end."""
    before = {key: parameter.requires_grad for key, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.requires_grad_(before[key])
