"""run_onnx.py beside an exported graph finds the boxes of the Detector, without torch and jax."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glip_jax.inference import Detector
from glip_jax.weights.export import write_onnx
from glip_jax.weights.portable.processing_glip import best_detections
from tests import tiny_run

pytestmark = pytest.mark.compiles

NAMES = ["Cat", "dog", "person", "red_car", "traffic light", "bottle (of milk)", "cup", "tree", "potted plant"]
CONFIG = tiny_run.replace(tiny_run.config(dropout=0.0), "evaluation", short_side=64, long_side=96, batch_size=1)
CONFIG = tiny_run.replace(CONFIG, "detection", threshold=0.02, max_detections=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported graph of random parameters, and an image that is stored lying."""
    made = tmp_path_factory.mktemp("onnx") / "model"
    write_onnx(made, tiny_run.parameters(CONFIG.model), CONFIG)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(3).integers(0, 256, (70, 110, 3), np.uint8)
    Image.fromarray(pixels).save(made / "lying.png", exif=exif)
    return made


@pytest.fixture(scope="module")
def runner(folder):
    """The script of the folder as a module."""
    spec = importlib.util.spec_from_file_location("run_onnx_of_folder", folder / "run_onnx.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_boxes_are_those_of_the_detector(folder, runner):
    """Names in two prompts, sides that are no multiples of 32, an image that is turned."""
    pixels = np.rot90(np.asarray(Image.open(folder / "lying.png")), -1)
    (wanted,) = Detector(CONFIG, tiny_run.parameters(CONFIG.model)).categories([np.ascontiguousarray(pixels)], NAMES)
    detector = runner.Detector(folder)
    assert len(detector.split(NAMES)) == 2
    boxes, scores, labels = detector(Image.open(folder / "lying.png"), NAMES, 0.0)
    assert len(scores) == len(wanted.scores) > 12 and len({*labels.tolist()}) > 3
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-4)
    np.testing.assert_allclose(boxes, wanted.boxes, atol=0.05)
    assert labels.tolist() == wanted.phrases.tolist()
    middle = float(np.median(scores))
    assert len(detector(Image.open(folder / "lying.png"), NAMES, middle)[0]) == (scores > middle).sum()


@pytest.mark.parametrize(("rule", "sinks"), [("mean", 0), ("max", 2)])
def test_the_selection_is_that_of_the_other_exports(runner, rule, sinks):
    """On random outputs with many overlaps, for levels, suppression, sinks and both rules."""
    import torch

    rng, made = np.random.default_rng(7), runner.Detector.__new__(runner.Detector)
    settings: dict[str, Any] = {
        "threshold": 0.3,
        "candidates_per_level": 40,
        "nms_iou": 0.5,
        "max_detections": 25,
        "token_scores": rule,
        "sinks": sinks,
    }
    made.settings = {"strides": [16, 32], "detection": settings}
    count, canvas = 4 * 6 + 2 * 3, (64, 96)
    logits, centerness = (rng.normal(size=shape).astype(np.float32) for shape in ((count, 9 + sinks), (count,)))
    corners = rng.uniform(-5, 100, (count, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    phrases = np.zeros((3, 9), np.float32)
    phrases[0, 1:3] = phrases[1, 4] = phrases[2, 5:8] = 1
    found = made._best(boxes, centerness, logits, phrases, (60, 90), canvas)
    given = [torch.from_numpy(array) for array in (logits, boxes, centerness, phrases)]
    wanted = best_detections(given[0], given[1], given[2], given[3], torch.tensor([60, 90]), [24, 6], **settings)
    assert len(found[0]) > 10
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected a list with at least one"),
        ("cat", "expected a list with at least one"),
        (["cat", "CAT"], "'CAT' is the same to the model as 'cat'"),
        (["(all)"], "has no word that the model's vocabulary knows"),
        (["斑马"], "has no word that the model's vocabulary knows"),
        (["cat " * 20], "has 22 tokens, a prompt 16: shorten it"),
    ],
)
def test_names_that_cannot_be_asked_are_refused(folder, runner, names, message):
    with pytest.raises(ValueError, match=message):
        runner.Detector(folder).split(names)
    with pytest.raises(ValueError, match="mode I;16: expected 8 bits a channel"):
        runner.upright(Image.fromarray(np.zeros((4, 4), np.uint16)))


@pytest.mark.slow
def test_the_command_needs_neither_torch_nor_jax(folder, tmp_path):
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'torch', 'jax', 'glip_jax', 'transformers'} & {*sys.modules}"
    )
    command = [
        "run_onnx.py",
        "lying.png",
        "--names=cat, dog",
        "--threshold=0.05",
        f"--draw={tmp_path / 'drawn'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["file"] == "lying.png" and {row["name"] for row in found["detections"]} <= {"cat", "dog"}
    assert len(found["detections"]) > 2
    with Image.open(tmp_path / "drawn" / "lying.png") as drawn:
        assert drawn.size == (70, 110)
