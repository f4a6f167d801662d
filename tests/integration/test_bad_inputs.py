"""Bad input ends with exit code 1 and one message that names the culprit and the remedy; earlier outputs stay."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command import Run, on
from PIL import Image
from safetensors.torch import load_file, save_file


class _Payload:
    """Pickles to a call that would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def _expert(suite: Path) -> Path:
    return suite / "weights" / "halves.safetensors"


def _change_expert(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def breaks(suite: Path) -> None:
        state = load_file(_expert(suite))
        change(state)
        save_file(state, _expert(suite))

    return breaks


def _edit_task(**changes: object) -> Callable[[Path], None]:
    def breaks(suite: Path) -> None:
        spec = yaml.safe_load((suite / "suite.yaml").read_text())
        spec["tasks"][1].update(changes)
        (suite / "suite.yaml").write_text(yaml.safe_dump(spec))

    return breaks


def _truncate(suite: Path) -> None:
    _expert(suite).write_bytes(_expert(suite).read_bytes()[:-100])


def _another_architecture(suite: Path) -> None:
    wide = {key: torch.zeros(*(2 * n for n in tensor.shape)) for key, tensor in load_file(_expert(suite)).items()}
    save_file(wide, _expert(suite))


def _changed_text_tower(suite: Path) -> None:
    full = load_file(suite / "weights" / "pretrained.safetensors")
    full["text_projection"] += 1
    save_file(full, _expert(suite))


def _unsafe_pickle(suite: Path) -> None:
    with (suite / "weights" / "halves.pt").open("wb") as file:
        pickle.dump({"state_dict": _Payload(suite / "executed")}, file)
    _edit_task(expert="weights/halves.pt")(suite)


def _unsafe_torch_file(suite: Path) -> None:
    torch.save({"state_dict": _Payload(suite / "executed")}, suite / "weights" / "halves.pt")
    _edit_task(expert="weights/halves.pt")(suite)


def _empty_data(suite: Path) -> None:
    for file in (suite / "data" / "halves").iterdir():
        file.unlink()


def _labels_exceed(suite: Path) -> None:
    import datasets

    folder = suite / "data" / "halves"
    images = [Image.fromarray(np.zeros((16, 16, 3), np.uint8))] * 3
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2]}, features=features)
    data.to_parquet(folder / "test.parquet")
    _edit_task(classes=["left", "right"])(suite)


def _corrupt_image(suite: Path) -> None:
    import pandas

    file = suite / "data" / "halves" / "test.parquet"
    table = pandas.read_parquet(file)
    table.at[7, "image"] = {"bytes": b"no image", "path": None}
    table.to_parquet(file)


FILES = {
    "missing expert": (lambda s: _expert(s).unlink(), ["halves.safetensors"]),
    "truncated": (_truncate, ["halves.safetensors"]),
    "zero bytes": (lambda s: _expert(s).write_bytes(b""), ["halves.safetensors"]),
    "unsafe pickle": (_unsafe_pickle, ["halves.pt"]),
    "unsafe torch file": (_unsafe_torch_file, ["halves.pt"]),
    "another architecture": (_another_architecture, ["halves", "shape", "architecture"]),
    "missing key": (_change_expert(lambda s: s.pop("visual.proj")), ["halves", "visual.proj", "model.exclude"]),
    "extra key": (_change_expert(lambda s: s.update({"visual.extra": torch.ones(1)})), ["halves", "visual.extra"]),
    "changed text tower": (_changed_text_tower, ["halves", "text tower", "text_projection"]),
    "another dtype": (
        _change_expert(lambda s: s.update({"visual.proj": s["visual.proj"].half()})),
        ["halves", "visual.proj", "bank.strict_dtype=false"],
    ),
    "NaN": (_change_expert(lambda s: s["visual.proj"].fill_(torch.nan)), ["halves.safetensors", "visual.proj", "NaN"]),
    "Inf": (_change_expert(lambda s: s["visual.proj"].fill_(torch.inf)), ["halves.safetensors", "visual.proj", "Inf"]),
    "empty data": (_empty_data, ["halves"]),
    "missing data": (_edit_task(data="data/nowhere"), ["halves", "data/nowhere"]),
    "labels exceed": (_labels_exceed, ["halves", "class"]),
    "corrupt image": (_corrupt_image, ["halves", "7", "test.parquet"]),
    "unknown split": (_edit_task(splits={"evaluate": "validation"}), ["halves", "validation", "test", "train"]),
    "path outside": (_edit_task(expert="../../elsewhere.safetensors"), ["halves", "elsewhere"]),
    "no suite.yaml": (lambda s: (s / "suite.yaml").unlink(), ["suite.yaml"]),
}


@pytest.fixture(scope="module")
def earlier(adamerge: Run, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outputs of a run that went well."""
    folder = tmp_path_factory.mktemp("earlier")
    adamerge("method=average", *on(toy, folder))
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _refuses(done, *words: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr.strip()
    assert message.count("Error:") == 1, message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, adamerge: Run, toy: Path, earlier: Path, tmp_path: Path) -> None:
    breaks, words = FILES[name]
    suite = shutil.copytree(toy, tmp_path / "suite")
    breaks(suite)
    before = _contents(earlier)
    done = adamerge("method=adamerging_layerwise", *on(suite, earlier), check=False)
    _refuses(done, *words)
    assert "learning coefficients" not in done.stderr
    assert _contents(earlier) == before
    assert not (suite / "executed").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["method=nonesuch"], ["nonesuch", "adamerging_layerwise", "ties"]),
        (["suite=nonesuch"], ["nonesuch", "folder", "mini"]),
        (["suite=folder"], ["suite.root"]),
        (["suite=folder", "suite.root=nowhere"], ["nowhere"]),
        (["trainer.max_stepz=3"], ["max_stepz"]),
        (["method.granularity=layer"], ["layer", "tensor"]),
        (["method.constraint=clip"], ["clip", "clamp"]),
        (["data.fraction=0"], ["data.fraction"]),
        (["data.adapt=some"], ["data.adapt", "half"]),
        (["method=ties", "method.density=2"], ["density"]),
        (["data.task_weights={none: 1}"], ["none", "colours"]),
        (["suite.tasks=[none]"], ["none", "colours"]),
        (["model.exclude=[nothing]"], ["nothing", "model.exclude"]),
        (["method.coefficients=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["nonesuch"], ["nonesuch", "evaluate"]),
    ],
    ids=lambda value: value[-1] if isinstance(value[0], str) and "=" in value[-1] else None,
)
def test_bad_options(options: list[str], words: list[str], adamerge: Run, toy: Path, tmp_path: Path) -> None:
    about_suite = any(option.startswith("suite") and "tasks" not in option for option in options)
    usual = [f"paths.run_dir={tmp_path / 'run'}"] if about_suite else on(toy, tmp_path / "run")
    done = adamerge(*options, *(usual if "=" in options[0] else []), check=False)
    _refuses(done, *words)
    assert not (tmp_path / "run" / "results.json").exists()


def test_output_folder_that_cannot_be_made(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = adamerge("method=average", *on(toy, tmp_path / "file" / "run"), check=False)
    _refuses(done, str(tmp_path / "file"))


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_coefficients(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    """An expert with values near float32's end merges to weights whose features overflow."""
    suite = shutil.copytree(toy, tmp_path / "suite")
    _change_expert(lambda state: state["visual.conv1.weight"].fill_(3e38))(suite)
    options = ["method=adamerging_layerwise", "trainer.max_steps=30", "optimizer.lr=0.0"]
    done = adamerge(*options, *on(suite, tmp_path / "run"), check=False)
    _refuses(done, "step 0", "colours", "coefficients.safetensors", "TrainingError")
    kept = load_file(tmp_path / "run" / "coefficients.safetensors")["coefficients"]
    assert torch.equal(kept, torch.full_like(kept, 0.3))
    assert not (tmp_path / "run" / "results.json").exists()


def test_several_faults_are_told_at_once(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    suite = shutil.copytree(toy, tmp_path / "suite")
    _change_expert(lambda state: state.pop("visual.proj"))(suite)
    state = load_file(suite / "weights" / "sizes.safetensors")
    state["visual.ln_post.bias"] = torch.zeros(3)
    save_file(state, suite / "weights" / "sizes.safetensors")
    _refuses(adamerge(*on(suite, tmp_path / "run"), check=False), "'halves'", "'sizes'", "visual.ln_post.bias")


def test_the_message_of_a_bad_run_leaves_results_readable(earlier: Path) -> None:
    assert json.loads((earlier / "results.json").read_text())["method"] == "average"
