"""Overlaps, COCO's matching and its curve, against pycocotools."""

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from glip_jax.evaluation.metrics.matching import curve, giou, iou, match


def test_overlaps_of_plain_corners_are_exact():
    target = np.array([[0, 0, 100, 100]], np.float32)
    boxes = np.array([[0, 0, 100, 50], [18, 18, 118, 118], [200, 0, 300, 100], [7, 7, 7, 7]], np.float32)
    np.testing.assert_array_equal(iou(boxes, target)[:, 0], np.array([0.5, 6724 / 13276, 0, 0], np.float32))
    # GIoU takes off the empty part of the hull: 118 x 118 = 13924; 300 x 100.
    np.testing.assert_allclose(
        giou(boxes, target)[:, 0], [0.5, 6724 / 13276 - (13924 - 13276) / 13924, -1 / 3, 0], rtol=1e-6
    )
    assert giou(boxes, target)[0, 0] == 0.5 and np.isnan(iou(boxes[3:], boxes[3:])[0, 0])


def test_matching_and_curve_equal_pycocotools():
    """One class on 25 images: equal overlaps and scores, crowds, more than 100 detections."""
    generator = np.random.default_rng(5)
    truth: Any = COCO()
    images = list(range(1, 26))
    annotations, results = [], []
    for image in images:
        for _ in range(generator.integers(0, 6)):
            box = [*generator.integers(0, 8, 2) * 5, *generator.integers(1, 6, 2) * 5]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": [float(v) for v in box], "area": 25.0,
                "iscrowd": int(generator.random() < 0.2),
            })  # fmt: skip
        for _ in range(generator.choice([0, 5, 130])):
            box = [*generator.integers(0, 8, 2) * 5, *generator.integers(1, 6, 2) * 5]
            results.append({
                "image_id": image, "category_id": 1, "bbox": [float(v) for v in box], "score": float(generator.integers(1, 9) / 8),
            })  # fmt: skip
    truth.dataset = {
        "info": {},
        "images": [{"id": image} for image in images],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        official = COCOeval(truth, truth.loadRes(results), "bbox")
        official.params.maxDets = [100]
        official.params.areaRng, official.params.areaRngLbl = [[0, 1e10]], ["all"]
        official.evaluate()
        official.accumulate()
    scores, matched, ignored, positives = [], [], [], 0
    for image in images:
        true = [row for row in annotations if row["image_id"] == image]
        found = sorted((row for row in results if row["image_id"] == image), key=lambda row: -row["score"])[:100]
        crowd = np.array([row["iscrowd"] == 1 for row in true], bool)
        positives += int((~crowd).sum())
        overlap = np.zeros((len(found), len(true)))
        if found and true:
            overlap = np.asarray(
                mask.iou([row["bbox"] for row in found], [row["bbox"] for row in true], crowd.astype(int).tolist())
            )
        each = match(overlap, crowd, crowd)
        scores += [row["score"] for row in found]
        matched.append(each.matched)
        ignored.append(each.ignored)
    ours = curve(np.array(scores), np.concatenate(matched, 1), np.concatenate(ignored, 1), positives)
    np.testing.assert_array_equal(ours.precision, np.asarray(official.eval["precision"])[:, :, 0, 0, 0])
    np.testing.assert_array_equal(ours.recall, np.asarray(official.eval["recall"])[:, 0, 0, 0])
    np.testing.assert_array_equal(ours.scores, np.asarray(official.eval["scores"])[:, :, 0, 0, 0])


def test_of_equal_boxes_the_later_is_taken():
    """The second detection overlaps only the first of two boxes that the first detection overlaps equally."""
    overlap = np.array([[0.8, 0.8, 0.8], [0.6, 0.0, 0.0], [0.0, 0.0, 0.9]])
    no = np.zeros(3, bool)
    ours = match(overlap, no, no, np.array([0.5]))
    assert ours.matched.tolist() == [[True, True, False]]  # the third box is taken first
    ours = match(overlap, np.array([False, False, True]), no, np.array([0.5, 0.7]))  # an ignored box is taken last
    assert ours.matched.tolist() == [[True, True, True], [True, False, True]]
    assert ours.ignored.tolist() == [[False, False, True]] * 2


def test_a_curve_without_detections_is_zero():
    empty = np.zeros((10, 0), bool)
    ours = curve(np.zeros(0), empty, empty, 3)
    assert ours.precision.shape == (10, 101) and not ours.precision.any() and not ours.recall.any()
