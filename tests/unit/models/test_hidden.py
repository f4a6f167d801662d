"""Hidden states are what open_clip's blocks put out, one after another."""

import pytest
import torch
from torch import Tensor, nn

from adamerge.errors import ConfigError
from adamerge.models.hidden import HiddenStates
from adamerge.models.layers import use_lean_layers

LAYERS, WIDTH, TOKENS = 3, 32, 5


def make_tower(batch_first: bool = True) -> nn.Module:
    """open_clip's, in float64; older checkpoints of it keep the batch in the second dimension."""
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=16, patch_size=8, width=WIDTH, layers=LAYERS, heads=2, mlp_ratio=2.0, output_dim=12
    )
    tower.transformer.batch_first = batch_first
    for block in tower.transformer.resblocks:
        block.attn.batch_first = batch_first
    return tower.double().eval()


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(tower: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs of all blocks, called one by one after the embedding of patches, class token and positions."""
    patches = tower.conv1(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([tower.class_embedding.expand(len(images), 1, -1), patches], dim=1)
    state, states = tower.ln_pre(tokens + tower.positional_embedding), []
    for block in tower.transformer.resblocks:
        state = block(state) if tower.transformer.batch_first else block(state.transpose(0, 1)).transpose(0, 1)
        states.append(state)
    return states


@pytest.fixture
def tower() -> nn.Module:
    return make_tower()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_they_are_the_outputs_of_the_blocks(batch_first: bool, lean: bool) -> None:
    tower = make_tower(batch_first)
    expected = by_hand(tower, images())
    if lean:
        use_lean_layers(tower)
    hidden = HiddenStates(tower, range(LAYERS))
    tower(images())
    found = hidden.take()
    assert [tuple(state.shape) for state in found] == [(2, TOKENS, WIDTH)] * LAYERS
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert (found[1] - found[0]).abs().max() > 0.01


@torch.no_grad()
def test_the_features_follow_from_the_last_ones_class_token(tower: nn.Module) -> None:
    hidden = HiddenStates(tower, [-1])
    features = tower(images())
    (last,) = hidden.take()
    torch.testing.assert_close(tower.ln_post(last[:, 0]) @ tower.proj, features)


@pytest.mark.parametrize("layers", [[2, 0], [-1, -3], [1, 1], [-1, 2]])
@torch.no_grad()
def test_they_come_in_the_order_asked_for(tower: nn.Module, layers: list[int]) -> None:
    hidden = HiddenStates(nn.ModuleDict({"visual": tower}), layers)  # wherever in the network the tower lies
    tower(images())
    expected = by_hand(tower, images())
    for found, layer in zip(hidden.take(), layers, strict=True):
        torch.testing.assert_close(found, expected[layer])


def test_each_pass_has_its_own_and_a_gradient_flows_into_them(tower: nn.Module) -> None:
    hidden = HiddenStates(tower, [0])
    caught = []
    for seed in (1, 2):
        tower(images(seed=seed))
        caught.append(hidden.take()[0])
    assert not torch.equal(*caught)
    caught[0].square().sum().backward()
    touched = {
        name.split(".")[2] for name, value in tower.named_parameters() if value.grad is not None and "res" in name
    }
    assert touched == {"0"}


def test_what_is_taken_or_closed_is_gone(tower: nn.Module) -> None:
    hidden = HiddenStates(tower, [0, 0, 1])
    tower(images())
    hidden.take()
    with pytest.raises(KeyError):
        hidden.take()
    hidden.close()
    tower(images())
    with pytest.raises(KeyError):
        hidden.take()
    assert not any(block._forward_hooks for block in tower.transformer.resblocks)


def test_without_layers_the_network_is_left_alone() -> None:
    network = nn.Linear(2, 2)
    hidden = HiddenStates(network, [])
    network(torch.ones(2))
    assert hidden.take() == ()
    assert not network._forward_hooks
    hidden.close()


@pytest.mark.parametrize("layer", [3, -4, 12])
def test_a_block_that_is_not_there_is_refused(tower: nn.Module, layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.layers: no block {layer}; this image tower has 3"):
        HiddenStates(tower, [0, layer])
    assert not any(block._forward_hooks for block in tower.transformer.resblocks)


def test_a_tower_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no list of residual blocks. Use objective\.layers=\[\]"):
        HiddenStates(nn.Linear(2, 2), [0])
