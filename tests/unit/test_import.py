"""What importing adamerge costs: the libraries that it loads, seen from a fresh interpreter."""

import json
import subprocess
import sys

import pytest

import adamerge

HEAVY = {
    "datasets",
    "hydra",
    "lightning",
    "matplotlib",
    "omegaconf",
    "open_clip",
    "pandas",
    "pyarrow",
    "pytorch_lightning",
    "rich",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
    "transformers",
    "wandb",
}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that ``code`` leaves in a fresh interpreter."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_adamerge_loads_no_other_library() -> None:
    loaded = loaded_by("import adamerge")
    assert "adamerge" in loaded
    assert not loaded & (HEAVY | {"torch", "numpy"})


def test_the_hot_path_loads_torch_and_safetensors_alone() -> None:
    loaded = loaded_by("import adamerge.merging, adamerge.objectives, adamerge.methods; adamerge.ParameterBank")
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", adamerge.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert callable(getattr(adamerge, name))


def test_the_public_names_are_those_of_their_modules() -> None:
    from adamerge.cli.run import run
    from adamerge.merging import merge

    assert adamerge.run is run
    assert adamerge.merge is merge


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merges'"):
        adamerge.merges  # noqa: B018
