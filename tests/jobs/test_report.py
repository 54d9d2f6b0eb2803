import json

import numpy as np
import pytest
from PIL import Image

from glip_jax.evaluation.average_precision import NUMBERS, coco_results, load_ground_truth
from glip_jax.jobs import report
from glip_jax.structures import Detections


@pytest.fixture
def run(tmp_path):
    """A working folder as `train` and `evaluate` leave it."""
    lines = [
        {"step": 1, "loss": 2.0, "loss/box": 1.0, "source/det/loss/box": 0.5, "source/a/b/loss/box": "nan"},
        {"step": 2, "loss": 1.0, "evaluation/cells/AP": 0.5, "rate": 1e-3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "a.png")
    content = {
        "images": [{"id": 4, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 4, "category_id": 7, "bbox": [1, 2, 20, 10]}],
        "categories": [{"id": 7, "name": "cell"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    rows = [{"image_id": 4, "category_id": 7, "bbox": [1, 2, 20, 10], "score": 0.75}]
    (tmp_path / "detections_cells.json").write_text(json.dumps(rows))
    numbers = dict.fromkeys(NUMBERS, 0.5)
    entry = {
        "annotations": str(tmp_path / "truth.json"), "images": str(tmp_path / "images"), "prompts": ["cell"],
        "image_ids": [4], "numbers": numbers, "per_class": {"cell": 0.5}, "per_class_50": {"cell": 0.5},
    }  # fmt: skip
    summary = {"step": 2, "parameters": "ema", "sets": {"cells": entry}}
    (tmp_path / "evaluation.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_page_of_a_run(run, capsys):
    assert report.main([f"--workdir={run}"]) == 0
    page = (run / "report.html").read_text()
    assert str(run / "report.html") in capsys.readouterr().out
    for words in ("evaluated: step 2, ema parameters", "<h2>loss</h2>", "losses of det", "losses of a/b", "0.5000"):
        assert words in page
    assert page.count("data:image/png") == 5


def test_a_run_without_evaluation_has_its_curves(run):
    (run / "evaluation.json").unlink()
    assert report.main([f"--workdir={run}"]) == 0
    assert "Results" not in (run / "report.html").read_text()


def test_detections_come_back_as_they_went(run):
    truth = load_ground_truth(str(run / "truth.json"))
    found = Detections(np.array([[1, 2, 20, 11]], np.float32), np.array([0.5], np.float32), np.array([0], np.int32))
    back = report._detections(truth, coco_results(truth, {4: found}))
    for ours, theirs in zip(found, back, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "detections_cells.json").unlink(), "run `evaluate` again"),
        (lambda run: (run / "evaluation.json").write_text("{}"), "run `evaluate` again"),
        (lambda run: (run / "truth.json").unlink(), "truth.json is not there"),
        (lambda run: (run / "images" / "a.png").unlink(), "a.png is not there"),
    ],
)
def test_what_is_missing_is_named(run, capsys, spoil, message):
    spoil(run)
    assert report.main([f"--workdir={run}"]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_has_no_page(tmp_path, capsys):
    assert report.main([f"--workdir={tmp_path}"]) == 2
    assert "holds neither metrics.jsonl nor evaluation.json" in capsys.readouterr().err
