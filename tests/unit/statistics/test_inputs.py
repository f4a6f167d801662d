"""Gram matrices of inputs, against inputs that are computed without hooks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.models.layers import use_lean_layers
from adamerge.models.open_clip import ImageEncoder
from adamerge.statistics import Expert, InputGrams, gather, inputs

WIDTH, HEADS, PATCHES, OUTPUT = 8, 2, 4, 5
TOKENS = PATCHES + 1
ATTENTION, OUT, FC, PROJ = (
    f"visual.resblocks.1.{name}"
    for name in ("attn.in_proj_weight", "attn.out_proj.weight", "c_fc.weight", "c_proj.weight")
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.c_fc = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.c_proj(self.c_fc(tokens).relu())


class Tower(nn.Module):
    """Tokens (B, 5, 8), a class token among them, to features (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(Block(), Block())
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, OUTPUT))

    def forward(self, patches: Tensor) -> Tensor:
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1)
        return self.resblocks(tokens)[:, 0] @ self.proj


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower()

    def forward(self, patches: Tensor) -> Tensor:
        return self.visual(patches)


def make_network(dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    network = Network().to(dtype).requires_grad_(False).eval()
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    use_lean_layers(network)
    return network


def make_images(count: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, PATCHES, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def look(network: nn.Module, images: Tensor, keys: tuple[str, ...] | None = None, **options: object) -> Expert:
    names = keys if keys is not None else tuple(name for name, _ in network.named_parameters())
    rest = {"precision": "32-true", "batch_size": 3} | options
    return Expert("task", network, torch.eye(2), images, None, names, torch.device("cpu"), **rest)  # type: ignore[arg-type]


def grams(**options: object) -> InputGrams:
    return InputGrams(**({"images_per_task": None, "exclude": []} | options))  # type: ignore[arg-type]


def by_hand(network: Network, images: Tensor) -> dict[str, Tensor]:
    """Inputs (N, n) of every matrix, with the attention written out."""
    tower = network.visual
    tokens = torch.cat([tower.class_embedding.expand(len(images), 1, -1), images], 1)
    fed = {}
    for number, block in enumerate(tower.resblocks):
        normed = block.ln_1(tokens)
        projected = normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        query, key, value = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in projected.split(WIDTH, dim=2)
        )  # (B, heads, tokens, width / heads)
        weights = (query @ key.mT / (WIDTH / HEADS) ** 0.5).softmax(-1)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        tokens = tokens + attended @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        hidden = (tokens @ block.c_fc.weight.T + block.c_fc.bias).relu()
        names = ("attn.in_proj_weight", "attn.out_proj.weight", "c_fc.weight", "c_proj.weight")
        for name, states in zip(names, (normed, attended, tokens, hidden), strict=True):
            fed[f"visual.resblocks.{number}.{name}"] = states.flatten(0, 1)
        tokens = tokens + hidden @ block.c_proj.weight.T + block.c_proj.bias
    return fed | {"visual.proj": tokens[:, 0]}


def test_are_the_mean_products_of_all_tokens() -> None:
    network, images = make_network(), make_images()
    found = grams()(look(network, images))
    fed = by_hand(network, images)
    assert set(found) == set(fed)
    assert len(fed[OUT]) == len(images) * TOKENS  # the class token counts
    assert len(fed["visual.proj"]) == len(images)
    for key, states in fed.items():
        expected = states.T @ states / len(states)
        torch.testing.assert_close(
            found[key], expected, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_cover_every_matrix_of_an_open_clip_tower_but_the_embedding() -> None:
    import open_clip.model

    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(16, vision, text).eval()
    network = ImageEncoder(clip.visual, (0.5,) * 3, (0.5,) * 3).requires_grad_(False).eval()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = grams()(look(network, images))
    matrices = {name for name, parameter in network.named_parameters() if parameter.dim() == 2}
    assert set(found) == matrices - {"visual.positional_embedding"}
    assert {key: len(gram) for key, gram in found.items() if ".1." in key or key == "visual.proj"} == {
        "visual.transformer.resblocks.1.attn.in_proj_weight": 32,
        "visual.transformer.resblocks.1.attn.out_proj.weight": 32,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 32,
        "visual.transformer.resblocks.1.mlp.c_proj.weight": 128,
        "visual.proj": 32,
    }
    assert {gram.dtype for gram in found.values()} == {torch.float32}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    network, images = make_network(), make_images()
    expected = grams()(look(network, images))
    for key, found in grams()(look(network, images, batch_size=batch_size)).items():
        torch.testing.assert_close(found, expected[key], rtol=1e-12, atol=1e-12)


def test_in_float32_are_as_good_as_in_float64() -> None:
    """What float32 chunks err by is less than what storing the result rounds; tokens far from zero are the worst."""
    tokens = torch.randn(100_000, 6, generator=torch.Generator().manual_seed(0)) + 3
    total = inputs._Sum()
    for some in tokens.split(30_000):
        total.add(some.view(-1, 5, 6))
    assert total.tokens == len(tokens)
    found = total.mean()
    assert found.dtype == torch.float64
    expected = tokens.double().T @ tokens.double() / len(tokens)
    rounding = torch.finfo(torch.float32).eps / 2
    assert ((found - expected).abs() / expected).max() < rounding
    at_once = (tokens.T @ tokens).double() / len(tokens)
    assert ((at_once - expected).abs() / expected).max() > rounding  # by how much depends on the CPU


def test_in_half_precision_are_near() -> None:
    network, images = make_network(torch.float32), make_images(dtype=torch.float32)
    exact = grams()(look(network, images))
    for key, found in grams()(look(network, images, precision="bf16-mixed")).items():
        assert found.dtype == torch.float32
        assert (found - exact[key]).abs().max() < 0.05 * exact[key].abs().max(), key
        assert torch.equal(found, exact[key]) == (key == ATTENTION.replace(".1.", ".0.")), key  # before any product


def test_of_some_keys_only() -> None:
    network, images = make_network(), make_images()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    assert grams()(look(network, images, ("visual.class_embedding", "visual.resblocks.0.ln_1.weight"))) == {}
    assert not calls
    found = grams()(look(network, images, (OUT, "visual.class_embedding", FC)))
    assert list(found) == [OUT, FC]
    assert len(calls) == 3  # seven images, three at a time
    torch.testing.assert_close(found[OUT], grams()(look(network, images))[OUT])


def test_but_for_what_is_excluded() -> None:
    found = grams(exclude=["visual.proj", "*.0.*"])(look(make_network(), make_images()))
    assert set(found) == {ATTENTION, OUT, FC, PROJ}
    with pytest.raises(ConfigError, match=r"'\*\.bias' of method\.inputs\.exclude fits none of 9 linear weights"):
        grams(exclude=["*.bias"])(look(make_network(), make_images()))


def test_leave_the_network_as_it_was() -> None:
    network, images = make_network(), make_images()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    parameters = dict(network.named_parameters())
    expected = network(images)

    def check() -> None:
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
        assert not network.training
        for name, parameter in network.named_parameters():
            assert parameter is parameters[name]
            assert torch.equal(parameter, before[name])
            assert not parameter.requires_grad

    grams()(look(network, images))
    check()
    with pytest.raises(RuntimeError):
        grams()(look(network, images[:, :, :-1]))  # which fits no layer
    check()
    assert torch.equal(network(images), expected)


def cross_attention(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tokens + block.attn(tokens, tokens.flip(1), tokens, need_weights=False)[0]


def test_what_is_not_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = make_network(), make_images()
    monkeypatch.setattr(network.visual.resblocks[1], "forward", cross_attention(network.visual.resblocks[1]))
    hidden = [ATTENTION, OUT, FC, PROJ]
    with pytest.raises(ConfigError, match=rf"inputs of {', '.join(sorted(hidden))} cannot be seen.*inputs\.exclude"):
        grams()(look(network, images))
    assert OUT.replace(".1.", ".0.") in grams(exclude=hidden)(look(network, images))


def test_inputs_that_are_not_finite_are_said() -> None:
    images = make_images()
    images[3, 0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"task 'task': the inputs of .* are NaN or Inf\. Use trainer\.precision"):
        grams()(look(make_network(), images))


def test_need_images_without_labels_and_are_known_by_their_options() -> None:
    statistic = grams(images_per_task=256, exclude=["b", "a"])
    assert statistic.needs == "images"
    assert statistic.to_json() == {"name": "input_grams", "images_per_task": 256, "exclude": ["a", "b"]}


def test_gathered_are_those_of_every_expert_with_what_replaces_it(tmp_path: Path) -> None:
    network, images = make_network(), make_images(6)
    base = {name: parameter.clone() for name, parameter in network.named_parameters()}
    experts = {"a": {key: 1.1 * tensor for key, tensor in base.items()}, "b": {key: -t for key, t in base.items()}}
    problem = SimpleNamespace(
        bank=ParameterBank.from_experts(base, experts, list(base), dtype=torch.float64),
        clip=SimpleNamespace(image_encoder=network, preprocess_cfg={}),
        heads=dict.fromkeys(experts, torch.eye(2)),
        unlabeled={"a": SimpleNamespace(images=images, key="a"), "b": SimpleNamespace(images=2 * images, key="b")},
        adapt_indices=dict.fromkeys(experts, torch.tensor([0, 2, 3])),
        cache_dir=tmp_path,
    )

    def gathered(**options: object) -> Mapping[str, Tensor]:
        place = {"device": torch.device("cpu"), "precision": "32-true", "batch_size": 2, "seed": 0}
        return gather(grams(), problem, **place, **options)  # type: ignore[arg-type]

    def expected(key: str, task: str, replaced: Mapping[str, Tensor]) -> Tensor:
        of_task = make_network()
        of_task.load_state_dict({**experts[task], **replaced})
        states = by_hand(of_task, problem.unlabeled[task].images[[0, 2, 3]])[key]
        return states.T @ states / len(states)

    found = gathered()
    assert set(found) == set(by_hand(network, images))
    torch.testing.assert_close(found[PROJ], torch.stack([expected(PROJ, task, {}) for task in experts]))
    first = {key: tensor for key, tensor in base.items() if ".0." in key}
    changed = gathered(replaced=first, keys=[PROJ, FC])
    assert list(changed) == [PROJ, FC]
    torch.testing.assert_close(changed[PROJ], torch.stack([expected(PROJ, task, first) for task in experts]))
    assert set(gathered(keys=[PROJ])) == {PROJ}  # and not what was kept for all of them
    assert len(list((tmp_path / "statistics").iterdir())) == 4
    assert torch.equal(network.visual.proj, base["visual.proj"])
