import json

import numpy as np
import pytest
from PIL import Image

from glip_jax.cli import report
from glip_jax.cli.evaluate import phrase_results
from glip_jax.evaluation.average_precision import NUMBERS, coco_results, load_ground_truth
from glip_jax.io.provenance import file_hash
from glip_jax.structures.batch import Detections
from tests.run_job import run_job


@pytest.fixture
def run(tmp_path):
    """A working folder as `train` and `evaluate` leave it."""
    lines = [
        {"step": 1, "loss": 2.0, "loss/box": 1.0, "source/det/loss/box": 0.5, "source/a/b/loss/box": "nan"},
        {"step": 2, "loss": 1.0, "evaluation/cells/AP": 0.5, "evaluation/x/plain/recall@1": 0.5, "rate": 1e-3},
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
    numbers = dict.fromkeys(NUMBERS, 0.5) | {"AP50_permuted": 0.125, "AP50_ratio": 4.0}
    cells = {
        "annotations": str(tmp_path / "truth.json"), "images": str(tmp_path / "images"), "kind": "detection",
        "prompts": ["cell"], "chunks": [["cell"]], "image_ids": [4], "numbers": numbers, "per_class": {"cell": 0.5},
        "per_class_50": {"cell": 0.5},
        "hashes": {"annotations": file_hash(str(tmp_path / "truth.json")), "pictures": "aa"},
    }  # fmt: skip
    caption = {"id": 4, "file_name": "a.png", "caption": "one cell"}
    note = {"id": 1, "image_id": 4, "bbox": [1, 2, 20, 10], "tokens_positive": [[0, 8]]}
    (tmp_path / "captions.json").write_text(json.dumps({"images": [caption], "annotations": [note]}))
    found = [{"image_id": 4, "phrase": 0, "bbox": [1, 2, 20, 10], "score": 0.75}]
    (tmp_path / "detections_x.json").write_text(json.dumps(found))
    recalls = {f"{name}@{k}": 1.0 for name in ("recall", "merged_recall") for k in (1, 5, 10)}
    phrases = {
        "annotations": str(tmp_path / "captions.json"), "images": str(tmp_path / "images"), "kind": "grounding",
        "image_ids": [4], "numbers": recalls, "phrases": {"": 1}, "counts": {"captions": 1}, "unasked": [[4, [0]]],
        "hashes": {"annotations": file_hash(str(tmp_path / "captions.json")), "pictures": "bb"},
    }  # fmt: skip
    summary = {
        "format": report.FORMAT, "name": "demo", "workdir": "w", "date": "2030", "step": 2, "parameters": "ema",
        "settings": {"detection.nms_iou": 0.6}, "hashes": {"checkpoint": "cc"}, "versions": {"jax": "1"},
        "sets": {"cells": cells, "x": phrases},
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_page_of_a_run(run, capsys):
    assert run_job("report", [f"--workdir={run}"]) == 0
    page = (run / "report.html").read_text()
    assert str(run / "report.html") in capsys.readouterr().out
    for words in ("config demo, evaluated at step 2, ema parameters", 'alt="loss by step"', "losses of det", "losses of a/b",
                  'alt="AP by step"', "recall@1 by step", "0.5000", "4.0 × chance"):  # fmt: skip
        assert words in page
    assert page.count("data:image/svg") == 5 and page.count("data:image/jpeg") == 2
    assert not list(run.glob("*.unfinished"))


def test_an_evaluation_elsewhere_has_its_page_there(run, capsys):
    (run / "other").mkdir()
    for file in ("evaluation.json", "detections_cells.json", "detections_x.json"):
        (run / file).rename(run / "other" / file)
    assert run_job("report", [f"--workdir={run}", f"--out={run / 'other'}"]) == 0
    page = (run / "other" / "report.html").read_text()
    assert "4.0 × chance" in page and 'alt="loss by step"' in page
    assert not (run / "report.html").exists()


def test_a_run_without_evaluation_has_its_curves(run):
    (run / "evaluation.json").unlink()
    assert run_job("report", [f"--workdir={run}"]) == 0
    assert "chance" not in (run / "report.html").read_text()


def test_detections_come_back_as_they_went(run):
    truth = load_ground_truth(str(run / "truth.json"))
    found = Detections(np.array([[1, 2, 20, 11]], np.float32), np.array([0.5], np.float32), np.array([0], np.int32))
    there = [(0, row) for row in coco_results(truth, {4: found})]
    phrases = [(row["phrase"], row) for row in phrase_results({4: found})]
    assert phrases[0][1]["bbox"] == [1, 2, 19, 9]
    for back in (report._detections(there, 1.0), report._detections(phrases, 0.0)):
        for ours, theirs in zip(found, back, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "detections_cells.json").unlink(), "run `evaluate` again"),
        (lambda run: (run / "evaluation.json").write_text("{}"), "another version of glip_jax: run `evaluate` again"),
        (lambda run: (run / "evaluation.json").write_text("{"), "run `evaluate` again"),
        (
            lambda run: (run / "captions.json").write_text((run / "captions.json").read_text() + " "),
            "captions.json has changed",
        ),
        (lambda run: (run / "truth.json").unlink(), "truth.json does not exist"),
        (lambda run: (run / "images" / "a.png").unlink(), "a.png does not exist"),
    ],
)
def test_what_is_missing_is_named(run, capsys, spoil, message):
    spoil(run)
    assert run_job("report", [f"--workdir={run}"]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_has_no_page(tmp_path, capsys):
    assert run_job("report", [f"--workdir={tmp_path}"]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
