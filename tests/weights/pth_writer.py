"""Writes `.pth` files byte for byte as torch does, without torch."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage", np.dtype(np.int64): "LongStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage", np.dtype(np.uint8): "ByteStorage", np.dtype(bool): "BoolStorage",
    np.dtype(np.float64): "DoubleStorage",
}  # fmt: skip
MAGIC, PROTOCOL, SYSTEM = 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}


class Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array.ravel()


class Tensor:
    """Pickles as a torch tensor would."""

    def __init__(self, storage, offset, size, stride):
        self.parts = (storage, offset, size, stride)

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (*self.parts, False, OrderedDict())


class Parameter(Tensor):
    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_parameter, (Tensor(*self.parts), True, OrderedDict())


class _Pickler(pickle.Pickler):
    legacy = False

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        kind = getattr(sys.modules["torch"], STORAGES[obj.array.dtype])
        return ("storage", kind, obj.key, "cpu", obj.array.size, *([None] if self.legacy else []))


def _nominal_torch():
    """Modules that have torch's names and nothing behind them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):

        def rebuild():
            raise AssertionError("never called")

        rebuild.__module__, rebuild.__qualname__ = "torch._utils", name
        setattr(utils, name, rebuild)
    return {"torch": torch, "torch._utils": utils}


def pickled(tree, legacy=False):
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=2)
    pickler.legacy = legacy
    with mock.patch.dict(sys.modules, _nominal_torch()):
        pickler.dump(tree)
    return file.getvalue()


def whole(key, array):
    """A storage and the tensor that is all of it."""
    array = np.ascontiguousarray(array)
    storage = Storage(key, array)
    return storage, Tensor(storage, 0, array.shape, tuple(s // array.itemsize for s in array.strides))


def write_zip(path: Path, data: bytes, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/byteorder", "little")
        for storage in storages:
            archive.writestr(f"model/data/{storage.key}", storage.array.tobytes())


def write_legacy(path: Path, data: bytes, storages):
    keys = [storage.key for storage in storages]
    blocks = b"".join(s.array.size.to_bytes(8, "little") + s.array.tobytes() for s in storages)
    heads = [pickle.dumps(value, protocol=2) for value in (MAGIC, PROTOCOL, SYSTEM)]
    path.write_bytes(b"".join(heads) + data + pickle.dumps(keys, protocol=2) + blocks)


def write_state(path: Path, arrays):
    """A state dict in the zip format."""
    parts = {name: whole(str(number), array) for number, (name, array) in enumerate(arrays.items())}
    tree = OrderedDict((name, tensor) for name, (_, tensor) in parts.items())
    write_zip(path, pickled(tree), [storage for storage, _ in parts.values()])
