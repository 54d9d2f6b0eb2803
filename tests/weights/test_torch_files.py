"""The files are made here by hand, byte for byte as torch writes them; torch itself is not needed."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from glip_jax.weights.torch_files import TorchFileError, load_arrays, load_tree, sha256

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


@pytest.fixture
def pickled(monkeypatch):
    """A function that pickles as torch does, with a torch that has names only."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):

        def rebuild():
            raise AssertionError("never called")

        rebuild.__module__, rebuild.__qualname__ = "torch._utils", name
        setattr(utils, name, rebuild)

    class Pickler(pickle.Pickler):
        extra: tuple = ()

        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                kind = getattr(torch, STORAGES[obj.array.dtype])
                return ("storage", kind, obj.key, "cpu", obj.array.size, *self.extra)
            return None

    def dump(tree, *extra):
        file = io.BytesIO()
        pickler = Pickler(file, protocol=2)
        pickler.extra = extra
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", torch)
            patch.setitem(sys.modules, "torch._utils", utils)
            pickler.dump(tree)
        return file.getvalue()

    return dump


def write_zip(path, data, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/byteorder", "little")
        for storage in storages:
            archive.writestr(f"model/data/{storage.key}", storage.array.tobytes())
    return epath.Path(path)


def write_legacy(path, data, storages):
    keys = [storage.key for storage in storages]
    blocks = b"".join(s.array.size.to_bytes(8, "little") + s.array.tobytes() for s in storages)
    heads = [pickle.dumps(value, protocol=2) for value in (MAGIC, PROTOCOL, SYSTEM)]
    path.write_bytes(b"".join(heads) + data + pickle.dumps(keys, protocol=2) + blocks)
    return epath.Path(path)


def whole(key, array):
    storage = Storage(key, array)
    stride = tuple(s // array.itemsize for s in array.strides)
    return storage, Tensor(storage, 0, array.shape, stride)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", list(STORAGES), ids=str)
def test_every_dtype_in_both_formats(tmp_path, pickled, form, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    storage, tensor = whole("0", array)
    data = pickled(OrderedDict(weight=tensor), *((None,) if form == "legacy" else ()))
    write = write_zip if form == "zip" else write_legacy
    loaded = load_arrays(write(tmp_path / "m.pth", data, [storage]))
    assert loaded["weight"].dtype == dtype
    np.testing.assert_array_equal(loaded["weight"], array)


def test_views_share_a_storage_and_keep_their_strides(tmp_path, pickled):
    storage = Storage("7", np.arange(12, dtype=np.float32))
    tree = {"a": Tensor(storage, 0, (3, 4), (4, 1)), "transposed": Tensor(storage, 0, (4, 3), (1, 4)),
            "tail": Parameter(storage, 10, (2,), (1,)), "scalar": Tensor(storage, 5, (), ()),
            "none": Tensor(storage, 0, (0, 4), (4, 1))}  # fmt: skip
    loaded = load_arrays(write_zip(tmp_path / "m.pth", pickled(tree), [storage]))
    np.testing.assert_array_equal(loaded["transposed"], np.arange(12).reshape(3, 4).T)
    np.testing.assert_array_equal(loaded["tail"], [10, 11])
    assert loaded["scalar"].shape == ()
    assert loaded["scalar"] == 5
    assert loaded["none"].shape == (0, 4)
    loaded["a"][:] = 0
    assert loaded["tail"][1] == 11


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_training_checkpoints_keep_their_state_dict_inside(tmp_path, pickled, key):
    storage, tensor = whole("0", np.ones((2,), np.float32))
    tree = {key: OrderedDict(w=tensor), "iteration": 3, "rates": [0.1, (1, 2)]}
    path = write_zip(tmp_path / "m.pth", pickled(tree), [storage])
    assert list(load_arrays(path)) == ["w"]
    assert load_tree(path)["rates"] == [0.1, (1, 2)]


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_hostile_pickle_is_refused_by_the_name_of_what_it_calls(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"w": Hostile()}, protocol=2)
    path = (write_zip if form == "zip" else write_legacy)(tmp_path / "m.pth", data, [])
    with pytest.raises(TorchFileError, match=r"m\.pth wants to call (posix|nt)\.system"):
        load_tree(path)
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize(
    "code", [b"cbuiltins\neval\n(S'1'\ntR.", b"cbuiltins\ngetattr\n.", b"(ibuiltins\nexec\n.", b"cnumpy\nload\n."]
)
def test_names_by_any_opcode_are_refused(tmp_path, code):
    with pytest.raises(TorchFileError, match="wants to call"):
        load_tree(write_zip(tmp_path / "m.pth", code, []))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(4, (3,), (1,)), (-1, (2,), (1,)), (0, (2, 3), (3, 2)), (0, (1 << 40,), (0,)), (5, (2,), (-1,))],
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, pickled, offset, size, stride):
    storage = Storage("0", np.zeros(6, np.float32))
    path = write_zip(tmp_path / "m.pth", pickled({"w": Tensor(storage, offset, size, stride)}), [storage])
    with pytest.raises(TorchFileError, match="does not fit its storage of 6 values"):
        load_tree(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_missing_half_is_reported(tmp_path, pickled, form):
    storage, tensor = whole("0", np.zeros((64,), np.float32))
    short = Storage("0", np.zeros((32,), np.float32))
    data = pickled({"w": tensor}, *((None,) if form == "legacy" else ()))
    if form == "zip":
        path = write_zip(tmp_path / "m.pth", data, [short])
    else:
        path = write_legacy(tmp_path / "m.pth", data, [storage])
        path.write_bytes(path.read_bytes()[:-128])
    with pytest.raises(TorchFileError, match="has 128 bytes, its tensors need 256: the file is damaged or incomplete"):
        load_tree(path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", pickle.dumps({"w": 1}), b"\x80\x02garbage", b"\x80"]
)
def test_other_files_are_named_as_such(tmp_path, content):
    path = epath.Path(tmp_path / "m.pth")
    path.write_bytes(content)
    with pytest.raises(TorchFileError, match=r"m\.pth"):
        load_tree(path)


def test_what_is_no_state_dict_is_refused(tmp_path):
    path = write_zip(tmp_path / "m.pth", pickle.dumps({"w": 1}, protocol=2), [])
    with pytest.raises(TorchFileError, match="entries that are not tensors: w"):
        load_arrays(path)
    loop = []
    loop.append(loop)
    with pytest.raises(TorchFileError, match="contains itself"):
        load_tree(write_zip(tmp_path / "loop.pth", pickle.dumps(loop, protocol=2), []))


def test_sha256(tmp_path):
    path = epath.Path(tmp_path / "x")
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
