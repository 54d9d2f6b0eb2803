"""Most files are made here by hand, byte for byte as torch writes them, so that they can be spoiled in one place."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
from etils import epath

from glip_jax.weights.torch_files import TorchFileError, load_arrays, load_tree, sha256
from tests.weights import pth_writer
from tests.weights.pth_writer import STORAGES, Parameter, Storage, Tensor, pickled, whole


def write_zip(path, data, storages):
    pth_writer.write_zip(path, data, storages)
    return epath.Path(path)


def write_legacy(path, data, storages):
    pth_writer.write_legacy(path, data, storages)
    return epath.Path(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", list(STORAGES), ids=str)
def test_every_dtype_in_both_formats(tmp_path, form, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    storage, tensor = whole("0", array)
    data = pickled(OrderedDict(weight=tensor), legacy=form == "legacy")
    write = write_zip if form == "zip" else write_legacy
    loaded = load_arrays(write(tmp_path / "m.pth", data, [storage]))
    assert loaded["weight"].dtype == dtype
    np.testing.assert_array_equal(loaded["weight"], array)


def test_views_share_a_storage_and_keep_their_strides(tmp_path):
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
def test_training_checkpoints_keep_their_state_dict_inside(tmp_path, key):
    storage, tensor = whole("0", np.ones((2,), np.float32))
    tree = {key: OrderedDict(w=tensor), "iteration": 3, "rates": [0.1, (1, 2)]}
    path = write_zip(tmp_path / "m.pth", pickled(tree), [storage])
    assert list(load_arrays(path)) == ["w"]
    assert load_tree(path)["rates"] == [0.1, (1, 2)]


def test_only_the_requested_tensors_are_read(tmp_path):
    """A damaged or missing storage of the optimizer does not matter."""
    (mine, model), (other, moment), (gone, average) = (
        whole(key, np.full((3,), float(key), np.float32)) for key in "012"
    )
    tree = {"model": {"w": model}, "optimizer": {"state": [moment]}, "model_ema": {"w": average}}
    path = write_zip(tmp_path / "m.pth", pickled(tree), [mine, Storage("1", np.zeros(1, np.float32))])
    np.testing.assert_array_equal(load_arrays(path)["w"], [0, 0, 0])
    with pytest.raises(TorchFileError, match=r"lacks model/data/2"):
        load_arrays(path, ("model_ema",), required=True)
    with pytest.raises(TorchFileError, match=r"storage 1 has 4 bytes, its tensors need 12"):
        load_tree(path)
    path = write_legacy(tmp_path / "old.pth", pickled(tree, legacy=True), [mine, other, gone])
    np.testing.assert_array_equal(load_arrays(path, ("model_ema",), required=True)["w"], [2, 2, 2])
    with pytest.raises(TorchFileError, match="holds no teacher; it holds: model, optimizer, model_ema"):
        load_arrays(path, ("teacher",), required=True)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_files_of_torch_save(tmp_path, options):
    import torch

    shared = torch.arange(12.0)
    tensors = {"whole": shared.reshape(3, 4).T, "part": shared[3:7], "own": torch.nn.Parameter(torch.ones(2, 3).half()),
               "narrow": torch.arange(4.0).bfloat16(), "number": torch.tensor(3)}  # fmt: skip
    torch.save(OrderedDict(tensors), tmp_path / "m.pth", **options)
    loaded = load_arrays(epath.Path(tmp_path / "m.pth"))
    assert {name: str(array.dtype) for name, array in loaded.items()} == {
        "whole": "float32", "part": "float32", "own": "float16", "narrow": "bfloat16", "number": "int64"
    }  # fmt: skip
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name].astype(np.float64), tensor.detach().double().numpy())
    loaded["whole"][:] = 0  # writable, and not shared
    assert loaded["part"].tolist() == [3, 4, 5, 6]


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_hostile_pickle_is_refused_by_the_name_of_what_it_calls(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"w": Hostile()}, protocol=2)
    path = (write_zip if form == "zip" else write_legacy)(tmp_path / "m.pth", data, [])
    with pytest.raises(TorchFileError, match=r"m\.pth calls (posix|nt)\.system"):
        load_tree(path)
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize(
    "code", [b"cbuiltins\neval\n(S'1'\ntR.", b"cbuiltins\ngetattr\n.", b"(ibuiltins\nexec\n.", b"cnumpy\nload\n."]
)
def test_names_by_any_opcode_are_refused(tmp_path, code):
    with pytest.raises(TorchFileError, match="calls "):
        load_tree(write_zip(tmp_path / "m.pth", code, []))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(4, (3,), (1,)), (-1, (2,), (1,)), (0, (2, 3), (3, 2)), (0, (1 << 40,), (0,)), (5, (2,), (-1,))],
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, offset, size, stride):
    storage = Storage("0", np.zeros(6, np.float32))
    path = write_zip(tmp_path / "m.pth", pickled({"w": Tensor(storage, offset, size, stride)}), [storage])
    with pytest.raises(TorchFileError, match="does not fit its storage of 6 values"):
        load_tree(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_truncated_file_is_reported(tmp_path, form):
    storage, tensor = whole("0", np.zeros((64,), np.float32))
    short = Storage("0", np.zeros((32,), np.float32))
    data = pickled({"w": tensor}, legacy=form == "legacy")
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
def test_other_formats_are_refused(tmp_path, content):
    path = epath.Path(tmp_path / "m.pth")
    path.write_bytes(content)
    with pytest.raises(TorchFileError, match=r"m\.pth"):
        load_tree(path)


def test_files_without_a_state_dict_are_refused(tmp_path):
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
