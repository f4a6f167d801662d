"""Merges with FusionBench's algorithms; run by a Python that has it, see ``driver_server``.

Options are those of the algorithm's class, and ``huggingface: true`` to give it the model as it has CLIPs, in Hugging
Face's layout: queries, keys and values apart, the projection to features transposed. ``mask`` files stand for what DARE
would draw, ``gram`` and ``fisher`` files for what RegMean and Fisher merging would compute on images.
"""

# pyright: reportMissingImports=false

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from driver_server import State, serve
from torch import Tensor, nn
from transformers.models.clip import modeling_clip

# FusionBench 0.2.33 imports a name that transformers 5 no longer has; none of these algorithms uses it.
modeling_clip.CLIPVisionTransformer = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)

from fusion_bench.method.base_algorithm import BaseAlgorithm  # noqa: E402
from fusion_bench.method.dare import DareTaskArithmetic, DareTiesMerging  # noqa: E402
from fusion_bench.method.doge_ta import DOGE_TA_Algorithm  # noqa: E402
from fusion_bench.method.fisher_merging.fisher_merging import FisherMergingAlgorithm  # noqa: E402
from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge  # noqa: E402
from fusion_bench.method.magmax import MagMaxAlgorithm  # noqa: E402
from fusion_bench.method.model_stock import ModelStock  # noqa: E402
from fusion_bench.method.opcm import OPCMForCLIP  # noqa: E402
from fusion_bench.method.regmean.regmean import RegMeanAlgorithm  # noqa: E402
from fusion_bench.method.simple_average import SimpleAverageAlgorithm  # noqa: E402
from fusion_bench.method.slerp import SlerpMergeAlgorithm  # noqa: E402
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm  # noqa: E402
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging  # noqa: E402
from fusion_bench.method.ties_merging import TiesMergingAlgorithm  # noqa: E402
from fusion_bench.method.weighted_average import WeightedAverageAlgorithm  # noqa: E402
from fusion_bench.method.wudi import WUDIMerging  # noqa: E402
from fusion_bench.modelpool import BaseModelPool  # noqa: E402

RENAMED = [
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.proj$", "visual_projection.weight"),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


class RegMeanOfGrams(RegMeanAlgorithm):
    """With the Gram matrices of every model's inputs by module name."""

    def get_regmean_weights(self, model_name: str, *_: Any, **__: Any) -> State:
        return self.grams[model_name]


class FisherMergingOfFishers(FisherMergingAlgorithm):
    """With the Fisher information of every model by parameter name."""

    def get_fisher_weights(self, model_name: str, *_: Any, **__: Any) -> State:
        return self.fishers[model_name]


ALGORITHMS: dict[str, Callable[..., BaseAlgorithm]] = {
    "dare_task_arithmetic": DareTaskArithmetic,
    "dare_ties": DareTiesMerging,
    "doge": DOGE_TA_Algorithm,
    "fisher_merging": FisherMergingOfFishers,
    "iso_c": ISO_C_Merge,
    "iso_cts": ISO_CTS_Merge,
    "magmax": MagMaxAlgorithm,
    "model_stock": ModelStock,
    "opcm": OPCMForCLIP,
    "regmean": RegMeanOfGrams,
    "simple_average": SimpleAverageAlgorithm,
    "slerp": SlerpMergeAlgorithm,
    "task_arithmetic": TaskArithmeticAlgorithm,
    "ties": TiesMergingAlgorithm,
    "tsv_merge": TaskSingularVectorMerging,
    "weighted_average": WeightedAverageAlgorithm,
    "wudi": WUDIMerging,
}


def merge(
    method: str, pretrained: State, experts: list[State], options: dict[str, Any], given: dict[str, list[State]]
) -> State:
    layout = to_huggingface if options.pop("huggingface", False) else dict
    models = {f"expert_{task}": model_of(layout(expert)) for task, expert in enumerate(experts)}
    base = {} if method == "slerp" else {"_pretrained_": model_of(layout(pretrained))}
    pool = BaseModelPool({**base, **models})
    pool.load_train_dataset = lambda name: None
    algorithm = ALGORITHMS[method](**options)
    algorithm._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets=None))
    algorithm.grams = {name: of_modules(grams) for name, grams in zip(models, given["gram"], strict=False)}
    algorithm.fishers = {name: layout(fisher) for name, fisher in zip(models, given["fisher"], strict=False)}
    with drawn(list(models.values()), [layout(mask) for mask in given["mask"]]):
        merged = dict(algorithm.run(pool).state_dict())
    return merged if layout is dict else from_huggingface(merged, pretrained)


def model_of(state: State) -> nn.Module:
    """A module with these parameters; a matrix that is called ``weight`` is a linear layer's, or an embedding's."""
    root = nn.Module()
    for key, tensor in state.items():
        *path, name = key.split(".")
        module = root
        for depth, part in enumerate(path):
            if not hasattr(module, part):
                module.add_module(part, layer_of(part, state.get(".".join([*path[: depth + 1], "weight"]))))
            module = getattr(module, part)
        module.register_parameter(name, nn.Parameter(tensor.clone()))
    return root


def layer_of(name: str, weight: Tensor | None) -> nn.Module:
    """Of the kind that has such a weight; its parameters are set afterwards."""
    if weight is None or weight.dim() != 2:
        return nn.Module()
    if "embedding" in name:
        return nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")


def to_huggingface(state: State) -> State:
    """From open_clip's layout."""
    found = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if key.endswith(("in_proj_weight", "in_proj_bias")):
            prefix, kind = name.split(".attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{prefix}.self_attn.{letter}_proj.{kind}"] = part
        else:
            found[name] = tensor.mT if key == "visual.proj" else tensor
    return found


def from_huggingface(state: State, like: State) -> State:
    """Back to open_clip's layout, that of ``like``."""
    found = {}
    for key, tensor in like.items():
        parts = torch.cat([state[name] for name in to_huggingface({key: tensor})])
        found[key] = parts.mT if key == "visual.proj" else parts
    return found


def of_modules(grams: State) -> State:
    """Gram matrices by the names of Hugging Face's modules; queries, keys and values share theirs."""
    found = {}
    for key, gram in grams.items():
        rows = gram.repeat(3, 1) if key.endswith("in_proj_weight") else gram
        found |= {name.removesuffix(".weight"): matrix for name, matrix in to_huggingface({key: rows}).items()}
    return found


@contextmanager
def drawn(models: list[nn.Module], masks: list[State]) -> Iterator[None]:
    """``torch.rand_like`` of a parameter gives 1 where its mask is, else 0."""
    if not masks:
        yield
        return
    found = {
        id(parameter): mask[name]
        for model, mask in zip(models, masks, strict=False)
        for name, parameter in model.named_parameters()
    }
    with mock.patch("torch.rand_like", lambda parameter: found[id(parameter)].to(parameter)):
        yield


if __name__ == "__main__":
    serve("fusion-bench", merge)
