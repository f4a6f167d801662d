"""The merged folder works where adamerge is not installed.

ADAMERGE_BARE_PYTHON names the interpreter of an environment that has open_clip and not adamerge (CI makes one). Without
it, this interpreter is used with adamerge made impossible to import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import Run, on
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from adamerge.models.open_clip import load_clip
from adamerge.tasks.datasets import load_image_set
from adamerge.tasks.specs import load_suite

LOADS = """
import sys
import torch
if {block}:
    sys.modules["adamerge"] = None  # any import of it fails
else:
    import importlib.util
    assert importlib.util.find_spec("adamerge") is None, "this environment has adamerge"
import open_clip
from PIL import Image
from safetensors.torch import load_file, save_file

source = "local-dir:{merged}"
model, _, preprocess = open_clip.create_model_and_transforms(source)
tokenizer = open_clip.get_tokenizer(source)
saved = load_file("{saved}")
pixels = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in saved["pixels"]]
model.eval()
with torch.no_grad():
    images = model.encode_image(torch.stack([preprocess(image) for image in pixels]))
    texts = model.encode_text(tokenizer(["a photo of red.", "a photo of blue."]), normalize=True)
save_file({{"images": images, "texts": texts}}, "{out}")
"""


@pytest.mark.slow
def test_open_clip_alone_gives_the_features_of_the_run(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    adamerge(
        "method=adamerging_layerwise",
        "trainer.max_steps=10",
        "optimizer.lr=0.05",
        "bank.dtype=float32",
        *on(toy, run_dir),
    )
    suite = load_suite(toy)
    clip = load_clip(suite.model, root=suite.root)
    pixels = load_image_set(suite.tasks[0].data, "test", clip, tmp_path / "cache").images[:6]
    # In memory: θ₀ + Σ λτ from the saved coefficients, written out here once more.
    saved = load_file(run_dir / "coefficients.safetensors")["coefficients"]
    experts = [load_file(task.expert) for task in suite.tasks]
    weights = {
        key: clip.state_dict[key]
        + sum(saved[k, group] * (expert[key] - clip.state_dict[key]) for k, expert in enumerate(experts))
        for group, key in enumerate(clip.merge_keys)
    }
    with torch.no_grad():
        expected = functional_call(clip.image_encoder, weights, (pixels,))
        pretrained = clip.image_encoder(pixels)
    save_file({"pixels": pixels.contiguous()}, tmp_path / "saved.safetensors")
    bare = os.environ.get("ADAMERGE_BARE_PYTHON")
    script = LOADS.format(
        block=not bare,
        merged=run_dir / "merged",
        saved=tmp_path / "saved.safetensors",
        out=tmp_path / "out.safetensors",
    )
    done = subprocess.run(
        [bare or sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["images"], expected, rtol=1e-5, atol=1e-5)
    texts = clip.encode_text(["a photo of red.", "a photo of blue."])
    torch.testing.assert_close(found["texts"], texts, rtol=1e-5, atol=1e-5)
    assert (expected - pretrained).abs().max() > 1e-3
