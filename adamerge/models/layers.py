"""Layers with the parameters and the function of torch's own, in less time."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from torch.nn.functional import linear as torch_linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from adamerge.models.processor import made_by_intel


def use_lean_layers(network: nn.Module) -> None:
    """Let some layers of ``network`` compute by this file: linear ones, self-attentions, open_clip's layer norms, and
    convolutions that cut an image into patches. Parameters stay as they are.
    """
    for module in network.modules():
        if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear):  # the latter is attention's out_proj
            module.__class__ = Linear
        elif type(module) is nn.MultiheadAttention:
            module.__class__ = SelfAttention
        elif _name(type(module)) == "open_clip.transformer.LayerNorm":
            module.__class__ = LayerNorm
        elif type(module) is nn.Conv2d and module.stride == module.kernel_size and _is_plain(module):
            module.__class__ = Patches


def _name(kind: type) -> str:
    """In full, for classes of libraries that are not imported here."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_plain(convolution: nn.Conv2d) -> bool:
    return convolution.padding == (0, 0) and convolution.dilation == (1, 1) and convolution.groups == 1


class Linear(nn.Linear):
    """``nn.Linear`` by ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """open_clip's, ``nn.LayerNorm`` with an output of the input's shape (…, width) and dtype.

    Autocast has it computed in float32, between a cast of the input and one of the output, in both directions. The
    GPU's kernels sum in float32 by themselves; what they lose in half precision is what linear layers' weights lose.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu" or input.dtype.itemsize != 2:
            return super().forward(input).to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = (None if part is None else part.to(input.dtype) for part in (self.weight, self.bias))
            return layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class Patches(nn.Conv2d):
    """``nn.Conv2d`` whose patches do not overlap, by one matrix product.

    cuDNN's convolution takes an eighth of a ViT-B/32's step on an H200.
    """

    def forward(self, input: Tensor) -> Tensor:
        (height, width), (*lead, channels, rows, columns) = self.kernel_size, input.shape
        if len(lead) != 1 or rows % height or columns % width:
            return super().forward(input)
        cut = input.reshape(*lead, channels, rows // height, height, columns // width, width)
        flat = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, channels · height · width)
        features = linear(flat, self.weight.flatten(1), self.bias)
        return features.transpose(1, 2).unflatten(2, (rows // height, columns // width))


class SelfAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` where query, key and value are one tensor and nothing is masked; else torch's own.

    Torch's projects into three views, each of whose gradients is filled up to the size of all three.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        options = {name: option for name, option in kwargs.items() if option is not None}
        plain = query is key is value and query.dim() == 3 and not args and options == {"need_weights": False}
        added = self.bias_k is not None or self.add_zero_attn
        dropout = self.dropout and self.training
        if not plain or added or dropout or not self.batch_first or self.in_proj_weight is None:
            return super().forward(query, key, value, *args, **kwargs)
        batch, tokens, width = query.shape
        projected = linear(query, self.in_proj_weight, self.in_proj_bias)
        heads = projected.view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        if heads.device.type == "cpu":
            attended = attention(*heads.permute(2, 0, 3, 1, 4).contiguous().unbind(0))
        else:  # whose kernels read and write (B, L, H, d) as it lies, and its three gradients become one by one copy
            attended = attention(*(part.transpose(1, 2) for part in heads.unbind(2)))
        joined = attended.transpose(1, 2).reshape(batch, tokens, width)
        return self.out_proj(joined), None  # by the module, whose hooks see its input


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query · keyᵀ / √d) · value, (B, H, L, d) each.

    On the CPU in half precision by plain products, whose backward pass is two to five times as fast there as the fused
    kernel's (torch 2.15, 50 to 577 tokens), at the cost of keeping (B, H, L, L).
    """
    if query.device.type != "cpu" or query.dtype.itemsize != 2:
        return scaled_dot_product_attention(query, key, value)
    flat = [part.reshape(-1, *part.shape[2:]) for part in (query, key, value)]
    scores = torch.baddbmm(query.new_empty(1, 1, 1), flat[0], flat[1].mT, beta=0, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(query.dtype), flat[2]).view(query.shape)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs · weightᵀ + bias, as torch's.

    Float32 on AMD's CPUs with AVX-512 goes through oneDNN, forward and backward: MKL, which torch takes, reaches half
    its speed there (Zen 5), but mostly more than it without AVX-512 (Zen 3: 0.8 to 1.9 times) and on Intel's.
    """
    plain = inputs.dtype == weight.dtype == torch.float32 and inputs.device.type == "cpu"
    if plain and _USE_ONEDNN and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling():
        return _Linear.apply(inputs, weight, bias)  # pyright: ignore[reportReturnType]
    return torch_linear(inputs, weight, bias)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_USE_ONEDNN = _HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512" and not made_by_intel()


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left · rightᵀ + bias."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t()) if needs[0] else None,
            _product(flat.t(), inputs.reshape(-1, inputs.shape[-1]).t()) if needs[1] else None,
            flat.sum(0) if needs[2] else None,
        )
