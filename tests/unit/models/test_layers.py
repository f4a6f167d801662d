"""The leaner layers compute what torch's own compute, forward and backward."""

import copy
from collections.abc import Callable

import pytest
import torch
from open_clip.transformer import LayerNorm as OpenClipLayerNorm
from open_clip.transformer import LayerNormFp32
from torch import Tensor, nn

from adamerge.models import layers
from adamerge.models.layers import LayerNorm, Linear, Patches, SelfAttention, attention, use_lean_layers


def both(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A module twice with the same weights: torch's own, and ours."""
    torch.manual_seed(0)
    own = build()
    lean = copy.deepcopy(own)
    use_lean_layers(lean)
    return own, lean


def gradients(module: nn.Module, images: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    images = images.clone().requires_grad_()
    out = call(module, images)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    (out * weight).sum().backward()
    return [out.detach(), images.grad, *(parameter.grad for parameter in module.parameters())]  # type: ignore[list-item]


def attend(module: nn.Module, images: Tensor) -> Tensor:
    return module(images, images, images, need_weights=False, attn_mask=None)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("onednn", [True, False])
def test_a_linear_layer(
    bias: bool, shape: tuple[int, ...], dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_USE_ONEDNN", onednn and layers._HAS_ONEDNN)
    own, lean = both(lambda: nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype)))
    assert type(lean[0]) is Linear
    images = torch.randn(shape, dtype=dtype)
    call = lambda module, x: module(x)  # noqa: E731
    for found, expected in zip(gradients(lean, images, call), gradients(own, images, call), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(12, 12), (8, 16), (9, 13)], ids=["square", "wide", "with a rest"])
def test_patches(bias: bool, size: tuple[int, int]) -> None:
    own, lean = both(lambda: nn.Sequential(nn.Conv2d(3, 10, 4, stride=4, bias=bias)))
    assert type(lean[0]) is Patches
    images = torch.randn(2, *size, 3).permute(0, 3, 1, 2)
    call = lambda module, x: module(x)  # noqa: E731
    for found, expected in zip(gradients(lean, images, call), gradients(own, images, call), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def twins_of_layer_norm() -> tuple[nn.Module, nn.Module]:
    own, lean = both(lambda: nn.Sequential(OpenClipLayerNorm(24)))
    assert type(lean[0]) is LayerNorm
    for module in (own, lean):
        torch.manual_seed(1)
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=1)
    return own, lean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_gives_open_clips_values(dtype: torch.dtype) -> None:
    own, lean = twins_of_layer_norm()
    images = torch.randn(5, 7, 24, dtype=dtype)
    call = lambda module, x: module(x)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for found, expected in zip(gradients(lean, images, call), gradients(own, images, call), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_layer_norm_of_a_gpu_is_as_close_to_float64_in_half_precision() -> None:
    own, lean = twins_of_layer_norm()
    images = torch.randn(64, 24).bfloat16()
    call = lambda module, x: module(x)  # noqa: E731
    exact = gradients(copy.deepcopy(own).double(), images.double(), call)
    own.cuda(), lean.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        theirs, ours = (gradients(module, images.cuda(), call) for module in (own, lean))
    for found, usual, expected in zip(ours, theirs, exact, strict=True):
        assert found.dtype == usual.dtype
        errors = [(part.cpu().double() - expected).norm() / expected.norm() for part in (found, usual)]
        assert errors[0] < max(2 * errors[1], 2**-8)


def test_other_layer_norms_stay_torchs() -> None:
    for kind in (nn.LayerNorm, LayerNormFp32):
        _, lean = both(lambda kind=kind: nn.Sequential(kind(24)))
        assert type(lean[0]) is kind


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}])
def test_other_convolutions_stay_torchs(options: dict[str, int]) -> None:
    _, lean = both(lambda: nn.Sequential(nn.Conv2d(3, 10, 4, **options)))
    assert type(lean[0]) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_self_attention(dtype: torch.dtype) -> None:
    own, lean = both(lambda: nn.ModuleList([nn.MultiheadAttention(24, 3, batch_first=True, dtype=dtype)]))
    assert type(lean[0]) is SelfAttention
    images = torch.randn(4, 9, 24, dtype=dtype)
    for found, expected in zip(gradients(lean[0], images, attend), gradients(own[0], images, attend), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x, x, x, need_weights=False, attn_mask=torch.ones(9, 9).triu(1).bool())[0],
        lambda m, x: m(x, x, x)[1],
        lambda m, x: m(x, x.flip(1), x, need_weights=False)[0],
        lambda m, x: m(x[0], x[0], x[0], need_weights=False)[0],
        lambda m, x: m(x, x, x, need_weights=False, key_padding_mask=torch.arange(9).expand(4, 9) > 6)[0],
    ],
    ids=["causal mask", "weights wanted", "two inputs", "no batch", "padding"],
)
def test_what_is_not_plain_self_attention_is_torchs(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    own, lean = both(lambda: nn.ModuleList([nn.MultiheadAttention(24, 3, batch_first=True)]))
    images = torch.randn(4, 9, 24)
    for found, expected in zip(gradients(lean[0], images, call), gradients(own[0], images, call), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"batch_first": False}, {"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_other_kinds_of_attention_are_torchs(options: dict) -> None:
    own, lean = both(lambda: nn.ModuleList([nn.MultiheadAttention(24, 3, **({"batch_first": True} | options))]))
    images = torch.randn(4, 9, 24)
    torch.testing.assert_close(attend(lean[0], images), attend(own[0], images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attention_is_near_the_exact_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 9, 8, dtype=torch.float64) for _ in range(3)]
    exact = torch.nn.functional.scaled_dot_product_attention(*parts)
    found = attention(*(part.to(dtype) for part in parts))
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_under_autocast_the_products_are_in_bf16() -> None:
    _, lean = both(lambda: nn.Sequential(nn.Linear(24, 40)))
    with torch.autocast("cpu", torch.bfloat16):
        assert lean(torch.randn(2, 24)).dtype == torch.bfloat16


def test_names_and_values_of_parameters_stay() -> None:
    own, lean = both(lambda: nn.TransformerEncoderLayer(24, 3, 48, batch_first=True))
    assert list(lean.state_dict()) == list(own.state_dict())
    for found, expected in zip(lean.state_dict().values(), own.state_dict().values(), strict=True):
        assert torch.equal(found, expected)
