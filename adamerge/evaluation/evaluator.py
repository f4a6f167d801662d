"""Accuracy of any weights on the tasks of a problem."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from adamerge.bank import hash_tensors
from adamerge.errors import TrainingError
from adamerge.evaluation.accuracy import AccuracyCache, accuracy
from adamerge.learning.fit import is_out_of_memory
from adamerge.tasks.datasets import ImageSet
from adamerge.tasks.problem import Problem

Accuracies = dict[str, float | None]


@dataclass(frozen=True)
class Evaluator:
    """Scores weights of the image tower, with one device, precision and batch size for every column of a table.

    Attributes:
        problem: Model, heads and images.
        device: Where to compute.
        precision: As Lightning's Trainer takes it.
        batch_size: Images per forward pass.
    """

    problem: Problem
    device: torch.device
    precision: str
    batch_size: int

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        *,
        tasks: Iterable[str] | None = None,
        images: Mapping[str, ImageSet] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        cached: bool = False,
    ) -> Accuracies:
        """Top-1 accuracy by task, as fractions; None where there are no labels.

        Args:
            weights: Tensors of the image tower by key; keys that are not merged keep their pretrained values.
            tasks: All by default.
            images: Other images instead of the problem's.
            rows: Which of those to score, by task; all by default.
            cached: Whether to look the result up, and keep it, by content.
        """
        problem = self.problem
        network = problem.clip.image_encoder.to(self.device)
        placed = {key: tensor.to(self.device) for key, tensor in weights.items()}
        cache = AccuracyCache(problem.cache_dir / "accuracy" if cached else None)
        identity = hash_tensors({**dict(network.named_parameters()), **weights}) if cached else ""

        def encode(batch: Tensor) -> Tensor:
            try:
                return functional_call(network, placed, (batch,))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise TrainingError("memory ran out while scoring. Lower data.eval_batch_size.") from error

        found: Accuracies = {}
        for task in tasks or problem.bank.task_names:
            split = images[task] if images else problem.scored[task]
            indices = (rows[task] if rows else None) if images else problem.score_indices[task]
            head = problem.heads[task]

            def compute(split: ImageSet = split, indices: Tensor | None = indices, head: Tensor = head) -> float | None:
                return accuracy(
                    encode,
                    split,
                    head,
                    indices=indices,
                    batch_size=self.batch_size,
                    device=self.device,
                    precision=self.precision,
                )

            parts = {
                "weights": identity,
                "head": hash_tensors({"head": head}) if cached else "",
                "images": split.key,
                "indices": "all" if indices is None else hash_tensors({"indices": indices}),
                "preprocessing": json.dumps(problem.clip.preprocess_cfg, sort_keys=True, default=str),
                "precision": self.precision,
                "device": self.device.type,
            }
            found[task] = cache.get_or_compute(parts, compute)
        return found

    def experts(
        self,
        *,
        tasks: Iterable[str] | None = None,
        images: Mapping[str, ImageSet] | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Accuracies:
        """Every expert on its own task; arguments as for a call."""
        bank = self.problem.bank
        found: Accuracies = {}
        for task in tasks or bank.task_names:
            found |= self(bank.expert(task), tasks=[task], images=images, rows=rows, cached=True)
        return found


def mean_normalized(merged: Accuracies, experts: Accuracies) -> float:
    """Mean over tasks of accuracy(merged) / accuracy(expert), a mean of ratios; tasks without either are left out."""
    ratios = [value / expert for task, value in merged.items() if value is not None and (expert := experts[task])]
    return sum(ratios) / len(ratios) if ratios else 0.0
