"""Precision of referring expressions: the official numbers, ties, and files that are refused."""

import json
from pathlib import Path

import pytest

from glip_jax.evaluation.metrics import grefcoco, refexp
from glip_jax.evaluation.metrics.files import MetricError

MADE = Path(__file__).parents[2] / "fixtures/eval_parity/refexp_made"
TARGET = [0, 0, 100, 100]
FAR = [300, 300, 400, 400]


def _write(folder, expressions, predictions):
    """Files of expressions {id: true boxes xywh} and predictions {id: [(score, box), ...]}; returns their paths."""
    images = [{"id": key, "dataset_name": "refcoco", "caption": "a"} for key in expressions]
    annotations = [
        {"id": number, "image_id": key, "category_id": 1 if box else -1, "bbox": box or [0, 0, 0, 0]}
        for number, (key, box) in enumerate((key, box) for key, boxes in expressions.items() for box in boxes)
    ]
    found = {
        key: {"boxes": [box for _, box in rows], "scores": [score for score, _ in rows]}
        for key, rows in predictions.items()
    }
    (folder / "true.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "found.json").write_text(json.dumps(found))
    return str(folder / "true.json"), str(folder / "found.json")


@pytest.mark.parametrize(("overlap", "name"), [("giou", "official_giou"), ("iou", "same_evaluator_with_iou")])
def test_official_numbers(overlap, name):
    found = refexp.score(str(MADE / "annotations.json"), str(MADE / "predictions.json"), overlap=overlap)
    counts = found.pop("counts")
    assert found == json.loads((MADE / "expected.json").read_text())[name]
    assert counts == {"refcoco": 20, "refcoco+": 20, "refcocog": 23}


def test_boxes_are_ranked_by_score_and_then_by_the_box(tmp_path):
    expressions = {key: [TARGET] for key in range(8)}
    paths = _write(tmp_path, expressions, {
        "0": [(0.1, FAR), (0.9, TARGET)],  # the file's order does not count
        "1": [(0.5, TARGET), (0.5, FAR)],  # equal scores: the box with the greater x1 is first
        "2": [(0.5, [0, 0, 100, 99]), (0.5, [0, 0, 99, 100])],  # a hit both ways
        "3": [(0.9 - 0.1 * i, FAR) for i in range(4)] + [(0.2, [0, 0, 100, 50])],  # GIoU exactly 0.5 at rank 5
        "4": [],  # nothing is a miss
        "5": [(0.9 - 0.01 * i, FAR) for i in range(10)] + [(0.1, TARGET)],  # rank 11
        "6": [(0.5, FAR), (0.5, TARGET)],  # as 1
        "7": [(0.5, [0, 300, 100, 400]), (0.5, TARGET)],  # equal x1: the greater y1
    })  # fmt: skip
    assert refexp.score(*paths) == {
        "refcoco": [2 / 8, 6 / 8, 6 / 8], "counts": {"refcoco": 8}
    }  # fmt: skip


def test_scores_are_float32_as_in_the_official_evaluators(tmp_path):
    """These scores are equal in float32, so the box decides: the other one is first."""
    paths = _write(tmp_path, {1: [TARGET]}, {"1": [(0.5 + 1e-9, TARGET), (0.5, FAR)]})
    assert refexp.score(*paths)["refcoco"] == [0, 1, 1]


BAD = {
    "no prediction": (
        {1: [TARGET], 2: [TARGET]},
        {"1": [], "3": []},
        r"of the 2 expressions of .* lack 1 \(first 2\) and have 1 others \(first 3\)",
    ),
    "a longer list": ({1: [TARGET]}, {"1": [], "2": []}, r"they have 1 others \(first 2\); expected"),
    "no box": ({1: [TARGET], 2: []}, {"1": [], "2": []}, "1 of 2 expressions have no annotation, first 2"),
    "corners in the wrong order": ({1: [TARGET]}, {"1": [(0.5, [100, 0, 0, 100])]}, r"boxes\[0\].*x1 <= x2"),
    "nan": ({1: [TARGET]}, {"1": [(float("nan"), TARGET)]}, r"scores\[0\] is nan"),
    "an id in two forms": ({1: [TARGET]}, {"1": [], "1.0": []}, "expression 1 again as 1.0"),
    "a negative width": ({1: [[0, 0, -1, 5]]}, {"1": []}, r"expected \[x, y, width, height\]"),
    "relative boxes": (
        {i: [TARGET] for i in range(10)},
        {str(i): [(0.5, [0.1, 0.1, 1.02, 0.9])] for i in range(10)},
        "relative: expected x1",
    ),
    "no expression": ({}, {}, "images is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_cannot_be_scored(tmp_path, case):
    expressions, predictions, message = BAD[case]
    paths = _write(tmp_path, expressions, predictions)
    for metric in (refexp, grefcoco):
        with pytest.raises(MetricError, match=message):
            metric.score(*paths)


def test_an_annotation_id_that_occurs_twice(tmp_path):
    paths = _write(tmp_path, {1: [TARGET], 2: [TARGET]}, {"1": [], "2": []})
    true = Path(paths[0])
    true.write_text(true.read_text().replace('"id": 1, "image_id"', '"id": 0, "image_id"'))
    with pytest.raises(MetricError, match="annotation 0 occurs twice"):
        refexp.score(*paths)


def test_an_id_that_is_no_number_or_text(tmp_path):
    paths = _write(tmp_path, {1: [TARGET]}, {"1": []})
    true = Path(paths[0])
    true.write_text(true.read_text().replace('"id": 1', '"id": [1]'))
    with pytest.raises(MetricError, match=r"id \[1\], expected a number or text"):
        refexp.score(*paths)


@pytest.mark.parametrize(("boxes", "count"), [([TARGET, TARGET], 2), ([None], 0)])
def test_refexp_refuses_several_targets_and_none(tmp_path, boxes, count):
    paths = _write(tmp_path, {7: boxes}, {"7": []})
    with pytest.raises(MetricError, match=f"image 7 has {count} true boxes"):
        refexp.score(*paths)
