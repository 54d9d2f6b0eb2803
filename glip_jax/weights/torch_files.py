"""Reads PyTorch's `.pth` files without torch and without executing what they contain.

A `.pth` file is a pickle beside raw storages: since torch 1.6 a zip archive (`*/data.pkl`, `*/data/KEY`), before that
five pickles in a row followed by the storages. A pickle may call any function; the unpickler here admits the few names
that tensors are made of, builds numpy arrays from them, and refuses every other name with an error that names it.
Only the storages of the requested tensors are read, not those of an optimizer beside a model.
"""

import hashlib
import io
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from glip_jax import UserError
from glip_jax.io.formats import explain_bytes

__all__ = ["TorchFileError", "load_arrays", "load_tree", "sha256"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_, "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}  # fmt: skip


class TorchFileError(UserError, ValueError):
    """A file that is not a readable `.pth`, or one that calls a function while it is read."""


class _StorageType(NamedTuple):
    """Replaces torch.FloatStorage and the like."""

    dtype: Any


class _Storage(NamedTuple):
    """A flat array of values, identified by its key; its bytes are read later."""

    key: str
    dtype: Any
    count: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * np.dtype(self.dtype).itemsize


class _View(NamedTuple):
    """A tensor: a strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load_tree(path: epath.Path, keys: Sequence[str] = (), *, required: bool = False) -> Any:
    """The saved object, with numpy arrays in place of tensors; dicts, lists, tuples, numbers and strings as they are.

    With `keys` only the value of the first of them that exists and is a dict; everything if none does, unless one is
    `required`. Raises TorchFileError for other formats, truncated files, and pickles that name anything but tensors.
    """
    if found := explain_bytes(path):
        raise TorchFileError(f"{path} {found}")
    with _torch_file_errors(str(path)), path.open("rb") as file:
        tree, read = _read_zip(file, str(path)) if zipfile.is_zipfile(file) else _read_legacy(file, str(path))
        content = tree if isinstance(tree, dict) else {}
        if required and not any(isinstance(content.get(key), dict) for key in keys):
            listed = ", ".join(map(str, list(content)[:6])) or f"a {type(tree).__name__}"
            raise TorchFileError(f"{path} holds no {' or '.join(keys)}; it holds: {listed}")
        tree = next((content[key] for key in keys if isinstance(content.get(key), dict)), tree)
        return _arrays(tree, read, str(path))


def load_arrays(
    path: epath.Path, keys: Sequence[str] = ("model", "state_dict"), *, required: bool = False
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The state dict of a `.pth` file: {original name: array}.

    Training checkpoints keep it under a key: the first of `keys` that exists is used; without one the file itself is the
    state dict, unless a key is `required`. Raises TorchFileError if there is none.
    """
    tree = load_tree(path, keys, required=required)
    if not isinstance(tree, dict):
        raise TorchFileError(f"{path} holds a {type(tree).__name__}; expected a state dict, {{name: tensor}}")
    odd = [str(key) for key, value in tree.items() if not isinstance(key, str) or not isinstance(value, np.ndarray)]
    if odd or not tree:
        found = f"entries that are not tensors: {', '.join(odd[:5])}" if odd else "nothing"
        raise TorchFileError(f"{path} holds {found}; expected a state dict, {{name: tensor}}")
    return dict(tree)


@contextmanager
def _torch_file_errors(name: str) -> Iterator[None]:
    """Turns every error of reading a file into a TorchFileError of one line."""
    try:
        yield
    except (TorchFileError, OSError):
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


def sha256(path: epath.Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Unpickler(pickle.Unpickler):
    """Admits tensors and plain containers only."""

    def __init__(self, file: Any, name: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._name = name

    def find_class(self, module: str, name: str, /) -> Any:
        # Everything returned here is immutable or new, so that no later opcode can change it for the next file.
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
            f"{self._name} calls {module}.{name} while it is read; refused, since only tensors and plain "
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


def _read_zip(file: Any, name: str) -> tuple[Any, Callable[[_Storage], bytearray]]:
    """The pickle of a zip-format file and a reader of its storages."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    pickles = [member for member in members if member == "data.pkl" or member.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError(f"{name} is a zip archive with {len(pickles)} members named data.pkl; a .pth file has one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder").strip() != b"little":
        raise TorchFileError(f"{name} was written on a big-endian machine; expected little-endian storages")
    tree = _Unpickler(io.BytesIO(archive.read(pickles[0])), name).load()

    def read(storage: _Storage) -> bytearray:
        member = f"{prefix}data/{storage.key}"
        if member not in members:
            raise TorchFileError(f"{name} lacks {member}, which its tensors refer to")
        _check_size(storage, members[member].file_size, name)
        return bytearray(archive.read(member))

    return tree, read


def _read_legacy(file: Any, name: str) -> tuple[Any, Callable[[_Storage], bytearray]]:
    """The same for the format before torch 1.6: magic, protocol, system, tree, keys, then count and values per key."""
    head = file.seek(0) or file.read(8)
    if head[:4] == b"PK\x03\x04":
        raise TorchFileError(f"{name} begins as a zip archive and has no end: it is incomplete, fetch it again")
    file.seek(0)
    magic = _Unpickler(file, name).load() if head[:1] == b"\x80" else None
    if magic != _LEGACY_MAGIC:
        raise TorchFileError(f"{name} is neither a zip archive nor a PyTorch pickle: it starts with {head!r}")
    protocol, system, tree = (_Unpickler(file, name).load() for _ in range(3))
    if protocol != _LEGACY_PROTOCOL or not system.get("little_endian"):
        raise TorchFileError(f"{name} has protocol {protocol} and system {system}; expected 1001, little-endian")
    keys = [str(key) for key in _Unpickler(file, name).load()]
    known = {view.storage.key: view.storage for view in _views(tree)}
    offsets: dict[str, int] = {}
    end = file.tell()
    for key in keys:
        if key not in known:
            raise TorchFileError(
                f"{name} stores values under {key} that no tensor refers to, so their dtype is unknown"
            )
        file.seek(end)
        count = int.from_bytes(file.read(8), "little")
        offsets[key] = end + 8
        end += 8 + count * np.dtype(known[key].dtype).itemsize

    def read(storage: _Storage) -> bytearray:
        if storage.key not in offsets:
            raise TorchFileError(f"{name} lacks the storage {storage.key}, which its tensors refer to")
        file.seek(offsets[storage.key])
        data = bytearray(file.read(storage.size))
        _check_size(storage, len(data), name)
        return data

    return tree, read


def _check_size(storage: _Storage, found: int, name: str) -> None:
    if found != storage.size:
        raise TorchFileError(
            f"{name}: storage {storage.key} has {found} bytes, its tensors need {storage.size}: "
            "the file is damaged or incomplete"
        )


def _views(tree: Any, seen: set[int] | None = None) -> Iterator[_View]:
    """Every view in `tree`; a container that occurs several times is walked once."""
    seen = set() if seen is None else seen
    if isinstance(tree, _View):
        yield tree
    elif isinstance(tree, (dict, list, tuple)) and id(tree) not in seen:
        seen.add(id(tree))
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _views(item, seen)


def _arrays(tree: Any, read: Callable[[_Storage], bytearray], name: str) -> Any:
    """`tree` with arrays in place of views; shared storages are read once, shared containers copied once."""
    uses = Counter(view.storage.key for view in _views(tree))
    flats: dict[str, np.ndarray] = {}
    done: dict[int, Any] = {}

    def array(view: _View) -> np.ndarray:
        key = view.storage.key
        shared = uses[key] > 1 or key in flats
        flat = flats[key] if key in flats else np.frombuffer(read(view.storage), view.storage.dtype)
        uses[key] -= 1
        if uses[key]:
            flats[key] = flat
        else:
            flats.pop(key, None)
        result = _strided(flat, view, name)
        # The storage of a single tensor needs no copy; a small view of a shared one would keep all of it in memory.
        return result.copy() if shared or result.size < flat.size else result

    def walk(item: Any) -> Any:
        if isinstance(item, _View):
            return array(item)
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
    """The array of a view; one that reaches beyond its storage or repeats values is refused."""
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
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.size, strides)
