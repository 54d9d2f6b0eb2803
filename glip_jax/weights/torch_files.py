"""Reads PyTorch's `.pth` files without torch and without executing what they contain.

A `.pth` file is a pickle beside raw storages: since torch 1.6 a zip archive (`*/data.pkl`, `*/data/KEY`), before that
five pickles in a row followed by the storages. A pickle may call anything; the unpickler here admits the handful of
names that tensors are made of, builds numpy arrays from them, and refuses every other name by saying what it was.
"""

import hashlib
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

__all__ = ["TorchFileError", "load_arrays", "load_tree", "sha256"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_, "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}  # fmt: skip


class TorchFileError(ValueError):
    """A file that is not a `.pth` this module reads, or that wants to call something."""


class _StorageType(NamedTuple):
    """Stands for torch.FloatStorage and its kin."""

    dtype: Any


class _Storage(NamedTuple):
    """A flat run of values, known by its key until the bytes are at hand."""

    key: str
    dtype: Any
    count: int


class _View(NamedTuple):
    """A tensor: a strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load_tree(path: epath.Path) -> Any:
    """What was saved, with numpy arrays in the place of tensors; dicts, lists, tuples, numbers and strings as they are.

    Raises TorchFileError for other formats, truncated files, and pickles that name anything but tensors.
    """
    name = str(path)
    data = path.read_bytes()
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            tree, storages = _read_zip(data, name)
        else:
            tree, storages = _read_legacy(data, name)
        return _arrays(tree, storages, name)
    except TorchFileError:
        raise
    except RecursionError as error:
        raise TorchFileError(
            f"{name} holds a structure that contains itself; expected nested dicts of tensors"
        ) from error
    # A damaged pickle fails in as many ways as it has opcodes.
    except Exception as error:
        raise TorchFileError(
            f"{name} cannot be read as a PyTorch file ({type(error).__name__}: {error}): it is damaged, incomplete "
            "(compare its size with the source's) or of another format"
        ) from error


def load_arrays(path: epath.Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The state dict of a `.pth` file: {original name: array}.

    Training checkpoints keep it under `model` or `state_dict`; both are looked into. Raises TorchFileError if there is
    none.
    """
    tree = load_tree(path)
    for key in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict):
        raise TorchFileError(f"{path} holds a {type(tree).__name__}; expected a state dict, {{name: tensor}}")
    odd = [str(key) for key, value in tree.items() if not isinstance(key, str) or not isinstance(value, np.ndarray)]
    if odd or not tree:
        found = f"entries that are not tensors: {', '.join(odd[:5])}" if odd else "nothing"
        raise TorchFileError(f"{path} holds {found}; expected a state dict, {{name: tensor}}")
    return dict(tree)


def sha256(path: epath.Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Unpickler(pickle.Unpickler):
    """Knows tensors and nothing else."""

    def __init__(self, file: io.BytesIO, name: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._name = name

    def find_class(self, module: str, name: str, /) -> Any:
        # Everything returned here is immutable or made anew, so that no later opcode can bend it for the next user.
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor_builder()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter_builder()
        raise TorchFileError(
            f"{self._name} wants to call {module}.{name} while it is read; refused, since only tensors and plain "
            "containers are admitted. Save the state dict alone: torch.save(model.state_dict(), path)"
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, storage_type, key, _, count, *rest = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or (rest and rest[0] is not None):
            raise TorchFileError(f"{self._name} refers to {pid!r}; expected a plain tensor storage")
        return _Storage(str(key), storage_type.dtype, int(count))


def _tensor_builder() -> Callable[..., _View]:
    def rebuild(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _View:
        if not isinstance(storage, _Storage):
            raise TorchFileError(f"a tensor is built from a {type(storage).__name__}; expected a storage")
        return _View(storage, int(offset), tuple(int(n) for n in size), tuple(int(n) for n in stride))

    return rebuild


def _parameter_builder() -> Callable[..., Any]:
    def rebuild(tensor: Any, *_: Any) -> Any:
        return tensor

    return rebuild


def _read_zip(data: bytes, name: str) -> tuple[Any, Callable[[_Storage], bytes]]:
    """The pickle of a zip-format file and a reader of its storages."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = archive.namelist()
    pickles = [member for member in members if member == "data.pkl" or member.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError(f"{name} is a zip archive with {len(pickles)} members named data.pkl; a .pth file has one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder").strip() != b"little":
        raise TorchFileError(f"{name} was written on a big-endian machine; expected little-endian storages")
    tree = _Unpickler(io.BytesIO(archive.read(pickles[0])), name).load()

    def storage_bytes(storage: _Storage) -> bytes:
        member = f"{prefix}data/{storage.key}"
        if member not in members:
            raise TorchFileError(f"{name} lacks {member}, which its tensors refer to")
        return archive.read(member)

    return tree, storage_bytes


def _read_legacy(data: bytes, name: str) -> tuple[Any, Callable[[_Storage], bytes]]:
    """The same of a file from before torch 1.6: magic, protocol, system, tree, keys, then count and values per key."""
    file = io.BytesIO(data)
    magic = _Unpickler(file, name).load() if data[:1] == b"\x80" else None
    if magic != _LEGACY_MAGIC:
        raise TorchFileError(f"{name} is neither a zip archive nor a PyTorch pickle: it starts with {data[:8]!r}")
    protocol, system, tree = (_Unpickler(file, name).load() for _ in range(3))
    if protocol != _LEGACY_PROTOCOL or not system.get("little_endian"):
        raise TorchFileError(f"{name} has protocol {protocol} and system {system}; expected 1001, little-endian")
    keys = _Unpickler(file, name).load()
    needed: dict[str, _Storage] = {}
    _collect(tree, needed, set())
    blocks: dict[str, bytes] = {}
    for key in map(str, keys):
        if key not in needed:
            raise TorchFileError(f"{name} stores values under {key} that no tensor refers to; their width is unknown")
        count = int.from_bytes(file.read(8), "little")
        size = count * np.dtype(needed[key].dtype).itemsize
        blocks[key] = file.read(size)

    def storage_bytes(storage: _Storage) -> bytes:
        if storage.key not in blocks:
            raise TorchFileError(f"{name} lacks the storage {storage.key}, which its tensors refer to")
        return blocks[storage.key]

    return tree, storage_bytes


def _collect(tree: Any, storages: dict[str, _Storage], seen: set[int]) -> None:
    """Gathers every storage that the views in `tree` refer to."""
    if isinstance(tree, _View):
        storages[tree.storage.key] = tree.storage
    elif isinstance(tree, (dict, list, tuple)) and id(tree) not in seen:
        seen.add(id(tree))
        for item in tree.values() if isinstance(tree, dict) else tree:
            _collect(item, storages, seen)


def _arrays(tree: Any, storage_bytes: Callable[[_Storage], bytes], name: str) -> Any:
    """`tree` with arrays in the place of views; shared storages are read once, shared containers copied once."""
    flats: dict[str, np.ndarray] = {}
    done: dict[int, Any] = {}

    def flat(storage: _Storage) -> np.ndarray:
        if storage.key not in flats:
            data = storage_bytes(storage)
            expected = storage.count * np.dtype(storage.dtype).itemsize
            if len(data) != expected:
                raise TorchFileError(
                    f"{name}: storage {storage.key} has {len(data)} bytes, its tensors need {expected}: "
                    "the file is damaged or incomplete"
                )
            flats[storage.key] = np.frombuffer(data, storage.dtype)
        return flats[storage.key]

    def walk(item: Any) -> Any:
        if isinstance(item, _View):
            return _strided(flat(item.storage), item, name)
        if not isinstance(item, (dict, list, tuple)):
            return item
        if id(item) not in done:
            if isinstance(item, dict):
                done[id(item)] = {key: walk(value) for key, value in item.items()}
            else:
                done[id(item)] = [walk(value) for value in item]
        result = done[id(item)]
        return tuple(result) if isinstance(item, tuple) else result

    return walk(tree)


def _strided(flat: Shaped[np.ndarray, " n"], view: _View, name: str) -> Shaped[np.ndarray, "..."]:
    """The array of a view, copied; a view that reaches beyond its storage or repeats it is refused."""
    values = int(np.prod(view.size, dtype=object)) if view.size else 1
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    lowest = min((view.offset, *view.size, *view.stride))
    if lowest < 0 or values > len(flat) or (values and last >= len(flat)):
        raise TorchFileError(
            f"{name}: a tensor of size {view.size}, stride {view.stride}, offset {view.offset} does not fit its storage "
            f"of {len(flat)} values"
        )
    if values == 0:
        return np.zeros(view.size, flat.dtype)
    strides = tuple(step * flat.itemsize for step in view.stride)
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.size, strides).copy()
