"""Files as GLIP's authors, mmdetection and our own export leave them, through the command line."""

import dataclasses
import json
import os
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import traverse_util

from glip_jax import __main__ as door
from glip_jax.config import BackboneConfig, Config, FusionConfig, HeadConfig, flatten
from glip_jax.distributed import exit_codes
from glip_jax.io import checkpoint, workdir
from glip_jax.io.checkpoint import latest_step, open_checkpoint
from glip_jax.io.workdir import started_from
from tests.weights.networks import SMALL, mmdetection, parameters, state

pytestmark = pytest.mark.compiles

LITE = dataclasses.replace(SMALL, backbone=BackboneConfig(kind="efficientnet_lite0"))


@pytest.fixture(scope="module")
def tensors():
    return {name: torch.from_numpy(value) for name, value in state().items()}


@pytest.fixture(scope="module")
def released(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "glip.pth"
    save(path, tensors)
    return path


def save(path, tensors, **options):
    model = OrderedDict((f"module.{name}", value) for name, value in tensors.items())
    averaged = OrderedDict((name, value * 2) for name, value in model.items())
    beside = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}, "iteration": 7}
    torch.save({"model": model, "model_ema": averaged, **beside}, path, **options)


def run(capture, *argv):
    """Exit code and what was printed, or the one line of stderr."""
    capture.readouterr()
    code = door.main(["import", *map(str, argv)])
    out, err = capture.readouterr()
    if code == exit_codes.DONE:
        return code, out
    assert err.startswith("import: ") and err.count("\n") == 1, err
    return code, err


def imported(workdir):
    return traverse_util.flatten_dict(open_checkpoint(str(workdir)).parameters(), sep="/")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_released_file_becomes_a_checkpoint_with_its_settings(released, tmp_path, capsys):
    code, out = run(capsys, released, f"--workdir={tmp_path / 'run'}", "--config.train.steps=7")
    assert code == exit_codes.DONE
    assert_same(imported(tmp_path / "run"), parameters())
    settings = open_checkpoint(str(tmp_path / "run")).settings
    assert settings["train.steps"] == 7 and settings["name"] == "glip"
    assert settings == json.loads((tmp_path / "run" / "config.json").read_text())
    output = {name: settings[f"model.{name}"] for name in (
        "backbone.depths", "backbone.heads", "backbone.window", "pyramid.strides", "text.positions", "text.heads", "fusion.heads",
        "head.blocks", "head.coarse_offsets", "anchors.sizes",
    )}  # fmt: skip
    assert output == {
        "backbone.depths": [1, 2, 3, 1], "backbone.heads": [1, 1, 2, 2], "backbone.window": 3, "pyramid.strides": [8, 16, 32, 64, 128],
        "text.positions": 16, "text.heads": 1, "fusion.heads": 8, "head.blocks": 2, "head.coarse_offsets": "flat",
        "anchors.sizes": [64, 128, 256, 512, 1024],
    }  # fmt: skip
    record = started_from(str(tmp_path / "run")) or {}
    (source,) = record["sources"]
    assert source["layout"] == "GLIP" and source["parameters"] == "model" and len(source["sha256"]) == 64
    assert sum(source["ignored"].values()) == 6
    assert record["parameters"]["loaded"]["pyramid"] == [16, 13440]
    assert "Swin of width 8" in out and "ignored: 1 x rpn.resizer." in out and source["sha256"] in out
    # A folder with a checkpoint is somebody's.
    code, err = run(capsys, released, f"--workdir={tmp_path / 'run'}")
    assert code == exit_codes.BAD_INPUT and "holds a checkpoint of step 0: give a new folder" in err


@pytest.mark.parametrize("kind", ["model_ema", "pre-zip", "half", "bfloat16", "bare"])
def test_other_forms_of_the_same_file(tensors, tmp_path, capsys, kind):
    options, expected = [], parameters()
    tensors = {name: value.clone() for name, value in tensors.items()}
    match kind:
        case "model_ema":
            options, expected = ["--parameters=model_ema"], {path: value * 2 for path, value in expected.items()}
            save(tmp_path / "m.pth", tensors)
        case "pre-zip":
            save(tmp_path / "m.pth", tensors, _use_new_zipfile_serialization=False)
        case "bare":
            torch.save(tensors, tmp_path / "m.pth")
        case _:
            narrow = {"half": torch.float16, "bfloat16": torch.bfloat16}[kind]
            save(tmp_path / "m.pth", {n: t.to(narrow) if t.is_floating_point() else t for n, t in tensors.items()})
            expected = {p: torch.from_numpy(v).to(narrow).float().numpy() for p, v in expected.items()}
    assert run(capsys, tmp_path / "m.pth", f"--workdir={tmp_path / 'run'}", *options)[0] == exit_codes.DONE
    assert_same(imported(tmp_path / "run"), expected)


@pytest.mark.parametrize("library", ["module names", "converter of GLIP files"])
def test_mmdetection_files_come_back_bit_identical(tmp_path, capsys, library):
    converted = mmdetection(state())
    if library != "module names":  # the converter itself leaves these names, and buffers
        converted = OrderedDict(
            (name.replace("dyconvs", "DyConv").replace("attnconv", "AttnConv"), value)
            for name, value in converted.items()
        )
        converted["bbox_head.anchor_generator.cell_anchors.0"] = np.zeros((1, 4), np.float32)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in converted.items()}
    content = {"state_dict": tensors, "meta": {"epoch": 1}} if library == "module names" else tensors
    torch.save(content, tmp_path / "m.pth")
    code, out = run(capsys, tmp_path / "m.pth", f"--workdir={tmp_path / 'run'}")
    assert code == exit_codes.DONE and out.splitlines()[1].startswith("mmdetection's GLIP: Swin of width 8")
    assert_same(imported(tmp_path / "run"), parameters())


@pytest.mark.parametrize("model", [SMALL, pytest.param(LITE, marks=pytest.mark.slow)], ids=["swin", "efficientnet"])
def test_an_exported_folder_brings_its_settings(tmp_path, capsys, model):
    folder = tmp_path / "exported"
    folder.mkdir()
    tensors = {f"network.{name}": np.ascontiguousarray(value) for name, value in state(model).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "vocab.txt").write_text("[PAD]\n")
    settings = dict(flatten(Config(name="mine", model=model)))
    settings["model.text.vocabulary"] = "gone.txt"
    (folder / "config.json").write_text(json.dumps({"model_type": "glip_jax", "glip_jax": settings}))
    code, out = run(capsys, folder, f"--workdir={tmp_path / 'run'}")
    assert code == exit_codes.DONE, out
    assert_same(imported(tmp_path / "run"), parameters(model))
    saved = open_checkpoint(str(tmp_path / "run")).settings
    assert saved["name"] == "mine" and saved["model.head.groups"] == 4
    assert saved["model.text.vocabulary"] == str(folder / "vocab.txt")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def _spoiled(kind, released, tensors, path):
    """Writes the file of a case; returns what to give as FILE."""
    changed = dict(tensors)
    match kind:
        case "truncated":
            path.write_bytes(released.read_bytes()[:-5000])
        case "cut inside":
            data = bytearray(released.read_bytes())
            data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
            path.write_bytes(data)
        case "empty":
            path.write_bytes(b"")
        case "page":
            path.write_bytes(b"<html>404</html>")
        case "folder":
            path.mkdir()
        case "missing":
            pass
        case "hostile":
            torch.save({"model": Hostile()}, path)
        case "unknown":
            save(path, changed | {"rpn.head.new.weight": torch.zeros(2)})
        case "lacking":
            del changed["rpn.head.dyhead_tower.1.output.dense.bias"]
            save(path, changed)
        case "not finite":
            save(path, changed | {"rpn.head.bias0": torch.tensor([float("nan")])})
        case "tuned":
            save(path, changed | {"rpn.tunable_linear.weight": torch.zeros(3, 12)})
        case "sizes":
            save(path, changed | {"backbone.fpn.fpn_inner2.bias": torch.zeros(5)})
        case "tower":
            torch.save({"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}}, path)
        case "no tensors":
            torch.save({"model": {"a": 1}}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "begins as a zip archive and has no end: it is incomplete"),
        ("cut inside", "damaged, incomplete"),
        ("empty", "f.pth is empty"),
        ("page", "is an HTML page"),
        ("folder", "is a folder that holds neither model.safetensors nor pytorch_model.bin"),
        ("missing", "f.pth does not exist"),
        ("hostile", "calls posix.system while it is read; refused"),
        ("unknown", "f.pth does not fit the network: it holds the unknown rpn.head.new.weight (1 in all)"),
        ("lacking", "it lacks rpn.head.dyhead_tower.1.output.dense.bias (1 in all)"),
        ("not finite", "rpn.head.bias0 of "),
        ("tuned", "prompts tuned for one data set (rpn.tunable_linear.*)"),
        ("sizes", "pyramid/lateral3/bias is (5,) in the file, (16,) in the network"),
        ("tower", "lacks language_backbone.body.model.embeddings.word_embeddings.weight: it is of another network"),
        ("no tensors", "holds entries that are not tensors: a"),
    ],
)
def test_bad_files_get_one_line_and_leave_nothing(released, tensors, tmp_path, monkeypatch, capsys, kind, message):
    monkeypatch.chdir(tmp_path)
    file = _spoiled(kind, released, tensors, tmp_path / "f.pth")
    code, err = run(capsys, file, "--workdir=run")
    assert code == exit_codes.BAD_INPUT and message in err and "f.pth" in err, err
    assert not (tmp_path / "run").exists() and not (tmp_path / "hostile-was-here").exists()


def test_another_variant_is_refused_by_parameter_and_both_shapes(released, tmp_path, capsys):
    other = tmp_path / "other.py"
    other.write_text(
        "import dataclasses\nfrom glip_jax.config import Config, HeadConfig\nfrom tests.weights.networks import SMALL\n\n"
        "def get_config():\n    return Config(model=dataclasses.replace(SMALL, head=HeadConfig(blocks=3, groups=4)))\n"
    )
    code, err = run(capsys, released, f"--config={other}", f"--workdir={tmp_path / 'run'}")
    assert code == exit_codes.BAD_INPUT
    assert (
        "glip.pth, Swin of width 8, depths (1, 2, 3, 1), 2 head blocks with fusion, BERT of 2 layers, does not fit"
        in err
    )
    assert "head/tower/convolution/attention/bias is (2, 1) in the file, (3, 1) in the network" in err
    for options, message in (
        ((released,), "expected a file and a folder to make, e.g. import"),
        ((f"--workdir={tmp_path / 'run'}",), "expected a file and a folder to make, e.g. import"),
        ((released, "--workdir=x", "--parameters=best"), "parameters"),
        ((released, f"--workdir={other}"), "cannot be written"),
    ):
        code, err = run(capsys, *options)
        assert code == exit_codes.BAD_INPUT and message in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_fusion(tmp_path, capsys):
    plain = dataclasses.replace(SMALL, fusion=FusionConfig(enabled=False), head=HeadConfig(blocks=1, groups=4))
    torch.save({name: torch.from_numpy(value) for name, value in state(plain).items()}, tmp_path / "a.pth")
    code, out = run(capsys, tmp_path / "a.pth", f"--workdir={tmp_path / 'run'}")
    assert code == exit_codes.DONE and "1 head blocks without fusion" in out
    assert_same(imported(tmp_path / "run"), parameters(plain))


def test_ctrl_c_leaves_nothing(released, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", interrupted)
    assert run(capsys, released, f"--workdir={tmp_path / 'run'}")[0] == exit_codes.CANCELLED
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    monkeypatch.setattr(workdir, "write_started_from", interrupted)
    assert run(capsys, released, f"--workdir={tmp_path / 'run'}")[0] == exit_codes.CANCELLED
    assert os.listdir(tmp_path / "run") == ["notes.txt"] and latest_step(str(tmp_path / "run")) is None


def test_settings_of_another_meaning_are_refused(released, tmp_path, capsys):
    given = [released, f"--workdir={tmp_path / 'run'}", "--config.model.head.coarse-offsets=resized"]
    code, err = run(capsys, *given)
    assert code == exit_codes.BAD_INPUT and "model.head.coarse_offsets: flat -> resized" in err
    assert not (tmp_path / "run").exists()
    code, out = run(capsys, *given, "--config.init-from.accept=model.head.coarse_offsets")
    assert code == exit_codes.DONE and "accepted: model.head.coarse_offsets" in out
