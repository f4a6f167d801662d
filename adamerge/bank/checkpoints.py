"""Reading weight files without ever running code that they carry.

safetensors files are memory-mapped; torch files go through ``weights_only``; torch files that hold a whole pickled
module (the task_vectors release) are read by an unpickler that imports nothing.
"""

import hashlib
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.errors import CheckpointError, shortlist

_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_RESAVE = "Save the weights alone where the file was made: torch.save(model.state_dict(), 'weights.pt')."
_COPY_AGAIN = "It is truncated or corrupt: copy or download it again."


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by state-dict key, on the CPU, with the dtypes of the file.

    Read: ``.safetensors`` (memory-mapped), ``torch.save`` files of a state dict (memory-mapped if not in the format
    before torch 1.6), also nested under ``state_dict``, ``model_state_dict`` or ``model``, and ``torch.save`` files of
    a whole ``nn.Module``. A prefix that all keys share (``module.``, ``_orig_mod.``, ``model.``) is removed.

    Memory-mapped tensors are private copies on write; the file may be replaced, but must not be overwritten in place,
    while they live.

    Raises:
        CheckpointError: If the file is missing, empty, truncated, would run code, or holds no tensors.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such weight file. Put it there, or correct the path (suite.yaml, suite.root)."
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a weight file, found a folder. Name the file inside it.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty (0 bytes). Copy or download it again.")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _strip_prefixes(_read_safetensors(path))
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{path}: neither a safetensors nor a torch.save file. {_COPY_AGAIN} Other formats must be converted to "
            "safetensors."
        )
    return _strip_prefixes(_state_dict_in(_read_torch(path, is_zip=head.startswith(b"PK")), path))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names with dtype, shape and bytes; independent of order, device and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). {_COPY_AGAIN}") from error
    if not tensors:
        raise CheckpointError(f"{path}: the file holds no tensors. Save a state dict into it.")
    return tensors


def _read_torch(path: Path, *, is_zip: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        refusal = error
    except Exception as error:
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path}: a TorchScript program, which is code and is not run. {_RESAVE}") from error
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a readable torch file ({first_line}). {_COPY_AGAIN}") from error
    if not is_zip:
        raise CheckpointError(
            f"{path}: a pickle that holds more than tensors, which could run code when opened; nothing of it was run. "
            f"{_RESAVE}"
        ) from refusal
    return _read_pickled_module(path)


def _state_dict_in(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a torch file held: a mapping of tensors, nested or not, or a module read inertly."""
    for _ in range(3):
        if isinstance(content, Mapping):
            inner = next((content[key] for key in _NESTED if isinstance(content.get(key), (Mapping, _Inert))), None)
            if inner is not None:
                content = inner
    if isinstance(content, _Inert):
        content = _module_state(content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: expected a state dict, found {_describe(content)}. {_RESAVE}")
    others = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: expected tensors alone, found other values under {shortlist(others)}. {_RESAVE}"
        )
    return {key: value.detach() for key, value in content.items()}


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        return "no tensors"
    return f"a {type(content).__name__}"


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrappers' prefixes (DataParallel, torch.compile, task_vectors' ImageEncoder), also several in a row."""
    while True:
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}


# --- Whole modules pickled by torch.save ------------------------------------------------------------------------------
# Nothing that the pickle names is imported. A class on the list below becomes an empty class that remembers the state
# it is given; tensors are cut from the archive's own records; every other name ends the reading.

_INERT_MODULES = (
    "__main__",
    "argparse",
    "clip",
    "functools",
    "modeling",
    "numpy",
    "open_clip",
    "pathlib",
    "PIL",
    "src",
    "timm",
    "torch.nn",
    "torchvision.transforms",
    "transformers",
)


class _Inert:
    """Stands in for a class that is not imported: takes any arguments, does nothing, keeps its state."""

    state: dict[Any, Any]

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        instance = super().__new__(cls)
        instance.state = {}
        return instance

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # (dict, slots)
            state = state[0]
        if isinstance(state, dict):
            self.state = state

    def append(self, item: object) -> None:
        """Stands in for list subclasses."""

    def extend(self, items: object) -> None:
        """Stands in for list subclasses."""

    def __setitem__(self, key: object, value: object) -> None:
        """Stands in for dict subclasses."""


class _Function:
    """A callable that a pickle may call but, having neither ``__dict__`` nor settable slots, cannot alter."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("an attempt to alter a reader's function")

    def __call__(self, *args: object) -> object:
        return self._call(*args)


def _rebuild_tensor(flat: Tensor, offset: int, size: tuple, stride: tuple, *rest: object) -> Tensor:
    return flat.as_strided(size, stride, offset)


def _inert_getattr(owner: object, name: object) -> object:
    """Enum members are pickled as getattr(class, name) by Python 3.11."""
    if not (isinstance(owner, type) and issubclass(owner, _Inert) and isinstance(name, str)):
        raise pickle.UnpicklingError("getattr on something that is not an enumeration")
    return owner()


_REBUILDERS: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *rest: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(lambda data, *rest: data),
    ("torch", "Size"): _Function(tuple),
    ("torch", "device"): _Function(lambda *args: None),
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _Function(lambda *args: {}),
    ("builtins", "set"): _Function(lambda items=(): list(items)),
    ("builtins", "frozenset"): _Function(lambda items=(): list(items)),
    ("builtins", "getattr"): _Function(_inert_getattr),
}
_STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


class _ModuleReader(pickle.Unpickler):
    """Unpickles ``data.pkl`` of a torch archive to inert stand-ins and tensors."""

    def __init__(self, archive: zipfile.ZipFile, record: str) -> None:
        super().__init__(archive.open(record), encoding="utf-8")
        self._archive = archive
        self._folder = record.removesuffix("data.pkl") + "data/"
        self._storages: dict[str, Tensor] = {}
        self._stand_ins: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}.get(module, module)
        if (module, name) in _REBUILDERS:
            return _REBUILDERS[module, name]
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if any(module == root or module.startswith(root + ".") for root in _INERT_MODULES):
            return self._stand_ins.setdefault((module, name), type(name, (_Inert,), {}))
        raise _RefusedNameError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, as a flat tensor of its dtype; ``pid`` is ("storage", dtype, key, location, numel)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)):
            raise pickle.UnpicklingError(f"an unknown kind of storage: {pid!r}")
        _, dtype, key, _, numel = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._folder}{key}"))
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(content, dtype=dtype, count=numel) if numel else empty
        return self._storages[key]


class _RefusedNameError(pickle.UnpicklingError):
    """A pickle names something outside the allow-list."""


def _read_pickled_module(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            order = record.removesuffix("data.pkl") + "byteorder"
            if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
                raise pickle.UnpicklingError("a byte order other than this machine's")
            return _ModuleReader(archive, record).load()
    except _RefusedNameError as error:
        raise CheckpointError(
            f"{path}: the pickle names '{error}', which could run code; nothing of it was run. {_RESAVE}"
        ) from error
    except Exception as error:  # a hostile pickle can end in any error, a truncated one as well
        raise CheckpointError(f"{path}: not a readable pickled module ({error}). {_RESAVE}") from error


def _module_state(module: _Inert, prefix: str = "") -> dict[str, Tensor]:
    """What ``state_dict()`` of the module would give: parameters, persistent buffers, then those of its children."""
    tensors: dict[str, Tensor] = {}
    transient = module.state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (module.state.get(kind) or {}).items():
            if isinstance(value, Tensor) and not (kind == "_buffers" and name in transient):
                tensors[f"{prefix}{name}"] = value
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, _Inert):
            tensors.update(_module_state(child, f"{prefix}{name}."))
    return tensors
