"""COCO's metrics against values worked out by hand, and the level of chance."""

import json

import numpy as np
import pytest

from glip_jax.config import EvaluationSet
from glip_jax.evaluation.average_precision import (
    NUMBERS,
    GroundTruthError,
    average_precision,
    coco_results,
    derangement,
    load_ground_truth,
    permuted_ap50,
)  # fmt: skip
from glip_jax.structures.batch import Detections

# Two images, ids out of order and with gaps; "small" boxes are below 32 x 32 pixels, "large" ones above 96 x 96.
TRUTH = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
    "categories": [{"id": 5, "name": "red blood cell"}, {"id": 2, "name": "platelet"}, {"id": 9, "name": "unseen"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [10, 10, 100, 100], "area": 10000, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [200, 50, 20, 20]},
        {"id": 3, "image_id": 3, "category_id": 5, "bbox": [0, 0, 50, 50]},
    ],
}


@pytest.fixture
def truth(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    return load_ground_truth(str(tmp_path / "truth.json"))


def _result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_categories_are_sorted_by_id(truth):
    assert truth.category_ids == (2, 5, 9)
    assert truth.names == ("platelet", "red blood cell", "unseen")


def test_perfect_results_score_one(truth):
    results = [_result(a["image_id"], a["category_id"], a["bbox"], 0.9) for a in TRUTH["annotations"]]
    found = average_precision(truth, results)
    assert tuple(found.numbers) == NUMBERS
    assert all(value == pytest.approx(1) for value in found.numbers.values())
    assert found.per_class == pytest.approx({"platelet": 1, "red blood cell": 1, "unseen": -1})


def test_a_box_with_the_id_0_can_be_matched(tmp_path):
    annotations = [entry | {"id": number} for number, entry in enumerate(TRUTH["annotations"])]
    (tmp_path / "truth.json").write_text(json.dumps({**TRUTH, "annotations": annotations}))
    results = [_result(a["image_id"], a["category_id"], a["bbox"], 0.9) for a in annotations]
    assert average_precision(load_ground_truth(str(tmp_path / "truth.json")), results).numbers["AP"] == pytest.approx(1)


def test_metrics_worked_out_by_hand(truth):
    # Platelet: found with an overlap of 0.8 (of 20 x 20, 16 x 20), thus at seven of the ten thresholds 0.5 .. 0.8.
    # Red blood cell: one of two found, behind a false one: precision 1/2 up to recall 1/2, which are 51 of 101 points.
    results = [
        _result(7, 2, [200, 50, 16, 20], 0.8),
        _result(3, 5, [60, 60, 30, 30], 0.9),
        _result(7, 5, [10, 10, 100, 100], 0.5),
    ]
    found = average_precision(truth, results)
    red = 0.5 * 51 / 101
    assert found.per_class == pytest.approx({"platelet": 0.7, "red blood cell": red, "unseen": -1})
    assert found.per_class_50["platelet"] == pytest.approx(1)
    assert found.numbers["AP"] == pytest.approx((0.7 + red) / 2)
    assert found.numbers["AP75"] == pytest.approx((1 + red) / 2)
    assert found.numbers["AR100"] == pytest.approx((0.7 + 0.5) / 2)
    assert found.numbers["APs"] == pytest.approx(0.7)
    assert found.numbers["APl"] == pytest.approx(1.0)


@pytest.mark.parametrize("count", [2, 3, 7, 80])
def test_a_derangement_moves_every_category_once(count):
    moved = derangement(count)
    assert sorted(moved) == list(range(count)) and all(i != j for i, j in enumerate(moved))
    assert derangement(count) == moved
    # One cycle: no group of names is permuted within itself.
    index, seen = 0, set()
    while index not in seen:
        seen.add(index)
        index = moved[index]
    assert len(seen) == count


def test_there_is_no_derangement_of_one():
    with pytest.raises(ValueError, match="1 categories"):
        derangement(1)


def test_ap50_with_permuted_names(truth):
    exchanged = {truth.category_ids[j]: truth.category_ids[i] for i, j in enumerate(derangement(3))}
    right = [_result(a["image_id"], a["category_id"], a["bbox"], 0.9) for a in TRUTH["annotations"]]
    assert permuted_ap50(truth, right) == 0
    # Results with permuted names are right after the permutation.
    wrong = [row | {"category_id": exchanged[row["category_id"]]} for row in right]
    assert permuted_ap50(truth, wrong) == pytest.approx(1)
    assert average_precision(truth, wrong).numbers["AP50"] == 0
    assert wrong[0]["category_id"] == exchanged[TRUTH["annotations"][0]["category_id"]], "the results were changed"


def test_permuted_ap50_equals_ap50_of_permuted_results(truth):
    back = {truth.category_ids[j]: truth.category_ids[i] for i, j in enumerate(derangement(3))}
    rng = np.random.default_rng(0)
    results = [
        _result(
            a["image_id"],
            int(rng.choice([2, 5, 9])),
            [v + int(rng.integers(9)) for v in a["bbox"]],
            float(rng.random()),
        )
        for a in TRUTH["annotations"] * 20
    ]
    exchanged = [row | {"category_id": back[row["category_id"]]} for row in results]
    assert 0 < average_precision(truth, results).numbers["AP50"] < 1
    assert permuted_ap50(truth, exchanged) == pytest.approx(average_precision(truth, results).numbers["AP50"])


def test_one_category_has_no_level_of_chance(tmp_path):
    content = {**TRUTH, "categories": TRUTH["categories"][:1], "annotations": TRUTH["annotations"][:1]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    assert permuted_ap50(load_ground_truth(str(tmp_path / "truth.json")), []) == -1


def test_without_results_ap_is_zero_and_without_boxes_minus_one(truth):
    assert average_precision(truth, []).numbers["AP"] == 0
    assert average_precision(truth, [], image_ids=[3]).per_class == {"platelet": -1, "red blood cell": 0, "unseen": -1}


def test_metrics_of_the_given_images_only(truth):
    results = [_result(3, 5, [0, 0, 50, 50], 0.9)]
    assert average_precision(truth, results).numbers["AP"] < 0.3
    assert average_precision(truth, results, image_ids=[3]).numbers["AP"] == pytest.approx(1)


def test_results_have_the_widths_of_the_original_and_the_ids_of_the_set(truth):
    found = Detections(
        np.array([[1, 2, 11, 22], [0, 0, 5, 5], [0, 0, 0, 0]], np.float32),
        np.array([0.75, 0.5, 0], np.float32),
        np.array([1, 0, -1], np.int32),
    )
    rows = coco_results(truth, {7: found})
    assert rows[0] == {"image_id": 7, "category_id": 5, "bbox": [1, 2, 11, 21], "score": 0.75}
    assert [row["category_id"] for row in rows] == [5, 2]
    assert coco_results(truth, {7: found}, "plain")[0]["bbox"] == [1, 2, 10, 20]


def test_evaluating_changes_neither_truth_nor_results(truth):
    results = [_result(3, 5, [0, 0, 50, 50], 0.9)]
    before = json.dumps([truth.content, results])
    average_precision(truth, results)
    assert json.dumps([truth.content, results]) == before


def test_categories_of_one_name_are_told_apart_by_id(tmp_path):
    content = {**TRUTH, "categories": [{"id": 2, "name": "cell"}, {"id": 5, "name": "cell"}]}
    path = str(tmp_path / "truth.json")
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with pytest.raises(
        GroundTruthError, match=r"both named 'cell'.*evaluation\.sets\.NAME\.merge_names.*sets\.NAME\.names"
    ):
        load_ground_truth(path)
    apart = load_ground_truth(path, EvaluationSet(path, "", {"2": "white cell", "5": "red cell"}))
    assert apart.prompts == ("white cell", "red cell")
    assert set(average_precision(apart, []).per_class) == {"cell (id 2)", "cell (id 5)"}
    assert load_ground_truth(path, EvaluationSet(path, "", merge_names=True)).prompts == ("cell",)


def test_results_of_unknown_images_are_refused(truth):
    with pytest.raises(GroundTruthError, match=r"no images \[8\]"):
        average_precision(truth, [_result(8, 5, [0, 0, 1, 1], 0.5)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, expected an object with categories"),
        (json.dumps({**TRUTH, "categories": TRUTH["categories"][1:2]}), "2 of 3 boxes .* box: category not listed"),
        (json.dumps({**TRUTH, "images": TRUTH["images"] * 2}), "the id 7 occurs twice in images"),
        (json.dumps({**TRUTH, "images": [{"file_name": "a"}]}), r"images\[0\] lacks id"),
        (
            json.dumps({**TRUTH, "annotations": [{**TRUTH["annotations"][0], "bbox": [1, 2]}]}),
            "expected bbox to be x, y",
        ),
    ],
)
def test_bad_files_give_one_message(tmp_path, content, message):
    (tmp_path / "truth.json").write_text(content)
    with pytest.raises(GroundTruthError, match=message):
        load_ground_truth(str(tmp_path / "truth.json"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GroundTruthError, match=r"nothing.json does not exist"):
        load_ground_truth(str(tmp_path / "nothing.json"))
