"""Which entries merge, and where in the network they are."""

import pytest

from adamerge.bank import block_of, select_keys
from adamerge.errors import ConfigError

KEYS = (
    "visual.proj",
    "visual.conv1.weight",
    "visual.transformer.resblocks.0.ln_1.weight",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "visual.transformer.resblocks.1.ln_1.weight",
)


def test_everything_without_patterns_in_order() -> None:
    assert select_keys(KEYS) == KEYS
    assert select_keys(iter(KEYS[::-1])) == KEYS[::-1]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (["*.resblocks.*"], [], [2, 3, 4]),
        ([], ["*.ln_*"], [0, 1, 3]),
        (["*.resblocks.0.*", "visual.proj"], ["*mlp*"], [0, 2]),
        (["visual.conv1.weight"], [], [1]),
        (["*.resblocks.[01].ln_?.weight"], [], [2, 4]),
    ],
)
def test_patterns(include: list[str], exclude: list[str], chosen: list[int]) -> None:
    assert select_keys(KEYS, include=include, exclude=exclude) == tuple(KEYS[i] for i in chosen)


def test_patterns_match_whole_names_and_their_case() -> None:
    for pattern in ("proj", "visual", "VISUAL.*"):
        with pytest.raises(ConfigError, match=rf"'{pattern}'.*none of the model's 5 mergeable keys.*'visual\.proj'"):
            select_keys(KEYS, include=[pattern])


def test_a_pattern_without_effect_is_an_error_even_beside_others() -> None:
    with pytest.raises(ConfigError, match=r"'text\.\*'"):
        select_keys(KEYS, exclude=["*ln*", "text.*"])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to merge"):
        select_keys(KEYS, exclude=["*"])
    with pytest.raises(ConfigError, match="nothing to merge"):
        select_keys(())


@pytest.mark.parametrize(
    ("key", "block"),
    [
        # open_clip
        ("visual.class_embedding", "embedding"),
        ("visual.positional_embedding", "embedding"),
        ("visual.conv1.weight", "embedding"),
        ("visual.ln_pre.bias", "embedding"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "block.0"),
        ("visual.transformer.resblocks.3.attn.out_proj.weight", "block.3"),
        ("visual.transformer.resblocks.11.mlp.c_proj.bias", "block.11"),
        ("visual.ln_post.weight", "output"),
        ("visual.proj", "output"),
        # open_clip with a timm tower
        ("visual.trunk.cls_token", "embedding"),
        ("visual.trunk.pos_embed", "embedding"),
        ("visual.trunk.patch_embed.proj.weight", "embedding"),
        ("visual.trunk.blocks.7.norm1.weight", "block.7"),
        ("visual.trunk.norm.weight", "output"),
        ("visual.trunk.attn_pool.latent", "output"),
        ("visual.head.proj.weight", "output"),
        # Hugging Face names below the same prefix
        ("visual.vision_model.embeddings.patch_embedding.weight", "embedding"),
        ("visual.vision_model.pre_layrnorm.weight", "embedding"),
        ("visual.vision_model.encoder.layers.5.self_attn.q_proj.weight", "block.5"),
        ("visual.vision_model.post_layernorm.bias", "output"),
    ],
)
def test_block_of(key: str, block: str) -> None:
    assert block_of(key) == block
