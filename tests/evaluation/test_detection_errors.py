"""Errors of a detector on a made set: thresholds, kinds of errors, confused names, recall by size, worst images."""

import numpy as np
import pytest

from glip_jax.evaluation.average_precision import GroundTruth
from glip_jax.evaluation.detection_errors import KINDS, detection_errors, operating_point, operating_points


def _row(image, category, bbox, score):
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


@pytest.fixture
def truth():
    boxes = [
        ("a", 1, [0, 0, 20, 20], 0), ("a", 2, [50, 50, 40, 40], 0), ("a", 1, [100, 0, 100, 100], 0), ("b", 2, [0, 0, 10, 10], 0),
        ("b", 1, [100, 100, 100, 100], 1), *(("c", 1, [x, 100, 20, 20], 0) for x in (0, 50, 90)),
    ]  # fmt: skip
    content = {
        "images": [{"id": key, "file_name": f"{key}.jpg", "height": 200, "width": 200} for key in "abc"],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for i, (image, k, box, crowd) in enumerate(boxes, 1)
        ],
    }
    return GroundTruth("made.json", content, (1, 2), ("cat", "dog"))


def test_the_point_of_the_highest_f1():
    scores, right = np.array([0.2, 0.9, 0.5, 0.7]), np.array([False, True, True, False])
    # F1 from 0.9 on: 2 / 4, from 0.7: 2 / 5, from 0.5: 4 / 6, from 0.2: 4 / 7.
    assert operating_point(scores, right, 3) == pytest.approx((0.5, 2 / 3, 2 / 3, 2 / 3))
    assert operating_point(scores, np.zeros(4, bool), 3) == (0.5, 0, 0, 0)
    assert operating_point(np.array([0.9, 0.1]), np.array([True, False]), 1).threshold == 0.9
    # A threshold cannot part equal scores: 0.8 keeps two of which one is right.
    assert operating_point(np.array([0.8, 0.8]), np.array([True, False]), 1) == pytest.approx((0.8, 0.5, 1, 2 / 3))


def test_every_kind_of_error_is_counted_and_the_worst_images_come_first(truth):
    found = detection_errors(truth, [
        _row("a", 1, [0, 0, 20, 20], 0.9),  # right
        _row("a", 1, [0, 0, 20, 19], 0.8),  # found twice
        _row("a", 1, [50, 50, 40, 40], 0.7),  # a dog
        _row("a", 1, [100, 0, 40, 90], 0.6),  # badly placed: overlaps by 0.36
        _row("c", 1, [0, 0, 9, 9], 0.95),  # background
        _row("b", 1, [110, 110, 20, 20], 0.99),  # in the crowd: left out
        _row("b", 2, [0, 0, 10, 10], 0.4),  # right
        _row("a", 2, [0, 100, 10, 10], 0.3),  # below dog's threshold
        _row("b", 1, [0, 60, 30, 30], 0.55), _row("a", 1, [100, 2, 100, 98], 0.5),  # background, right
        *(_row("c", 1, [x, 100, 20, 20], 0.51) for x in (0, 50, 90)),  # right
    ])  # fmt: skip
    assert found.points["dog"] == pytest.approx((0.4, 1, 1 / 2, 2 / 3)) and found.points["cat"].threshold == 0.5
    assert found.kinds == {
        "cat": dict(zip(("right", *KINDS), (5, 1, 1, 1, 2, 0), strict=True)),
        "dog": dict(zip(("right", *KINDS), (1, 0, 0, 0, 0, 1), strict=True)),
    }
    assert found.confused == (("dog", "cat", 1),)
    assert found.sizes == {"small": (5, 5), "medium": (0, 1), "large": (1, 1)}
    assert [mistake.file for mistake in found.false_alarms] == ["c.jpg", "a.jpg", "b.jpg"]
    assert [(m.file, m.missed) for m in found.misses] == [("a.jpg", (False, True, False))]
    assert [
        len(each) for each in (detection_errors(truth, []).misses, detection_errors(truth, [], count=1).misses)
    ] == [3, 1]
    assert detection_errors(truth, [], count=1).misses[0].file == "a.jpg", "the larger part of an image is missed there"


def test_thresholds_of_another_set_are_applied(truth):
    rows = [_row("a", 1, [0, 0, 20, 20], 0.9), _row("b", 2, [0, 0, 10, 10], 0.4), _row("c", 2, [50, 0, 9, 9], 0.6)]
    found = detection_errors(truth, rows, {"cat": 0.95, "dog": 0.5})
    assert found.points == {"cat": (0.95, 0, 0, 0), "dog": (0.5, 0, 0, 0)}
    assert found.kinds["cat"]["missed"] == 5 and found.kinds["dog"]["background"] == 1
    # Nothing called a dog is right: it takes the threshold of all names.
    points = operating_points(truth, [rows[0], rows[2]])
    assert points["dog"].threshold == points["cat"].threshold == 0.9
