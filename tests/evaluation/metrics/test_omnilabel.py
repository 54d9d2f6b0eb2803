"""OmniLabel: the official numbers, label spaces, groups, and files that are refused."""

import json
from pathlib import Path

import pytest

from glip_jax.evaluation.metrics import omnilabel
from glip_jax.evaluation.metrics.files import MetricError

MADE = Path(__file__).parents[2] / "fixtures/eval_parity/omnilabel_8357"
CASES = json.loads((MADE / "expected.json").read_text())["cases"]


def _description(key, text, images, kind="object_description"):
    return {"id": key, "text": text, "image_ids": images, "anno_info": {"type": kind}}


TRUE = {
    "images": [{"id": 20, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "descriptions": [
        _description(1, "man", [20, 3], "object_category"), _description(2, "a man with a red hat", [20, 3]),
        _description(3, "one two three", [3]), _description(4, "not asked of 3", [20, 999]),
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "bbox": [0, 0, 10, 10], "description_ids": [1, 3], "iscrowd": 0},
        {"id": 2, "image_id": 20, "bbox": [0, 0, 10, 10], "description_ids": [1, 2]},
        {"id": 3, "image_id": 20, "bbox": [50, 50, 40, 40], "description_ids": [2], "iscrowd": 1},
    ],
}  # fmt: skip


def _score(folder, rows, true=TRUE):
    rows = [
        {"image_id": image, "bbox": box, "description_ids": list(found), "scores": list(found.values())}
        for image, box, found in rows
    ]
    (folder / "true.json").write_text(json.dumps(true))
    (folder / "found.json").write_text(json.dumps(rows))
    return omnilabel.score(str(folder / "true.json"), str(folder / "found.json"))


@pytest.mark.parametrize("case", CASES)
def test_official_numbers(case):
    found = omnilabel.score(str(MADE / "8357.json"), str(MADE / f"predictions_{case}.json"))
    assert {row["name"]: row["value"] for row in CASES[case]["all"]} == {
        name: found[name] for name in omnilabel.NUMBERS
    }
    assert {row["name"]: row["numgt"] for row in CASES[case]["all"]} == found["boxes"]


def test_all_pairs_share_one_curve(tmp_path):
    box, far = [0, 0, 10, 10], [80, 0, 5, 5]
    found = _score(tmp_path, [
        (3, box, {1: 0.4, 3: 0.9}),
        (20, far, {1: 0.5}),  # false, above the true one of the other image
        (20, box, {1: 0.6, 2: 0.7}),
        (20, [60, 60, 10, 10], {2: 0.8}),  # inside the crowd: does not count
        (3, far, {2: 0.95, 4: 0.99}),  # 2 is absent in image 3, so descr-pos leaves it out; 4 is not asked there
    ])  # fmt: skip
    # categ: true, false, true. Recall 1/2 at precision 1, then 2/3: 51 and 50 of 101 points.
    assert found["AP categ"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    # descr: false, true, (ignored), true. Precision 2/3 at every recall.
    assert found["AP descr"] == pytest.approx(2 / 3) and found["AP descr-pos"] == pytest.approx(1)
    # By words: "one two three" is short, the others are medium.
    assert found["AP descr short (<=3 words)"] == pytest.approx(1)
    assert found["AP descr medium (4-8)"] == pytest.approx(1 / 2) and found["AP descr long (>=9)"] == -1
    assert found["boxes"]["AP descr"] == 2 and found["boxes"]["AP descr long (>=9)"] == -1
    assert found["counts"] == {
        "images": 2, "pairs": 6, "predictions_outside_label_space": 1, "annotations_outside_label_space": 0
    }  # fmt: skip


def test_a_hundred_boxes_of_a_pair_and_equal_scores_in_the_order_of_images(tmp_path):
    box, far = [0, 0, 10, 10], [80, 0, 5, 5]
    rows = [(3, far, {1: 0.9})] * 100 + [(3, box, {1: 0.8}), (20, box, {1: 0.1})]
    assert _score(tmp_path, rows)["AR categ"] == 0.5
    # Image 3 comes before image 20, in whatever order the files list them.
    first = _score(tmp_path, [(20, far, {1: 0.5}), (3, box, {1: 0.5})])
    assert first["AP categ @IoU.5"] == pytest.approx(51 / 101)
    second = _score(tmp_path, [(20, box, {1: 0.5}), (3, far, {1: 0.5})])
    assert second["AP categ @IoU.5"] == pytest.approx(51 / 101 / 2)
    third = _score(tmp_path, [(3, [0, 0, 10, 7.2], {1: 0.5}), (20, box, {1: 0.5})])
    assert third["AP categ @IoU.5"] == pytest.approx(1) and third["AP categ @IoU.75"] == pytest.approx(51 / 101 / 2)


def test_no_prediction_is_zero_and_not_an_error(tmp_path):
    found = _score(tmp_path, [])
    assert found["AP categ"] == found["AP descr"] == found["AR categ"] == 0 and found["boxes"]["AP categ"] == 2


def test_files_that_cannot_be_scored(tmp_path):
    for rows, true, message in (
        ([(5, [0, 0, 1, 1], {1: 0.5})], TRUE, r"does not list the image 5 \(item \[0\]"),
        ([(3, [0, 0, 1, 1], {0: 0.5})], TRUE, "all 1 are of descriptions outside the label space"),
        ([(3, [0, 0, 1, 1], {1: float("nan")})], TRUE, r"scores\[0\] is .*NaN"),
        ([(3, [0, 0, 1], {1: 0.5})], TRUE, r"bbox\[0\] is .* expected four finite numbers"),
        ([], {key: TRUE[key] for key in ("images", "descriptions")}, "annotations"),
        ([], TRUE | {"images": TRUE["images"] * 2}, "occurs twice in images"),
        ([], TRUE | {"annotations": TRUE["annotations"] * 2}, "id 1 occurs twice in annotations"),
        ([], TRUE | {"descriptions": [_description(1, "man", [3, 3])]}, "description 1 lists the image 3 twice"),
        ([], TRUE | {"descriptions": [_description(1, "man", [4])]}, "no description lists an image"),
    ):
        with pytest.raises(MetricError, match=message):
            _score(tmp_path, rows, true)
    (tmp_path / "true.json").write_text(json.dumps(TRUE))
    (tmp_path / "found.json").write_text(
        '[{"image_id": 3, "bbox": [0, 0, 1, 1], "description_ids": [1, 2], "scores": [0.5]}]'
    )
    with pytest.raises(MetricError, match="one for each of its description_ids"):
        omnilabel.score(str(tmp_path / "true.json"), str(tmp_path / "found.json"))
