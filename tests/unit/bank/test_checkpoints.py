"""Weight files are read whole and as they are, or refused with a remedy; no file gets code to run."""

import collections
import enum
import io
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.bank.checkpoints import hash_tensors, read_checkpoint
from adamerge.errors import CheckpointError


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "visual.proj": torch.randn(4, 3, generator=generator),
        "visual.half": torch.randn(5, generator=generator).half(),
        "visual.brain": torch.randn(2, 2, generator=generator).bfloat16(),
        "logit_scale": torch.tensor(2.5),
        "steps": torch.tensor(7),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


class TestFormats:
    def test_safetensors(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, tmp_path / "w.safetensors")
        assert_same(read_checkpoint(tmp_path / "w.safetensors"), weights)

    def test_safetensors_under_another_suffix(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, tmp_path / "w.bin")
        assert_same(read_checkpoint(tmp_path / "w.bin"), weights)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_torch_files_of_both_formats(self, tmp_path: Path, weights: dict[str, Tensor], zipped: bool) -> None:
        torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        assert_same(read_checkpoint(tmp_path / "w.pt"), weights)

    def test_writing_to_a_mapped_tensor_leaves_the_file(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, tmp_path / "w.safetensors")
        torch.save(weights, tmp_path / "w.pt")
        for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
            read_checkpoint(path)["visual.proj"].zero_()
            assert_same(read_checkpoint(path), weights)

    @pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model"])
    def test_nested_state_dicts(self, tmp_path: Path, weights: dict[str, Tensor], name: str) -> None:
        torch.save({name: weights, "epoch": 3}, tmp_path / "w.pt")
        assert_same(read_checkpoint(tmp_path / "w.pt"), weights)

    def test_a_tensor_called_model_is_no_nesting(self, tmp_path: Path) -> None:
        torch.save({"model": torch.ones(2)}, tmp_path / "w.pt")
        assert list(read_checkpoint(tmp_path / "w.pt")) == ["model"]

    def test_uniform_prefixes_go(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        save_file({f"module.model.{key}": value for key, value in weights.items()}, tmp_path / "w.safetensors")
        assert_same(read_checkpoint(tmp_path / "w.safetensors"), weights)

    def test_a_prefix_of_some_keys_stays(self, tmp_path: Path) -> None:
        save_file({"model.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.safetensors")
        assert sorted(read_checkpoint(tmp_path / "w.safetensors")) == ["b", "model.a"]

    def test_parameters_come_without_gradients(self, tmp_path: Path) -> None:
        torch.save(dict(nn.Linear(2, 2).named_parameters()), tmp_path / "w.pt")
        assert not any(value.requires_grad for value in read_checkpoint(tmp_path / "w.pt").values())


class TestUnreadable:
    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_missing(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(CheckpointError, match=rf"w\.{suffix}: no such weight file\. Put it there"):
            read_checkpoint(tmp_path / f"w.{suffix}")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"expected a weight file, found a folder\. Name the file inside"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
    def test_zero_bytes(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"w.{suffix}").touch()
        with pytest.raises(CheckpointError, match=rf"w\.{suffix}: the file is empty \(0 bytes\)\. Copy or download"):
            read_checkpoint(tmp_path / f"w.{suffix}")

    @pytest.mark.parametrize("kept", [3, 50, 0.5, 0.99])
    @pytest.mark.parametrize("kind", ["safetensors", "pt", "old.pt"])
    def test_truncated(self, tmp_path: Path, weights: dict[str, Tensor], kind: str, kept: float) -> None:
        path = tmp_path / f"w.{kind}"
        if kind == "safetensors":
            save_file(weights, path)
        else:
            torch.save(weights, path, _use_new_zipfile_serialization=kind == "pt")
        content = path.read_bytes()
        path.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
        with pytest.raises(CheckpointError, match=rf"w\.{kind}: .*(truncated or corrupt|Save the weights alone)"):
            read_checkpoint(path)

    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "w.pt").write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(CheckpointError, match=r"w\.pt: neither a safetensors nor a torch\.save file"):
            read_checkpoint(tmp_path / "w.pt")

    def test_no_tensors(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match="the file holds no tensors"):
            read_checkpoint(tmp_path / "w.safetensors")
        torch.save([1, 2], tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="expected a state dict, found a list"):
            read_checkpoint(tmp_path / "w.pt")

    def test_other_values_are_named(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(1), "epoch": 3, "note": "x"}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"expected tensors alone, found other values under epoch, note\."):
            read_checkpoint(tmp_path / "w.pt")

    def test_torchscript(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr("w/data.pkl", pickle.dumps({}, protocol=2))
            archive.writestr("w/constants.pkl", pickle.dumps((), protocol=2))
            archive.writestr("w/version", "3\n")
        with pytest.raises(CheckpointError, match=r"w\.pt: .*Save the weights alone"):
            read_checkpoint(tmp_path / "w.pt")


# --- Whole modules ----------------------------------------------------------------------------------------------------


class Mode(enum.Enum):
    BICUBIC = "bicubic"


Foreign = Callable[..., type]


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Foreign:
    """Makes classes in modules that exist only while a file is written, as those of the task_vectors release."""

    def make(module: str, name: str, base: type = nn.Module) -> type:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        made = base if base is Mode else type(name, (base,), {"__qualname__": name})
        monkeypatch.setattr(made, "__module__", module)
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)
        return made

    return make


def image_encoder(foreign: Foreign) -> nn.Module:
    """An ImageEncoder around a CLIP with a buffer of either kind, transforms, an enum and arguments."""
    attention = foreign("open_clip.transformer", "ResidualAttentionBlock")()
    attention.attn = nn.MultiheadAttention(4, 2)
    attention.ln_1 = foreign("open_clip.transformer", "LayerNorm", nn.LayerNorm)(4)
    visual = foreign("open_clip.model", "VisualTransformer")()
    visual.resblocks = nn.Sequential(attention)
    visual.proj = nn.Parameter(torch.randn(4, 3).half())
    visual.register_buffer("running", torch.arange(3))
    clip = foreign("open_clip.model", "CLIP")()
    clip.visual = visual
    clip.logit_scale = nn.Parameter(torch.tensor(4.6))
    clip.register_buffer("attn_mask", torch.zeros(2, 2), persistent=False)
    encoder = foreign("src.modeling", "ImageEncoder")()
    encoder.model = clip
    transform = foreign("torchvision.transforms.transforms", "FakeCompose", object)()
    transform.transforms = [1, 2]
    transform.interpolation = foreign("torchvision.transforms.functional", "Mode", Mode).BICUBIC
    encoder.train_preprocess = transform
    encoder.cache_dir = None
    encoder.dtype = torch.float16
    encoder.size = torch.Size([3, 4])
    encoder.seen = {1, 2}
    return encoder


class TestPickledModules:
    def test_state_dict_without_importing_anything(
        self, tmp_path: Path, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = image_encoder(foreign)
        torch.save(encoder, tmp_path / "zeroshot.pt")
        expected = {key.removeprefix("model."): value for key, value in encoder.state_dict().items()}
        monkeypatch.undo()  # the modules of those classes are gone
        before = set(sys.modules)
        found = read_checkpoint(tmp_path / "zeroshot.pt")
        assert_same(found, expected)
        assert "visual.running" in found
        assert "attn_mask" not in found
        assert set(sys.modules) == before

    def test_a_module_under_a_key(self, tmp_path: Path, foreign: Foreign) -> None:
        layer = foreign("src.heads", "Head", nn.Linear)(2, 3)
        torch.save({"model": layer, "epoch": 1}, tmp_path / "w.pt")
        assert_same(read_checkpoint(tmp_path / "w.pt"), dict(layer.state_dict()))

    def test_shared_storages_and_views(self, tmp_path: Path, foreign: Foreign) -> None:
        module = foreign("src.modeling", "Two")()
        storage = torch.arange(12.0)
        module.a = nn.Parameter(storage[2:8].view(2, 3).T)
        module.b = nn.Parameter(storage[6:])
        torch.save(module, tmp_path / "w.pt")
        assert_same(read_checkpoint(tmp_path / "w.pt"), dict(module.state_dict()))

    def test_unknown_classes_are_refused_by_name(self, tmp_path: Path, foreign: Foreign) -> None:
        torch.save(foreign("company.models", "Net", nn.Linear)(2, 2), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"w\.pt: the pickle names 'company\.models\.Net'.*nothing of it was"):
            read_checkpoint(tmp_path / "w.pt")

    def test_a_module_in_the_old_format_is_refused(self, tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 2), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match=r"w\.pt: a pickle that holds more than tensors.*state_dict"):
            read_checkpoint(tmp_path / "w.pt")


def archive_of(path: Path, payload: bytes, **records: bytes) -> None:
    """A torch.save archive with ``payload`` as its pickle."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as template, zipfile.ZipFile(path, "w") as archive:
        for name in template.namelist():
            archive.writestr(name, payload if name.endswith("/data.pkl") else template.read(name))
        for name, content in records.items():
            archive.writestr(f"archive/data/{name}", content)


class Reduce:
    """Pickles as a call."""

    def __init__(self, function: object, *args: object) -> None:
        self._call = (function, args)

    def __reduce__(self):
        return self._call


def stub(module: str, name: str, state: object = None) -> bytes:
    """Opcodes of an instance of ``module.name``, with ``state`` if given, without a frame around."""
    built = b"" if state is None else pickle.dumps(state, protocol=2)[2:-1] + b"b"
    return f"c{module}\n{name}\n".encode() + b")\x81" + built


MARK = "payload_ran"
PAYLOADS = {
    "os.system": Reduce(os.system, f"touch {MARK}"),
    "builtins.eval": Reduce(eval, f"open('{MARK}', 'w').close()"),
    "builtins.exec": Reduce(exec, f"open('{MARK}', 'w').close()"),
    "builtins.open": Reduce(open, MARK, "w"),
    "getattr of a module": Reduce(getattr, Reduce(__import__, "os"), "system"),
    "getattr of a type": Reduce(getattr, collections.OrderedDict, "fromkeys"),
    "torch.hub": Reduce(torch.hub.load, "evil/repo", "model"),
    "torch.load": Reduce(torch.load, "x"),
    "torch.save": Reduce(torch.save, {}, MARK),
    "nested bytes": Reduce(torch.storage._load_from_bytes, pickle.dumps(Reduce(os.system, f"touch {MARK}"))),
}


class TestHostilePickles:
    @pytest.mark.parametrize("name", PAYLOADS)
    @pytest.mark.parametrize("container", ["archive", "bare", "beside a module"])
    def test_nothing_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, container: str) -> None:
        monkeypatch.chdir(tmp_path)
        payload = pickle.dumps({"a": PAYLOADS[name]}, protocol=2)
        if container == "beside a module":  # so that torch's own reader gives up first
            payload = b"\x80\x02" + stub("src.modeling", "ImageEncoder") + payload[2:-1] + b"\x86."
        if container == "bare":
            (tmp_path / "w.pt").write_bytes(payload)
        else:
            archive_of(tmp_path / "w.pt", payload)
        with pytest.raises(CheckpointError, match=r"w\.pt: .*Save the weights alone"):
            read_checkpoint(tmp_path / "w.pt")
        assert not (tmp_path / MARK).exists()

    def test_the_payload_would_run_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        pickle.loads(pickle.dumps(PAYLOADS["os.system"], protocol=2))
        assert (tmp_path / MARK).exists()

    def test_allowed_names_stay_inert(self, tmp_path: Path) -> None:
        """functools.partial, numpy and __main__ are on the list of stand-ins, so calling them does nothing."""
        call = b"cfunctools\npartial\n(cnumpy\nload\nX\x01\x00\x00\x00xtR"
        archive_of(tmp_path / "w.pt", b"\x80\x02" + call + b".")
        with pytest.raises(CheckpointError, match="no tensors"):
            read_checkpoint(tmp_path / "w.pt")

    def test_reader_functions_cannot_be_altered(self, tmp_path: Path) -> None:
        state = pickle.dumps((None, {"_call": 1, "__defaults__": (1,)}), protocol=2)[2:-1]
        archive_of(
            tmp_path / "w.pt",
            b"\x80\x02" + stub("src.m", "A") + b"0ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b.",
        )
        with pytest.raises(CheckpointError, match="attempt to alter"):
            read_checkpoint(tmp_path / "w.pt")

    @pytest.mark.parametrize(
        ("size", "offset"), [((100,), 0), ((2,), 3), ((2,), -1)], ids=["too long", "past the end", "before the start"]
    )
    def test_tensors_stay_inside_their_storage(self, tmp_path: Path, size: tuple, offset: int) -> None:
        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: object) -> object:
                return ("storage", torch.FloatStorage, "9", "cpu", 4) if obj == "the storage" else None

        buffer = io.BytesIO()
        tensor = Reduce(torch._utils._rebuild_tensor_v2, "the storage", offset, size, (1,), False, {})
        Pickler(buffer, protocol=2).dump({"a": tensor})
        content = buffer.getvalue()
        payload = b"\x80\x02" + stub("src.modeling", "ImageEncoder") + content[2:-1] + b"\x86."
        archive_of(tmp_path / "w.pt", payload, **{"9": bytes(16)})
        with pytest.raises(CheckpointError, match="not a readable pickled module"):
            read_checkpoint(tmp_path / "w.pt")


class TestHash:
    def test_independent_of_order_and_layout(self, weights: dict[str, Tensor]) -> None:
        other = {key: weights[key] for key in reversed(weights)}
        other["visual.proj"] = weights["visual.proj"].T.contiguous().T
        assert hash_tensors(other) == hash_tensors(weights)

    @pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "one more"])
    def test_every_change_shows(self, weights: dict[str, Tensor], change: str) -> None:
        proj = weights["visual.proj"]
        bumped = proj.clone()
        bumped[-1, -1] += 1e-3
        changed = {
            "value": {"visual.proj": bumped},
            "name": {"visual.proJ": proj},
            "dtype": {"visual.proj": proj.view(torch.int32)},
            "shape": {"visual.proj": proj.view(3, 4)},
            "one more": {"visual.proj": proj, "empty": torch.empty(0)},
        }[change]
        assert hash_tensors(changed) != hash_tensors({"visual.proj": proj})
