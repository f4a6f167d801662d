"""A CLIP loaded by us computes what open_clip's own computes, and everything wrong with it is said before it runs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adamerge.errors import CheckpointError, ConfigError, KeyMismatchError
from adamerge.models.open_clip import OpenClipModel, load_clip
from adamerge.models.protocol import ClipModel, ModelSpec

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SPEC = ModelSpec("open_clip", "toy.json", "weights/base.safetensors")


def build(config: dict) -> nn.Module:
    import open_clip.model

    torch.manual_seed(0)
    return open_clip.model.CLIP(**copy.deepcopy(config)).eval()


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return build(CONFIG)


@pytest.fixture
def root(tmp_path: Path, reference: nn.Module) -> Path:
    (tmp_path / "toy.json").write_text(json.dumps(CONFIG))
    (tmp_path / "weights").mkdir()
    save(reference.state_dict(), tmp_path)
    return tmp_path


def save(state: dict[str, Tensor], root: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({key: value.contiguous() for key, value in state.items()}, root / SPEC.pretrained, metadata)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


class TestLikeOpenClip:
    def test_features_of_images(self, root: Path, reference: nn.Module) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        clip = load_clip(SPEC, root=root)
        transform = image_transform_v2(PreprocessCfg(size=16), is_train=False)
        for image in (picture(16, 16), picture(40, 25), picture(20, 31, "L"), picture(20, 20, "P")):
            with torch.no_grad():
                expected = reference.encode_image(transform(image)[None])  # pyright: ignore[reportCallIssue]
                found = clip.image_encoder(clip.resize(image)[None])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_floats_are_taken_as_normalised(self, root: Path, reference: nn.Module) -> None:
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            expected = reference.encode_image(images)  # pyright: ignore[reportCallIssue]
            found = load_clip(SPEC, root=root).image_encoder(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_features_of_texts_in_batches(
        self, root: Path, reference: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import open_clip

        monkeypatch.setattr("adamerge.models.open_clip._TEXT_BATCH", 2)
        texts = [
            "a dog",
            "a photo of a cat",
            "a very long text that has more words than the twelve tokens allowed here",
        ]
        tokens = open_clip.SimpleTokenizer(context_length=12)(texts)
        with torch.no_grad():
            expected = reference.encode_text(tokens, normalize=True)  # pyright: ignore[reportCallIssue]
        found = load_clip(SPEC, root=root).encode_text(texts)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
        assert not found.requires_grad

    def test_other_text_modules(self, root: Path) -> None:
        from open_clip.model import CustomTextCLIP

        torch.manual_seed(0)
        network = CustomTextCLIP(**copy.deepcopy(CONFIG)).eval()
        (root / "toy.json").write_text(json.dumps(CONFIG | {"custom_text": True}))
        old_names = {key.removeprefix("text."): value for key, value in network.state_dict().items()}
        for state in (network.state_dict(), old_names):
            save(state, root)
            clip = load_clip(SPEC, root=root)
            assert clip.encode_text(["a dog"]).shape == (1, 16)
            assert "text.token_embedding.weight" in clip.state_dict


class TestContents:
    def test_frozen_float32_in_evaluation_mode(self, root: Path, reference: nn.Module) -> None:
        save({key: value.half() for key, value in reference.state_dict().items()}, root)
        clip = load_clip(SPEC, root=root)
        assert {value.dtype for value in clip.state_dict.values()} == {torch.float16}
        assert {value.dtype for value in clip.image_encoder.parameters()} == {torch.float32}
        assert not any(value.requires_grad for value in clip.network.parameters())
        assert not any(module.training for module in clip.network.modules())
        key = "visual.proj"
        assert torch.equal(dict(clip.image_encoder.named_parameters())[key], clip.state_dict[key].float())

    def test_merge_keys_are_the_image_tower(self, root: Path, reference: nn.Module) -> None:
        clip = load_clip(SPEC, root=root)
        expected = [name for name, _ in reference.named_parameters() if name.startswith("visual.")]
        assert list(clip.merge_keys) == expected == [name for name, _ in clip.image_encoder.named_parameters()]
        assert list(clip.state_dict) == list(reference.state_dict())

    def test_the_interface(self, root: Path) -> None:
        loaded = load_clip(SPEC, root=root)
        clip: ClipModel = loaded
        assert clip.family == "open_clip"
        assert clip.model_cfg == CONFIG
        assert clip.files == {"arch": root / "toy.json", "pretrained": root / SPEC.pretrained}
        assert clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)
        assert clip.preprocess_cfg["size"] in (16, [16, 16])
        json.dumps(clip.preprocess_cfg)
        resized = clip.resize(picture(30, 20))
        assert resized.shape == (3, 16, 16)
        assert resized.dtype == torch.uint8

    def test_loading_leaves_the_generator_alone(self, root: Path) -> None:
        before = torch.get_rng_state()
        load_clip(SPEC, root=root)
        assert torch.equal(torch.get_rng_state(), before)

    def test_hashes_follow_what_they_stand_for(self, root: Path, reference: nn.Module) -> None:
        first = load_clip(SPEC, root=root)
        state = dict(reference.state_dict())
        save(state | {"visual.proj": state["visual.proj"] + 1}, root)
        other_images = load_clip(SPEC, root=root)
        assert other_images.text_hash == first.text_hash
        assert other_images.preprocess_hash == first.preprocess_hash
        save(state | {"logit_scale": state["logit_scale"] + 1}, root)
        assert load_clip(SPEC, root=root).text_hash != first.text_hash
        save(state, root)
        (root / "toy.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "squash"}}))
        squashed = load_clip(SPEC, root=root)
        assert squashed.text_hash == first.text_hash
        assert squashed.preprocess_hash != first.preprocess_hash
        assert not torch.equal(squashed.resize(picture(40, 16)), first.resize(picture(40, 16)))

    def test_registered_names_and_their_namesakes(self, root: Path) -> None:
        """A JSON called as a registered architecture counts by its content, and leaves the registry alone."""
        import open_clip

        before = open_clip.get_model_config("ViT-B-32")
        (root / "ViT-B-32.json").write_text(json.dumps(CONFIG))
        clip = load_clip(ModelSpec("open_clip", "ViT-B-32.json", SPEC.pretrained), root=root)
        assert clip.model_cfg == CONFIG
        assert open_clip.get_model_config("ViT-B-32") == before
        with pytest.raises(KeyMismatchError, match="does not fit architecture 'ViT-B-32'"):
            load_clip(ModelSpec("open_clip", "ViT-B-32", SPEC.pretrained), root=root)

    def test_an_exported_folder(self, root: Path, reference: nn.Module) -> None:
        config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
        (root / "merged").mkdir()
        (root / "merged" / "open_clip_config.json").write_text(json.dumps(config))
        save_file(load_file(root / SPEC.pretrained), root / "merged" / "open_clip_model.safetensors")
        for arch, weights in [
            ("merged/open_clip_config.json", "merged/open_clip_model.safetensors"),
            ("toy.json", "local-dir:merged"),
            ("local-dir:merged", "local-dir:merged"),
        ]:
            clip = load_clip(ModelSpec("open_clip", arch, weights), root=root)
            assert clip.preprocess_cfg["mean"] == [0.5] * 3
            assert clip.encode_text(["a dog"]).shape == (1, 16)


class TestRefused:
    def load(self, root: Path, **changes: str) -> OpenClipModel:
        return load_clip(
            ModelSpec(**({"family": "open_clip", "arch": SPEC.arch, "pretrained": SPEC.pretrained} | changes)),
            root=root,
        )

    def test_family(self, root: Path) -> None:
        with pytest.raises(ConfigError, match=r"model\.family: expected 'open_clip', found 'flair'"):
            self.load(root, family="flair")

    def test_unknown_architecture(self, root: Path) -> None:
        with pytest.raises(ConfigError, match=r"knows no 'ViT-B-33'; close to it are .*ViT-B-32"):
            self.load(root, arch="ViT-B-33")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"gone\.json: no such model config"),
            ("{", r"gone\.json: not a JSON file"),
            ('{"embed_dim": 3}', r"gone\.json: expected an open_clip model config with embed_dim"),
            (json.dumps(CONFIG | {"multimodal_cfg": {}}), "CoCa"),
            (json.dumps(CONFIG | {"vision_cfg": {"depth": 3}}), r"cannot build 'gone\.json' \(.*depth.*\)\. Correct"),
        ],
    )
    def test_bad_config(self, root: Path, content: str | None, message: str) -> None:
        if content is not None:
            (root / "gone.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            self.load(root, arch="gone.json")

    @pytest.mark.parametrize("change", [{"arch": "../toy.json"}, {"pretrained": "weights/../../base.safetensors"}])
    def test_leaving_the_folder(self, root: Path, change: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="leaves the suite's folder"):
            self.load(root, **change)

    def test_missing_weights(self, root: Path) -> None:
        with pytest.raises(CheckpointError, match=r"weights/gone\.pt: no such weight file"):
            self.load(root, pretrained="weights/gone.pt")

    def test_unknown_tag(self, root: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"'opened' is neither a file .* nor a tag of ViT-B-16, which has .*openai"
        ):
            self.load(root, arch="ViT-B-16", pretrained="opened")

    def test_keys_and_shapes(self, root: Path, reference: nn.Module) -> None:
        state = dict(reference.state_dict())
        del state["visual.proj"], state["text_projection"]
        state |= {"extra": torch.ones(1), "ln_final.bias": torch.ones(3)}
        save(state, root)
        with pytest.raises(
            KeyMismatchError,
            match=r"missing keys: 2 \(text_projection, visual\.proj\); unknown keys: 1 \(extra\); "
            r"other shapes: 1 \(ln_final\.bias \(3,\) instead of \(16,\)\)\. Choose the model\.arch",
        ):
            self.load(root)

    def test_at_most_five_keys(self, root: Path) -> None:
        save({"extra": torch.ones(1)}, root)
        with pytest.raises(KeyMismatchError, match=r"missing keys: \d+ \((\S+, ){5}… \d+ more\)"):
            self.load(root)

    def test_levelled_differences(self, root: Path, reference: nn.Module) -> None:
        """OpenAI's archives carry three sizes beside the weights; the logit scale may be one-dimensional."""
        state = dict(reference.state_dict())
        save(state | {"input_resolution": torch.tensor(16), "logit_scale": state["logit_scale"].view(1)}, root)
        assert self.load(root).state_dict["logit_scale"].shape == ()


class TestQuickGelu:
    def test_metadata(self, root: Path, reference: nn.Module) -> None:
        save(reference.state_dict(), root, {"quick_gelu": "true"})
        with pytest.raises(
            ConfigError, match=r"computes GELU, but .* QuickGELU\. Write \"quick_gelu\": true in toy\.json"
        ):
            load_clip(SPEC, root=root)
        (root / "toy.json").write_text(json.dumps(CONFIG | {"quick_gelu": True}))
        load_clip(SPEC, root=root)

    def test_config_beside_the_weights(self, root: Path) -> None:
        beside = {"model_cfg": CONFIG, "preprocess_cfg": {}}
        (root / "toy.json").write_text(json.dumps(CONFIG | {"quick_gelu": True}))
        (root / "weights" / "open_clip_config.json").write_text(json.dumps(beside))
        with pytest.raises(ConfigError, match=r"computes QuickGELU, but .* with GELU\. Write \"quick_gelu\": false"):
            load_clip(SPEC, root=root)

    @pytest.mark.parametrize(
        ("arch", "tag", "remedy"),
        [
            ("ViT-B-32", "openai", r"Set model\.arch to ViT-B-32-quickgelu"),
            ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "nor a tag of ViT-B-32-quickgelu"),
        ],
    )
    def test_tags_before_a_download(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, arch: str, tag: str, remedy: str
    ) -> None:
        def download(*args: object, **kwargs: object) -> str:
            raise AssertionError("downloaded")

        monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
        with pytest.raises(ConfigError, match=remedy):
            load_clip(ModelSpec("open_clip", arch, tag), root=root)

    def test_hub_before_its_weights(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def download(name: str, filename: str | None) -> str:
            asked.append((name, filename))
            (root / "hub.json").write_text(json.dumps({"model_cfg": CONFIG | {"quick_gelu": True}}))
            return str(root / "hub.json")

        monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", download)
        with pytest.raises(ConfigError, match="QuickGELU"):
            load_clip(ModelSpec("open_clip", "toy.json", "hf-hub:owner/name"), root=root)
        assert asked == [("owner/name", "open_clip_config.json")]


def test_a_failed_download_says_what_to_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host\nand a page more")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", download)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(no route to host\)\. Check the name"):
        load_clip(ModelSpec("open_clip", "toy.json", "hf-hub:owner/name"), root=root)
    with pytest.raises(CheckpointError, match=r"tag 'openai' of ViT-B-32-quickgelu: cannot be downloaded \(no route"):
        load_clip(ModelSpec("open_clip", "ViT-B-32-quickgelu", "openai"), root=root)


@pytest.mark.shared
def test_real8_loads(real8: Path) -> None:
    clip = load_clip(ModelSpec("open_clip", "ViT-mini-8-32.json", "weights/pretrained.safetensors"), root=real8)
    assert len(clip.merge_keys) == 80
    assert sum(clip.state_dict[key].numel() for key in clip.merge_keys) == pytest.approx(1.23e6, rel=0.01)
