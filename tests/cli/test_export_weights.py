"""The job `export` on the original's own small network (tests/fixtures/set1): every format, read as its users read it."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from glip_jax.cli import checkpoint_argument
from glip_jax.config import Config
from glip_jax.distributed import exit_codes
from glip_jax.inference import Detector
from glip_jax.io.checkpoint import Checkpoints, Saved, fingerprint, open_checkpoint
from glip_jax.weights import export, verification
from glip_jax.weights.names import parameter_shapes
from tests.parity.folder import model_config, read_meta
from tests.run_job import run_job

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).resolve().parents[2]
SET1 = ROOT / "tests" / "fixtures" / "set1"
VOCABULARY = ROOT / "tests" / "fixtures" / "vocab_tiny1.txt"
NAMES = ("red ball", "dog")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """set1's weights as `import` leaves them, evaluated at small sizes."""
    folder = tmp_path_factory.mktemp("set1") / "run"
    model = model_config(read_meta(SET1))
    given = {
        "model.text.heads": model.text.heads, "model.fusion.heads": model.fusion.heads, "model.head.groups": model.head.groups,
        "model.text.vocabulary": VOCABULARY, "model.text.max-tokens": 16, "evaluation.short-side": 96, "evaluation.long-side": 128,
    }  # fmt: skip
    settings = [f"--config.{name}={value}" for name, value in given.items()]
    assert run_job("import", [str(SET1 / "model_t.safetensors"), f"--workdir={folder}", *settings]) == exit_codes.DONE
    return folder


def run(workdir, out, form, *more):
    return run_job("export", [f"--workdir={workdir}", f"--out={out}", f"--format={form}", *more])


@pytest.fixture(scope="module")
def later(workdir, tmp_path_factory):
    """What the original has not: the network knows where cells are, sinks say a text, and names compete."""
    folder, checkpoint = tmp_path_factory.mktemp("later"), open_checkpoint(str(workdir))
    config, params = checkpoint.config, checkpoint.parameters()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, head=dataclasses.replace(config.model.head, positions=True)),
        detection=dataclasses.replace(
            config.detection, sinks=3, sink_start="red ball", name_decay=2.0, name_decay_iou=0.3
        ),
    )
    rng, shapes = np.random.default_rng(0), parameter_shapes(config.model)
    made = {
        name: {"kernel": rng.normal(size=shapes[f"head/{name}/kernel"].shape).astype(np.float32)}
        for name in ("positions", "directions")
    }
    with Checkpoints(str(folder), 1) as checkpoints:
        checkpoints.save(0, Saved({**params, "head": {**params["head"], **made}}, {}, {}), config)
    return folder


@pytest.fixture(scope="module")
def exported(workdir, later, tmp_path_factory):
    """Exports by format, made once; `export` itself compares each with the network that it came from."""
    made = {}

    def get(form):
        if form not in made:
            out = tmp_path_factory.mktemp(form) / ("glip.pth" if form == "glip-pth" else "model")
            assert run(workdir if form == "glip-pth" else later, out, form) == exit_codes.DONE
            made[form] = out
        return made[form]

    return get


@pytest.mark.slow
def test_glip_pth_has_exactly_the_original_s_tensors(exported):
    """Keys, shapes, dtypes and bits, buffers included; the branch that nothing reads with its initial bias."""
    original = load_file(SET1 / "model_t.safetensors")
    content = torch.load(exported("glip-pth"), weights_only=True)
    assert list(content) == ["model"]
    assert all(name.startswith("module.") for name in content["model"])
    found = {name.removeprefix("module."): value.numpy() for name, value in content["model"].items()}
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in original.items()}
    for name, value in original.items():
        if "cls_logits" not in name:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    np.testing.assert_allclose(found["rpn.head.cls_logits.bias"], -np.log(99), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["glip-pth", "huggingface"])
def test_import_export_import_is_the_same_bits(workdir, later, exported, tmp_path, form):
    source = str(workdir if form == "glip-pth" else later)
    heads = (
        [f"--config.model.text.heads={open_checkpoint(str(workdir)).config.model.text.heads}"]
        if form == "glip-pth"
        else []
    )
    assert run_job("import", [str(exported(form)), f"--workdir={tmp_path / 'again'}", *heads]) == exit_codes.DONE
    first, second = (fingerprint(open_checkpoint(folder).parameters()) for folder in (source, str(tmp_path / "again")))
    assert first == second
    if form == "huggingface":
        assert open_checkpoint(str(tmp_path / "again")).config == open_checkpoint(source).config


_USER = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

assert not any(name.startswith("glip_jax") or name.startswith("jax") for name in sys.modules)
folder, names, pictures = sys.argv[1], sys.argv[2].split(","), [Image.open(path) for path in sys.argv[3:]]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=pictures, text=[names] * len(pictures), return_tensors="pt")
with torch.inference_mode():
    outputs = model(**inputs)
sizes = [picture.size[::-1] for picture in pictures]
found = processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=sizes, text_labels=[names] * len(pictures))
print(json.dumps([{"scores": f["scores"].tolist(), "boxes": f["boxes"].tolist(), "labels": f["labels"].tolist(),
                   "words": f["text_labels"]} for f in found]))
"""


@pytest.mark.slow
def test_transformers_finds_the_same_boxes_without_us(later, exported, tmp_path):
    """In a process of its own, offline, elsewhere; two images of different extents in one batch."""
    folder = exported("huggingface")
    pictures = verification.sample_images()
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", _USER, str(folder), ",".join(NAMES), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    checkpoint = open_checkpoint(str(later))
    detector = Detector(checkpoint.config, checkpoint.parameters(), batch_size=2)
    for theirs, ours in zip(found, detector.categories(pictures, NAMES), strict=True):
        assert len(theirs["scores"]) == len(ours.scores) > 3
        np.testing.assert_allclose(theirs["scores"], ours.scores, atol=1e-4)
        assert theirs["words"] == [NAMES[label] for label in theirs["labels"]]
        # Scores that differ by rounding may change places.
        for box, score, label in zip(theirs["boxes"], theirs["scores"], theirs["labels"]):
            close = (np.abs(ours.scores - score) < 1e-4) & (ours.phrases == label)
            assert np.abs(ours.boxes[close] - box).max(1).min() < 0.05


@pytest.mark.slow
def test_onnx_takes_other_sizes_and_batches(exported):
    """Against the exported PyTorch network; the graph was traced at 192 x 256 with two images and seven tokens."""
    import onnxruntime

    from glip_jax.weights.portable.glip_network import GlipNetwork

    settings = json.loads((exported("huggingface") / "config.json").read_text())
    network = GlipNetwork(settings["network"]).eval()
    state = load_file(exported("huggingface") / "model.safetensors")
    network.load_state_dict({k.removeprefix("network."): torch.from_numpy(v) for k, v in state.items()})
    session = onnxruntime.InferenceSession(str(exported("onnx") / "model.onnx"), providers=["CPUExecutionProvider"])
    pixels, tokens = torch.randn(3, 3, 160, 96), torch.randint(5, 500, (3, 11))
    mask = (torch.arange(11)[None] < torch.tensor([[11], [4], [8]])).long()
    with torch.inference_mode():
        logits, deltas, center = network(pixels, tokens, mask)
        boxes = network.boxes(deltas, 160, 96)
    inputs = {"pixel_values": pixels.numpy(), "input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
    found = {name: np.asarray(x) for name, x in zip(("boxes", "centerness", "logits"), session.run(None, inputs))}
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(found["centerness"], center, atol=1e-4)
    np.testing.assert_allclose(found["boxes"], boxes, atol=0.05)
    assert sorted(path.name for path in exported("onnx").iterdir()) == [
        "model.onnx", "run_onnx.py", "settings.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert json.loads((exported("onnx") / "settings.json").read_text())["detection"]["sinks"] == 3


@pytest.mark.slow
def test_an_export_that_differs_is_thrown_away(workdir, tmp_path, monkeypatch, capsys):
    honest = export.write

    def careless(form, out, params, config):
        head = dict(params["head"])
        head["bias0"] = np.asarray(head["bias0"]) + 2e-3
        honest(form, out, {**params, "head": head}, config)

    monkeypatch.setattr(export, "write", careless)
    assert run(workdir, tmp_path / "x.pth", "glip-pth") == exit_codes.BAD_INPUT
    err = capsys.readouterr().err
    assert "differs from the network it came from: logits by" in err
    assert err.startswith("export: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_and_a_killed_export_is_cleared_away(workdir, tmp_path, monkeypatch, capsys):
    def interrupted(form, out, params, config):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write", interrupted)
    assert run(workdir, tmp_path / "x", "huggingface") == exit_codes.CANCELLED
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "x.pth.unfinished").mkdir()
    (tmp_path / "x.pth.unfinished" / "x.pth").write_bytes(b"half")
    assert run(workdir, tmp_path / "x.pth", "glip-pth") == exit_codes.DONE
    out = capsys.readouterr().out
    assert "x.pth.unfinished" in out and "removed" in out
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=glip-pth"], "nowhere to write to"),
        (["--out={tmp}/x"], "no checkpoint: expected --checkpoint="),
        (["--workdir={run}", "--out={tmp}"], "is there already"),
        (["--workdir={run}", "--out={tmp}/x", "--format=glip-pth"], "ends in .pth"),
        (["--workdir={run}", "--out={tmp}/x", "--format=hugingface"], "Expected one of"),
        (["--workdir={tmp}/none", "--out={tmp}/x"], "holds no complete checkpoint"),
        (["--workdir={run}", "--out={tmp}/x", "--step=3"], "no checkpoint of step 3"),
        (["--workdir={run}", "--out={tmp}/x.pth", "--format=glip-pth", "--config.detection.sinks=2"], "microsoft/GLIP has no sinks"),
        (["--workdir={run}", "--out={tmp}/x", "--config.detection.sinks=2", "--config.detection.sink-start=斑马"], "sink_start"),
        (["--workdir={run}", "--out={tmp}/x", "--config.model.text.vocabulary={tmp}/vocab.txt"], "vocab.txt does not exist"),
        (["--workdir={run}", "--out={tmp}/x", "--format=onnx", "--images={tmp}"], "has no images"),
        (["--workdir={run}", "--out={tmp}/x", "--config.model.head.blocks=3"], "another network"),
        (["--workdir={run}", "--out={tmp}/file.txt/x"], "cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(workdir, tmp_path, capsys, arguments, message):
    (tmp_path / "file.txt").write_text("")
    assert run_job("export", [a.format(run=workdir, tmp=tmp_path) for a in arguments]) == exit_codes.BAD_INPUT
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("export: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_presence_is_refused_as_no_format_holds_it(tmp_path):
    head = dataclasses.replace(Config().model.head, presence=True)
    config = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, head=head))
    for form in ("glip-pth", "huggingface", "onnx"):
        with pytest.raises(export.ExportError, match=r"model.head.presence is true: no exported .* presence=False"):
            export.write(form, tmp_path / "x", {}, config)
    assert not list(tmp_path.iterdir())


def test_networks_that_glip_cannot_be_are_refused(workdir, tmp_path, monkeypatch, capsys):
    settings_of = checkpoint_argument.settings_of

    def resized(*arguments):
        config = settings_of(*arguments)
        head = dataclasses.replace(config.model.head, coarse_offsets="resized", offset_bound=3, positions=True)
        text = dataclasses.replace(config.model.text, mask="phrase")
        return dataclasses.replace(config, model=dataclasses.replace(config.model, head=head, text=text))

    monkeypatch.setattr(checkpoint_argument, "settings_of", resized)
    assert run(workdir, tmp_path / "x.pth", "glip-pth") == exit_codes.BAD_INPUT
    err = capsys.readouterr().err
    assert "model.head.coarse_offsets is resized, GLIP's is flat" in err
    assert "model.head.offset_bound is 3, GLIP's is 0" in err
    assert "model.head.positions is True, GLIP's is False" in err
    assert "model.text.mask is phrase, GLIP's is padding" in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_what_installs_it(workdir, tmp_path, monkeypatch, capsys):
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else honest(name, *a)
    )
    assert run(workdir, tmp_path / "x", "onnx") == exit_codes.BAD_INPUT
    assert "needs onnxruntime, not installed here: pip install -r requirements-export.txt" in capsys.readouterr().err
