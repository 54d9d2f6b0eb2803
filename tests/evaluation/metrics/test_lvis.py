"""LVIS' standard and fixed AP: the official numbers at several cuts, in one file and in many, and annotations that are refused."""

import json
from pathlib import Path

import pytest

from glip_jax.evaluation.metrics import files, lvis
from glip_jax.evaluation.metrics.files import MetricError

MADE = Path(__file__).parents[2] / "fixtures/eval_parity"
REAL = ("lvis_v0.5_val_100_boxes.json", "lvis_v0.5_val_100_made_results.json", "lvis_fixed_ap_expected.json")
ODD = tuple(f"lvis_made/{name}.json" for name in ("annotations", "predictions", "expected"))


@pytest.mark.parametrize(("names", "kind", "top"), [
    (REAL, "fixed", "5"),
    *((ODD, kind, top) for kind in ("fixed", "standard") for top in ("3", "10")),
])  # fmt: skip
def test_official_numbers(names, kind, top):
    annotations, predictions, expected = (MADE / name for name in names)
    found = lvis.score(str(annotations), str(predictions), fixed=kind == "fixed", top=int(top))
    wanted = json.loads(expected.read_text())[kind][top]
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("names", "kind", "top"), [
    *((REAL, "fixed", top) for top in ("10000", "20", "2")), *((REAL, "standard", top) for top in ("300", "10")),
    *((ODD, kind, top) for kind in ("fixed", "standard") for top in ("1", "300")),
])  # fmt: skip
def test_official_numbers_at_further_cuts(names, kind, top):
    test_official_numbers(names, kind, top)


@pytest.mark.parametrize("kind", ["fixed", "standard"])
def test_many_files_in_any_partition_and_cuts_in_between(tmp_path, monkeypatch, kind):
    """Predictions by category, as chunks of a vocabulary give them, with the cut made many times: the same numbers."""
    monkeypatch.setattr(files, "_BLOCK", 7)
    monkeypatch.setattr(lvis, "_HELD", 20)
    annotations, predictions, expected = (MADE / name for name in ODD)
    rows = json.loads(predictions.read_text())
    for number, key in enumerate(sorted({row["category_id"] for row in rows})):
        (tmp_path / f"{number}.json").write_text(json.dumps([row for row in rows if row["category_id"] == key]))
    wanted = json.loads(expected.read_text())[kind]
    # Equal scores at a cap per image rank in the order of the files, so that only the caps that cut none of them are equal.
    for top in wanted if kind == "fixed" else ("300",):
        found = lvis.score(str(annotations), str(tmp_path), fixed=kind == "fixed", top=int(top))
        assert {key: found[key] for key in wanted[top]} == wanted[top]


def test_per_class_and_defaults():
    paths = [str(MADE / name) for name in ODD[:2]]
    found = lvis.score(*paths, per_class=True)
    assert "AR@300" in found and "kept" not in found
    values = [value for value in found["per_class"].values() if value > -1]
    assert sum(values) / len(values) == pytest.approx(found["AP"])
    assert lvis.score(*paths, fixed=True)["counts"]["categories_below_top"] == found["counts"]["categories"]


@pytest.mark.parametrize(("where", "change", "message"), [
    ("images", {"neg_category_ids": None}, "neg_category_ids None, expected a list"),
    ("categories", {"frequency": "often"}, "frequency 'often', expected r, c or f"),
])  # fmt: skip
def test_annotations_of_another_kind_are_refused(tmp_path, where, change, message):
    content = json.loads((MADE / ODD[0]).read_text())
    content[where][1] |= change
    (tmp_path / "true.json").write_text(json.dumps(content))
    with pytest.raises(MetricError, match=message):
        lvis.score(str(tmp_path / "true.json"), str(MADE / ODD[1]))


def _small(folder, boxes, rows):
    """One image whose category 1 has `boxes`, and the numbers of `rows` (category, box, score) with one detection an image."""
    truth = {
        "images": [{"id": 1, "neg_category_ids": [2], "not_exhaustive_category_ids": []}],
        "categories": [{"id": key, "name": str(key), "frequency": "f"} for key in (1, 2, 3)],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": key, "bbox": box, "area": box[2] * box[3]}
            for number, (key, box) in enumerate(boxes, 1)
        ],
    }
    (folder / "true.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps([
        {"image_id": 1, "category_id": key, "bbox": box, "score": score} for key, box, score in rows
    ]))  # fmt: skip
    return lvis.score(str(folder / "true.json"), str(folder / "found.json"), top=1)


def test_a_category_that_is_not_listed_takes_its_place_among_the_boxes_of_an_image(tmp_path):
    box = [0, 0, 50, 50]
    assert _small(tmp_path, [(1, box)], [(1, box, 0.5)])["AP"] == pytest.approx(1)
    assert _small(tmp_path, [(1, box)], [(1, box, 0.5), (9, box, 0.6)])["AP"] == 0


def test_a_box_without_area_does_not_make_its_category_annotated(tmp_path):
    box = [0, 0, 50, 50]
    found = _small(tmp_path, [(1, box), (3, [5, 5, 0, 9])], [(3, box, 0.5)])
    assert found["counts"]["counted"] == 0
    assert _small(tmp_path, [(1, box), (3, [5, 5, 9, 9])], [(3, box, 0.5)])["counts"]["counted"] == 1
    assert _small(tmp_path, [(1, box)], [(2, box, 0.5)])["counts"]["counted"] == 1
