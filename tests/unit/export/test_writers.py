import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.errors import KeyMismatchError, OutputError, ShapeError
from adamerge.export import write_heads, write_open_clip_folder, writers

TEXTS = ["a photo of a cat.", "two dogs, and then many more words than the context of this small model can ever hold"]
VISION = {"image_size": 24, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
    "quick_gelu": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "custom_text": {
        "embed_dim": 8,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {**VISION, "pool_type": "avg", "no_ln_pre": True},
        "text_cfg": {
            **TEXT,
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
}
PREPROCESS = {
    "size": (24, 24),
    "mode": "RGB",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.25, 0.5, 0.75),
    "interpolation": "bilinear",
    "resize_mode": "squash",
    "fill_color": 3,
}


@dataclass
class TinyClip:
    """What the writers use of a ``ClipModel``."""

    model_cfg: dict[str, Any]
    state_dict: dict[str, Tensor]
    preprocess_cfg: dict[str, Any] = field(default_factory=lambda: dict(PREPROCESS))
    tokenizer_source: str = ""


def build(config: dict[str, Any]) -> torch.nn.Module:
    """The architecture as open_clip itself makes it, every parameter random."""
    from open_clip.model import CLIP, CustomTextCLIP

    options = dict(config)
    model = (CustomTextCLIP if options.pop("custom_text", False) else CLIP)(**options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def merged_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"visual.{key}": p.detach() + 0.1 * torch.randn_like(p) for key, p in model.visual.named_parameters()}


def image() -> Image.Image:
    pixels = torch.randint(0, 256, (31, 47, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    return Image.fromarray(pixels.numpy())


# What a user does who has never heard of adamerge.
LOADER = """
import sys
sys.modules["adamerge"] = None  # an import of it, or of a part of it, fails
import open_clip, torch
from PIL import Image
from safetensors.torch import save_file
root, names, texts = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
found = {}
for name in names:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{root}/{name}/merged")
    tokens = open_clip.get_tokenizer(f"local-dir:{root}/{name}/merged")(texts)
    pixels = preprocess(Image.open(f"{root}/image.png"))
    with torch.inference_mode():
        image, text = model.eval().encode_image(pixels[None]), model.encode_text(tokens)
    found |= {f"{name}.pixels": pixels, f"{name}.tokens": tokens, f"{name}.image": image, f"{name}.text": text}
    found[f"{name}.scale"] = model.logit_scale.detach().exp()
assert not any(module.startswith("adamerge.") for module in sys.modules)
save_file({key: value.contiguous() for key, value in found.items()}, f"{root}/found.safetensors")
"""


@pytest.mark.slow
def test_open_clip_loads_the_folder_without_adamerge(tmp_path):
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.manual_seed(0)
    image().save(tmp_path / "image.png")
    expected, pretrained = {}, {}
    for name, config in CONFIGS.items():
        model = build(config)
        # Half precision at rest, as many checkpoints are; a merge is in full precision.
        clip = TinyClip(config, {key: tensor.half() for key, tensor in model.state_dict().items()})
        merged = merged_of(model)
        before = {key: tensor.clone() for key, tensor in clip.state_dict.items()}
        write_open_clip_folder(tmp_path / name / "merged", clip, merged, card=f"# {name}\n")
        assert all(torch.equal(clip.state_dict[key], before[key]) for key in before)

        pixels = image_transform_v2(PreprocessCfg(**PREPROCESS), is_train=False)(image())
        options = config["text_cfg"].get("tokenizer_kwargs", {})
        tokens = open_clip.SimpleTokenizer(context_length=TEXT["context_length"], **options)(TEXTS)
        model.load_state_dict({key: tensor.float() for key, tensor in before.items()})
        with torch.inference_mode():
            pretrained[name] = model.encode_image(pixels[None])
            model.load_state_dict(merged, strict=False)
            features = model.encode_image(pixels[None]), model.encode_text(tokens)
        expected |= {f"{name}.pixels": pixels, f"{name}.tokens": tokens}
        expected |= {f"{name}.image": features[0], f"{name}.text": features[1]}
        expected[f"{name}.scale"] = model.logit_scale.detach().exp()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-I", "-c", LOADER, str(tmp_path), ",".join(CONFIGS), *TEXTS]
    subprocess.run(command, cwd=elsewhere, check=True, timeout=300)

    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for name, features in pretrained.items():
        assert (found[f"{name}.image"] - features).abs().max() > 1e-2
        assert found[f"{name}.tokens"].shape == (len(TEXTS), TEXT["context_length"])
        assert (tmp_path / name / "merged" / "README.md").read_text() == f"# {name}\n"
    assert not torch.allclose(found["plain.image"], found["quick_gelu.image"])


@pytest.fixture
def clip() -> TinyClip:
    state_dict = {
        "visual.proj": torch.arange(6.0).reshape(2, 3).half(),
        "visual.conv1.weight": torch.ones(4).half(),
        "visual.steps": torch.tensor(7),
        "token_embedding.weight": torch.ones(5, 2).bfloat16(),
        "logit_scale": torch.tensor(4.6),
    }
    return TinyClip({"embed_dim": 3, "vision_cfg": {}, "text_cfg": {}}, state_dict)


def test_every_tensor_is_there_in_full_precision(clip, tmp_path):
    merged = {"visual.proj": torch.full((3, 2), 1 / 3).T.requires_grad_()}  # neither contiguous nor a plain leaf
    write_open_clip_folder(tmp_path / "merged", clip, merged, card="card")
    found = load_file(tmp_path / "merged" / "open_clip_model.safetensors")
    assert found.keys() == clip.state_dict.keys()
    assert torch.equal(found["visual.proj"], torch.full((2, 3), 1 / 3))
    assert torch.equal(found["visual.conv1.weight"], torch.ones(4))
    assert torch.equal(found["visual.steps"], torch.tensor(7))
    assert {key for key, tensor in found.items() if tensor.dtype != torch.float32} == {"visual.steps"}
    config = json.loads((tmp_path / "merged" / "open_clip_config.json").read_text())
    assert config["model_cfg"] == clip.model_cfg
    assert config["preprocess_cfg"] == {
        **PREPROCESS,
        "size": [24, 24],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.25, 0.5, 0.75],
    }


def test_whoever_may_read_the_configuration_may_read_the_weights(clip, tmp_path):
    write_open_clip_folder(tmp_path / "merged", clip, {}, card="card")
    (tmp_path / "plain").write_text("a file as this process makes them")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "merged").iterdir()}
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}, modes


def test_tied_tensors_are_written_twice(clip, tmp_path):
    shared = torch.randn(4)
    clip.state_dict |= {"visual.conv1.weight": shared, "text.tied": shared}
    write_open_clip_folder(tmp_path / "merged", clip, {}, card="card")
    found = load_file(tmp_path / "merged" / "open_clip_model.safetensors")
    assert torch.equal(found["visual.conv1.weight"], shared)
    assert torch.equal(found["text.tied"], shared)


def test_an_older_folder_is_replaced_whole(clip, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "pytorch_model.bin").write_bytes(b"old")
    write_open_clip_folder(tmp_path / "merged", clip, {}, card="card")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == {"README.md", "open_clip_config.json", "open_clip_model.safetensors"}


def full_disk(*_args, **_options):
    raise SafetensorError("No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("merged", "error", "message"),
    [
        ({"visual.projection": torch.ones(2, 3)}, KeyMismatchError, "visual.projection"),
        ({"visual.proj": torch.ones(3, 2)}, ShapeError, "visual.proj"),
        ({}, OutputError, r"open_clip_model.safetensors in .*No space left.*paths.run_dir"),
    ],
)
def test_a_failure_leaves_the_older_folder_alone(clip, tmp_path, monkeypatch, merged, error, message):
    write_open_clip_folder(tmp_path / "merged", clip, {}, card="the older one")
    monkeypatch.setattr(writers, "save_file", full_disk)
    with pytest.raises(error, match=message):
        write_open_clip_folder(tmp_path / "merged", clip, merged, card="the newer one")
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]
    assert (tmp_path / "merged" / "README.md").read_text() == "the older one"
    assert load_file(tmp_path / "merged" / "open_clip_model.safetensors").keys() == clip.state_dict.keys()


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """A folder with a Hugging Face tokenizer of two words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "cat": 2, "dog": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("from_folder", [False, True])
def test_the_tokenizer_of_a_hugging_face_text_tower_travels_along(clip, tmp_path, tokenizer, from_folder):
    import open_clip

    clip.model_cfg["text_cfg"] = {"context_length": 5, "hf_tokenizer_name": str(tokenizer)}
    if from_folder:  # the pretrained model is an open_clip folder itself: the name in its text_cfg does not count
        clip.model_cfg["text_cfg"]["hf_tokenizer_name"] = "somewhere/else"
        (tokenizer / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip.model_cfg}))
        clip.tokenizer_source = f"local-dir:{tokenizer}"
    write_open_clip_folder(tmp_path / "merged", clip, {}, card="card")
    shutil.rmtree(tokenizer)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'merged'}")(["dog cat bird"])
    assert tokens.tolist() == [[3, 2, 1, 0, 0]]
    assert (tmp_path / "merged" / "README.md").read_text() == "card"


def test_heads(tmp_path):
    heads = {"digits": torch.randn(2, 4, dtype=torch.float64), "größe": torch.randn(3, 4)}
    names = {"digits": ["zero", "one"], "größe": ("klein", "mittel", "groß"), "not merged": ["x"]}
    write_heads(tmp_path / "heads.safetensors", heads, names)
    found = load_file(tmp_path / "heads.safetensors")
    assert found.keys() == heads.keys()
    assert torch.equal(found["digits"], heads["digits"].float())
    with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["class_names"]) == {
            "digits": ["zero", "one"],
            "größe": ["klein", "mittel", "groß"],
        }


def test_a_head_needs_a_name_per_class(tmp_path):
    with pytest.raises(ShapeError, match=r"'digits'.*\(2, 4\).* 3 class names"):
        write_heads(tmp_path / "heads.safetensors", {"digits": torch.randn(2, 4)}, {"digits": ["0", "1", "2"]})
    assert not list(tmp_path.iterdir())


def test_a_failed_file_leaves_the_older_one(tmp_path, monkeypatch):
    path = Path(tmp_path / "heads.safetensors")
    save_file({"digits": torch.ones(1, 1)}, path)
    monkeypatch.setattr(writers, "save_file", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_heads(path, {"digits": torch.zeros(1, 1)}, {"digits": ["zero"]})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load_file(path)["digits"].item() == 1
