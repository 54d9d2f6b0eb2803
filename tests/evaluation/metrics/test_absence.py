"""Absent names in closed form: three images, two absent names each."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from glip_jax.evaluation.metrics import absence, files, lvis
from glip_jax.evaluation.metrics.files import MetricError, objects

FIXTURES = Path(__file__).parents[2] / "fixtures" / "eval_parity"
NAMES = ("cat", "dog", "cow", "owl")
BOX = [10, 10, 20, 20]
TRUTH = [(1, "cat"), (2, "dog"), (3, "cat")]
# Of absent names .9 .8 .6 .5 .2; the second dog of image 3 is of a name of which nothing is known there.
FALSE = [(1, "cow", 0.9), (1, "owl", 0.8), (2, "cow", 0.6), (2, "cow", 0.5), (3, "owl", 0.2)]
CLAIMS = [(1, "cat", 0.95, BOX), (2, "dog", 0.85, BOX), (3, "cat", 0.4, [10, 10, 20, 16]), (3, "dog", 0.99, BOX)]


def number(name):
    return NAMES.index(name) + 1


def content(**changes):
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 64, "known_absent": ["cow", "owl"]} for i in (1, 2, 3)
    ]
    boxes = [{"id": i, "image_id": image, "category_id": number(name), "bbox": BOX, "area": 400, "iscrowd": 0}
             for i, (image, name) in enumerate(TRUTH, 1)]  # fmt: skip
    categories = [{"id": number(name), "name": name} for name in NAMES]
    return {"images": images, "annotations": boxes, "categories": categories} | changes


def results():
    rows = [(image, name, score, [0, 0, 5, 5]) for image, name, score in FALSE] + CLAIMS
    return [{"image_id": i, "category_id": number(n), "bbox": b, "score": s} for i, n, s, b in rows]


def scored(folder, truth=None, found=None, **options):
    (folder / "truth.json").write_text(json.dumps(content() if truth is None else truth))
    (folder / "found.json").write_text(json.dumps(results() if found is None else found))
    return absence.score(str(folder / "truth.json"), str(folder / "found.json"), **options)


def test_three_images_with_two_absent_names_each(tmp_path):
    result = scored(tmp_path, threshold=0.45)
    assert (result["images"], result["names"], result["absent_pairs"], result["present_pairs"]) == (3, 4, 6, 3)
    assert result["boxes_not_judged"] == 1
    at = {t: numbers["false_alarms"] for t, numbers in result["thresholds"].items()}
    assert at["0.05"] == 5 / 6 and at["0.3"] == 4 / 6 == at["0.45"] and at["0.8"] == 2 / 6 and at["0.9"] == 1 / 6
    half = result["thresholds"]["0.5"]
    assert half["alarmed_pairs"] == 3 / 6, "a pair with two boxes is alarmed once"
    assert half["found_pairs"] == 2 / 3
    assert half["presence_MCC"] == pytest.approx((2 * 3 - 3 * 1) / math.sqrt((2 + 3) * (2 + 1) * (3 + 3) * (3 + 1)))
    assert half["positive_micro_F1"] == pytest.approx(2 * 2 / (2 + 3))
    assert half["cgF1"] == half["positive_micro_F1"] * half["presence_MCC"]
    # The third cat overlaps by 0.8: right at seven of ten IoU.
    assert result["thresholds"]["0.4"]["positive_micro_F1"] == pytest.approx(0.7 * 1 + 0.3 * 4 / 6)


def test_thresholds_at_rates_and_the_ap_there(tmp_path):
    """Of six pairs 0.25 allows one box: the threshold lies just above the second highest score; 0.05 and 0.01 allow none."""
    result = scored(tmp_path)
    rates = result["rates"]
    assert list(rates) == ["0.01", "0.05", "0.25"]
    assert rates["0.25"]["threshold"] == pytest.approx(0.8, abs=1e-6) and rates["0.25"]["threshold"] > 0.8
    assert rates["0.25"]["threshold"] > np.float32(0.8), "as the detector computes"
    assert rates["0.25"]["false_alarms"] == 1 / 6
    assert rates["0.05"]["threshold"] == rates["0.01"]["threshold"] == pytest.approx(0.9, abs=1e-6)
    assert rates["0.05"]["false_alarms"] == 0
    # Cats: one of two found with precision 1, 51 of 101 points of recall. Dogs: the wrong box of 0.99 comes first.
    assert rates["0.25"]["AP"] == pytest.approx((51 / 101 + 1 / 2) / 2)
    assert rates["0.05"]["AP"] == pytest.approx((51 / 101 + 0) / 2)
    cats = (7 * 1 + 3 * 51 / 101) / 10
    assert result["AP"] == pytest.approx((cats + 1 / 2) / 2)
    assert absence.threshold_at(0.5, np.array([0.7, 0.7, 0.7, 0.1]), 4) == pytest.approx(0.7, abs=1e-6), (
        "ties all pass or none"
    )
    assert absence.threshold_at(1.0, np.array([0.7, 0.1]), 2) == 0 == absence.threshold_at(0.1, np.zeros(0), 2)


def test_names_have_their_own_threshold_where_one_box_may_pass(tmp_path):
    truth = content()
    truth["images"] += [dict(truth["images"][0], id=i, known_absent=["owl"]) for i in range(4, 22)]
    per_name = scored(tmp_path, truth)["per_name"]
    assert per_name["cow"] == {"absent_pairs": 3, "false_alarms": {"0.3": 1.0, "0.5": 1.0}, "thresholds": {}}
    assert per_name["owl"]["absent_pairs"] == 21
    assert per_name["owl"]["thresholds"] == {"0.05": pytest.approx(0.2, abs=1e-6), "0.25": 0.0}
    assert absence.thresholds_of(scored(tmp_path, truth), 0.05)[1] == {"owl": pytest.approx(0.2, abs=1e-6)}


def test_look_alikes_have_numbers_of_their_own(tmp_path):
    truth = content()
    truth["images"][0]["look_alikes"] = ["owl"]
    alike = scored(tmp_path, truth)["look_alikes"]
    assert alike["absent_pairs"] == 1
    assert (alike["thresholds"]["0.8"], alike["thresholds"]["0.9"]) == (
        {"false_alarms": 1.0, "alarmed_pairs": 1.0}, {"false_alarms": 0.0, "alarmed_pairs": 0.0},
    )  # fmt: skip


def test_boxes_are_assigned_for_the_largest_sum_of_overlaps(tmp_path):
    """The better box overlaps both true ones; taken greedily for the first it would leave the second without a match."""
    true = [[0, 0, 10, 10], [0, 4, 10, 10]]
    truth = content(annotations=[
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0} for i, box in enumerate(true, 1)
    ])  # fmt: skip
    found = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": score}
        for box, score in (([0, 1, 10, 10], 0.9), ([0, 0, 10, 5.4], 0.8))
    ]
    # Overlaps: 9/11 and 7/13 of the first box, 0.54 and 0.1 of the second; 9/11 + 0.1 < 7/13 + 0.54.
    result = scored(tmp_path, truth, found)["thresholds"]["0.5"]
    assert result["positive_micro_F1"] == pytest.approx(0.1), "both are right at 0.50, none from 0.55 on"


def test_a_name_of_two_categories_is_absent_in_both(tmp_path):
    truth = content()
    truth["categories"].append({"id": 9, "name": "owl"})
    assert scored(tmp_path, truth)["absent_pairs"] == 9


def test_crowds_are_neither_present_nor_absent_nor_counted(tmp_path):
    truth = content()
    truth["annotations"][2]["iscrowd"] = 1
    result = scored(tmp_path, truth)
    assert result["present_pairs"] == 2 and result["boxes_not_judged"] == 2
    assert result["thresholds"]["0.4"]["positive_micro_F1"] == 1


def test_every_category_without_a_box_is_absent_on_request(tmp_path):
    truth = content()
    for image in truth["images"]:
        del image["known_absent"]
    with pytest.raises(MetricError, match="list no absent name: expected `known_absent`"):
        scored(tmp_path, truth)
    result = scored(tmp_path, truth, exhaustive=True)
    assert result["absent_pairs"] == 9 and result["thresholds"]["0.9"]["false_alarms"] == 2 / 9


def test_lvis_negatives_and_its_ap(tmp_path, caplog):
    """A box of a category of which LVIS knows nothing on the image counts neither as an alarm nor in AP."""
    truth = content()
    for image in truth["images"]:
        del image["known_absent"]
        image |= {"neg_category_ids": [3, 4], "not_exhaustive_category_ids": []}
    for category in truth["categories"]:
        category["frequency"] = "f"
    result = scored(tmp_path, truth)
    assert result["absent_pairs"] == 6 and result["rates"]["0.25"]["false_alarms"] == 1 / 6
    assert result["rates"]["0.25"]["AP"] == pytest.approx((51 / 101 + 1) / 2), "the dog of image 3 is left out"
    truth["images"][0]["neg_category_ids"].append(1)
    assert scored(tmp_path, truth)["absent_pairs"] == 6
    assert "1 of 7 neg_category_ids have a box in their image: taken as present" in caplog.text


def test_expressions_without_a_target(tmp_path):
    images = [{"id": i, "file_name": "a.jpg", "height": 64, "width": 64, "caption": "x"} for i in (1, 2, 3)]
    empty = {"bbox": [0, 0, 0, 0], "category_id": -1, "empty": True}
    truth = {"images": images, "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX}, {"id": 2, "image_id": 2, **empty}, {"id": 3, "image_id": 3, **empty},
    ]}  # fmt: skip
    found = {
        "1": {"boxes": [[10, 10, 30, 30]], "scores": [0.9]}, "2": {"boxes": [[0, 0, 9, 9]] * 2, "scores": [0.6, 0.4]},
        "3": {"boxes": [], "scores": []},
    }  # fmt: skip
    result = scored(tmp_path, truth, found)
    assert result["thresholds"]["0.5"] == {
        "false_alarms": 0.5, "alarmed_pairs": 0.5, "found_pairs": 1.0, "presence_MCC": pytest.approx(0.5),
        "positive_micro_F1": 1.0, "cgF1": pytest.approx(0.5),
    }  # fmt: skip
    assert result["rates"]["0.25"]["threshold"] == pytest.approx(0.6, abs=1e-6) and "AP" not in result


def test_official_numbers(tmp_path, monkeypatch):
    """Of gRefCOCO's evaluator: N-acc is the share of expressions without a target that nothing is found for, T-acc the others'; LVIS's AP."""
    folder = FIXTURES / "grefcoco_made"
    result = absence.score(str(folder / "annotations.json"), str(folder / "predictions.json"))
    official = json.loads((folder / "expected.json").read_text())["official_giou"]
    for threshold, numbers in official.items():
        found = result["thresholds"][threshold]
        assert found["alarmed_pairs"] == pytest.approx(1 - numbers["N_acc"]) and found["found_pairs"] == pytest.approx(
            numbers["T_acc"]
        )
    folder = FIXTURES / "lvis_made"
    boxes, made = (str(folder / f"{name}.json") for name in ("annotations", "predictions"))
    read = []
    monkeypatch.setattr(files, "objects", lambda path, *rest: (read.append(str(path)), objects(path, *rest))[1])
    result = absence.score(boxes, made)
    assert result["AP"] == json.loads((folder / "expected.json").read_text())["standard"]["300"]["AP"]
    assert read.count(made) == 1, "predictions of gigabytes are read once"
    monkeypatch.undo()
    for rate in result["rates"].values():
        from_there = [row for row in json.loads(Path(made).read_text()) if row["score"] >= rate["threshold"]]
        (tmp_path / "found.json").write_text(json.dumps(from_there))
        assert rate["AP"] == lvis.score(boxes, str(tmp_path / "found.json"))["AP"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"known_absent": ["unicorn"]}, "image 1 lists 'unicorn' in known_absent, which is the name of no category"),
        ({"known_absent": ["cat"]}, "image 1 has a box of 'cat', which it lists as known to be absent"),
        ({"known_absent": "owl"}, "known_absent is 'owl': expected a list"),
        ({"neg_category_ids": [9]}, "lists 9 in neg_category_ids, which is the id of no category"),
    ],
)
def test_lists_that_contradict_the_file_are_refused(tmp_path, change, message):
    truth = content()
    truth["images"][0] |= change
    with pytest.raises(MetricError, match=message):
        scored(tmp_path, truth)


def test_predictions_of_other_images_are_refused_and_none_is_no_error(tmp_path):
    with pytest.raises(MetricError, match="another image list"):
        scored(tmp_path, found=[{"image_id": 9, "category_id": 1, "bbox": BOX, "score": 0.5}])
    with pytest.raises(MetricError, match="finite"):
        scored(tmp_path, found=[{"image_id": 1, "category_id": 1, "bbox": BOX, "score": float("nan")}])
    with pytest.raises(MetricError, match="none of the 9 detections has a category of"):
        scored(tmp_path, found=[row | {"category_id": row["category_id"] + 5000} for row in results()])
    with pytest.raises(MetricError, match="threshold is nan"):
        scored(tmp_path, threshold=float("nan"))
    assert "0.3000001" in scored(tmp_path, threshold=0.3000001)["thresholds"]
    result = scored(tmp_path, found=[])
    assert (
        result["AP"] == 0 and result["thresholds"]["0.05"]["presence_MCC"] == 0 == result["rates"]["0.01"]["threshold"]
    )
