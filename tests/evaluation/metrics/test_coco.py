"""COCO's numbers from files: the official ones, the sparse evaluation, and what official files may hold."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from glip_jax.evaluation.metrics import coco
from glip_jax.evaluation.metrics.files import MetricError

MADE = Path(__file__).parents[2] / "fixtures/eval_parity"
TRUTH = {
    "images": [{"id": 7}, {"id": 3}],
    "categories": [{"id": 5, "name": "cell"}, {"id": 2, "name": "platelet"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [10, 10, 100, 100], "area": 10000, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [200, 50, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 3, "image_id": 3, "category_id": 5, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0},
    ],
}
RIGHT = [
    {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 0.9}
    for each in TRUTH["annotations"]
]


def _write(folder, truth, rows):
    (folder / "true.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(rows))
    return str(folder / "true.json"), str(folder / "found.json")


@pytest.mark.parametrize("pairs", [coco._PAIRS, 0], ids=["pycocotools", "sparse"])
def test_official_numbers(tmp_path, monkeypatch, pairs):
    monkeypatch.setattr(coco, "_PAIRS", pairs)
    found = coco.score(str(MADE / "coco_val2014_100_boxes.json"), str(MADE / "coco_val2014_fakebbox100_results.json"))
    counts = found.pop("counts")
    assert found == json.loads((MADE / "coco_val2014_100_expected.json").read_text())["bbox"]
    assert counts == {
        "images": 100, "categories": 80, "boxes": 839, "detections": 734, "not_listed_category": 0, "images_without_detection": 1
    }  # fmt: skip
    # A crowd, and image ids as text in the annotations.
    rows = [row for row in json.loads((MADE / "coco_ignore/dt_ignore_test.json").read_text()) if row["score"] >= 0.1]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    found = coco.score(str(MADE / "coco_ignore/gt_ignore_test.json"), str(tmp_path / "found.json"))
    expected = json.loads((MADE / "coco_ignore/expected.json").read_text())["pycocotools_2.0.11"]
    assert list(found.values())[:12] == expected


def _random(seed):
    """Annotations and detections with equal scores, equal boxes, crowds, boxes without area, and a category that is not listed."""
    rng = np.random.default_rng(seed)
    images, categories = rng.permutation(100)[:6].tolist(), rng.permutation(30)[:4].tolist()
    annotations = []
    for number in range(1, 40):
        box = [
            *np.round(rng.random(2) * 200, 1).tolist(),
            *np.round(rng.random(2) * rng.choice([0, 20, 150]), 1).tolist(),
        ]
        box = annotations[-1]["bbox"] if annotations and rng.random() < 0.2 else box
        annotations.append({
            "id": number, "image_id": int(rng.choice(images)), "category_id": int(rng.choice(categories)), "bbox": box,
            "area": box[2] * box[3] * float(rng.choice([1, 0.7])), "iscrowd": int(rng.random() < 0.15),
        })  # fmt: skip
    rows = []
    for each in rng.choice(annotations, 200):
        box = [value + float(rng.choice([0, 0, 3, -3, 10])) for value in each["bbox"]]
        category = int(rng.choice([each["category_id"]] * 8 + [*categories, 999]))
        rows.append(
            {"image_id": each["image_id"], "category_id": category, "bbox": box, "score": round(rng.random(), 1)}
        )
    truth = {"images": [{"id": key} for key in images], "annotations": annotations}
    return truth | {"categories": [{"id": key, "name": f"name {key}"} for key in categories]}, rows


@pytest.mark.parametrize(
    "top", [pytest.param(100, marks=pytest.mark.slow), 3, pytest.param(500, marks=pytest.mark.slow)]
)
def test_equals_pycocotools_on_random_boxes(tmp_path, monkeypatch, top):
    paths = _write(tmp_path, *_random(top))
    caps = sorted({1, 10, top})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(paths[0])
        official = COCOeval(truth, truth.loadRes(paths[1]), "bbox")
        official.params.maxDets = caps
        official.evaluate()
        official.accumulate()
    precision = official.eval["precision"][..., 0, caps.index(top)]
    recall = official.eval["recall"][..., 2, caps.index(top)]
    for pairs in (coco._PAIRS, 0):
        monkeypatch.setattr(coco, "_PAIRS", pairs)
        found = coco.score(*paths, top=top, per_class=True)
        assert found["AP"] == precision[precision > -1].mean()
        assert found["ARm"] == recall[recall > -1].mean()
        for cap in {10, top}:
            each = official.eval["recall"][..., 0, caps.index(cap)]
            assert found[f"AR{cap}"] == each[each > -1].mean()
        assert found["counts"]["not_listed_category"] > 0
        for index, key in enumerate(sorted(entry["id"] for entry in truth.dataset["categories"])):
            each = precision[:, :, index]
            assert found["per_class"][f"name {key}"] == each.mean()
            assert found["per_class_50"][f"name {key}"] == each[0].mean()


def test_what_official_files_hold_is_not_refused(tmp_path, caplog):
    """No file names, no areas, ids from 0 and as text, a category without boxes, boxes of images that are not listed."""
    truth = json.loads(json.dumps(TRUTH))
    for number, each in enumerate(truth["annotations"]):
        each |= {"id": number, "image_id": str(each["image_id"]), "category_id": int(each["category_id"] == 5)}
        del each["iscrowd"], each["area"]
    truth["images"] = [{"id": str(each["id"])} for each in truth["images"]]
    truth["categories"] = [
        {"id": 0, "name": "platelet"},
        {"id": 1, "name": "cell"},
        {"id": 2, "name": "a set of cells"},
    ]
    truth["annotations"].append({"id": 9, "image_id": "8", "category_id": 1, "bbox": [0, 0, 9, 9]})
    rows = [row | {"category_id": int(row["category_id"] == 5)} for row in RIGHT]
    found = coco.score(*_write(tmp_path, truth, rows), per_class=True)
    assert found["AP"] == pytest.approx(1)
    assert found["per_class"] == pytest.approx({"platelet": 1, "cell": 1, "a set of cells": -1})
    notes = caplog.text
    assert "1 x box of an image that is not listed" in notes and "3 x box without an area" in notes and "id 0" in notes


def test_a_set_of_one_image_and_a_folder_of_predictions(tmp_path):
    truth = TRUTH | {"images": [{"id": 3}], "annotations": TRUTH["annotations"][2:]}
    (tmp_path / "found").mkdir()
    paths = _write(tmp_path, truth, [])
    for number, row in ((10, {**RIGHT[2], "bbox": [90, 90, 9, 9]}), (2, RIGHT[2])):
        (tmp_path / f"found/rows-{number}.json").write_text(json.dumps([row]))
    # Equal scores rank in the order of the files: 2 before 10.
    assert coco.score(paths[0], str(tmp_path / "found"))["AP"] == pytest.approx(1)
    (tmp_path / "found/rows-1.json").write_text(json.dumps([{**RIGHT[2], "bbox": [70, 70, 9, 9]}]))
    assert coco.score(paths[0], str(tmp_path / "found"))["AP"] == pytest.approx(0.5)


def test_predictions_of_a_part_of_the_images_are_said(tmp_path, caplog):
    truth = TRUTH | {"images": [*TRUTH["images"], {"id": 1}, {"id": 2}]}
    found = coco.score(*_write(tmp_path, truth, RIGHT[:1]))
    assert found["counts"]["images_without_detection"] == 3
    assert "3 of the 4 images" in caplog.text


def test_no_detection_is_zero_and_said(tmp_path, caplog):
    assert coco.score(*_write(tmp_path, TRUTH, []))["AP"] == 0
    assert "hold no detection" in caplog.text


def test_detections_of_no_listed_category_are_refused(tmp_path):
    with pytest.raises(
        MetricError, match=r"none of the 3 detections .* whose ids are 2, 5: write the annotations' ids"
    ):
        coco.score(*_write(tmp_path, TRUTH, [row | {"category_id": 0} for row in RIGHT]))


@pytest.mark.parametrize(("boxes", "message"), [
    ([(x, y, x + 30, y + 30) for x in range(50, 60) for y in range(50, 61)], "seems to hold corners"),
    ([(x, y, x + 45, y + 50) for x in range(50, 60) for y in range(50, 61)], "seems to hold corners"),  # not clipped
    ([(0.1, 0.1 * i, 0.5, 0.4) for i in range(10)], "relative"),
    ([(-0.01, 0.1 * i, 1.02, 0.4) for i in range(10)], "relative"),
])  # fmt: skip
def test_boxes_of_another_format_are_refused(tmp_path, boxes, message):
    truth = TRUTH | {"images": [{"id": 7, "height": 100, "width": 100}, {"id": 3}]}
    with pytest.raises(MetricError, match=message):
        coco.score(*_write(tmp_path, truth, [RIGHT[0] | {"bbox": box} for box in boxes]))


def test_a_few_large_boxes_are_no_corners(tmp_path, caplog):
    """They reach beyond the image and would fit as corners."""
    truth = TRUTH | {"images": [{"id": 7, "height": 100, "width": 100}, {"id": 3}]}
    rows = [RIGHT[0] | {"bbox": [15, 15, 97, 98], "score": 0.1 * n} for n in range(10)]
    assert coco.score(*_write(tmp_path, truth, [RIGHT[0], RIGHT[2], *rows]))["AP"] == pytest.approx(0.5)
    assert "seems to hold corners" in caplog.text
