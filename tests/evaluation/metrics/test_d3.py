"""D3's numbers: the files of the release, one file with flags, lengths, and the ground truth of the inter-scenario."""

import json
import pickle
import subprocess

import numpy as np
import pytest

from glip_jax.evaluation.metrics import coco, d3
from glip_jax.evaluation.metrics.files import MetricError

NAMES = ["a dog", "a dog without a leash", "a red bus with two doors", "a street without cars at all on it"]
NEGATIVE = [False, True, False, True]
# Two groups: images 0 and 1 are asked 1 and 2, image 2 is asked 3 and 4. The box in image 2 also is "a dog".
BOXES = {0: [(0, 0, 50, 50), (1, 2)], 1: [(10, 10, 40, 40), (1,)], 2: [(5, 5, 90, 60), (3, 4, 1)]}
INNER = {0: (1, 2), 1: (1, 2), 2: (3, 4)}


def _content(sentences, flags=False):
    """Annotations as D3's `convert2coco` writes them: ids from 0, descriptions of the image's own group."""
    rows = [(i, s, box) for i, (box, all_of) in BOXES.items() for s in all_of if s in INNER[i] and s in sentences]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in BOXES],
        "categories": [
            {"id": s, "name": NAMES[s - 1]} | ({"is_negative": NEGATIVE[s - 1]} if flags else {}) for s in sentences
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": s, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, s, box) in enumerate(rows)
        ],
    }


def _release(folder):
    """The folder of the three files."""
    folder = folder / "d3_json"
    folder.mkdir()
    for part, sentences in {"FULL": (1, 2, 3, 4), "PRES": (1, 3), "ABS": (2, 4)}.items():
        (folder / d3.PARTS[part]).write_text(json.dumps(_content(sentences)))
    return folder


def _pickles(folder):
    """The pickles, with NumPy's arrays where the release has them."""
    folder = folder / "d3_pkl"
    folder.mkdir()
    tables = {
        "sentences": {s: {"id": s, "is_negative": NEGATIVE[s - 1], "raw_sent": NAMES[s - 1]} for s in (1, 2, 3, 4)},
        "annotations": {
            i: {"id": i, "sent_id": list(all_of), "image_id": i, "bbox": np.array([box]), "area": np.array([box[2] * box[3]])}
            for i, (box, all_of) in BOXES.items()
        },
        "images": {i: {"id": i, "anno_id": [i], "group_id": int(i == 2)} for i in BOXES},
        "groups": {g: {"id": g, "inner_sent_id": [1 + 2 * g, 2 + 2 * g], "img_id": [2] if g else [0, 1]} for g in (0, 1)},
    }  # fmt: skip
    for name, table in tables.items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(table))
    return folder


def _found(folder):
    """Every description that is asked where it is, one box of "a dog" too many, and "a dog" in image 2."""
    rows = [
        (0, 1, (0, 0, 50, 50), 0.9),
        (0, 2, (0, 0, 50, 40), 0.8),
        (1, 1, (10, 10, 40, 40), 0.7),
        (1, 1, (70, 70, 9, 9), 0.95),
    ]
    rows += [(2, 3, (5, 5, 90, 60), 0.6), (2, 4, (60, 5, 30, 60), 0.5), (2, 1, (5, 5, 90, 60), 0.99)]
    (folder / "found.json").write_text(json.dumps([
        {"image_id": i, "category_id": s, "bbox": list(box), "score": score} for i, s, box, score in rows
    ]))  # fmt: skip
    return str(folder / "found.json")


def test_each_part_is_coco_on_its_file(tmp_path):
    folder, predictions = _release(tmp_path), _found(tmp_path)
    found = d3.score(str(folder), predictions, per_class=True)
    full = coco.score(str(folder / d3.PARTS["FULL"]), predictions, per_class=True)
    assert {key: found[key] for key in ("AP", "AP50", "AR100")} == {key: full[key] for key in ("AP", "AP50", "AR100")}
    each = full["per_class"]
    assert found["FULL"] == found["AP"] == pytest.approx(np.mean(list(each.values())))
    assert found["PRES"] == pytest.approx((each[NAMES[0]] + each[NAMES[2]]) / 2)
    assert found["ABS"] == pytest.approx((each[NAMES[1]] + each[NAMES[3]]) / 2)
    assert len({found["FULL"], found["PRES"], found["ABS"]}) == 3
    # Words: 2, 5, 6 and 8.
    assert found["length"]["FULL"] == pytest.approx({
        "short": each[NAMES[0]], "mid": (each[NAMES[1]] + each[NAMES[2]]) / 2, "long": each[NAMES[3]], "very_long": -1
    })  # fmt: skip
    assert found["length"]["PRES"] == pytest.approx(
        {"short": each[NAMES[0]], "mid": each[NAMES[2]], "long": -1, "very_long": -1}
    )
    assert found["counts"]["descriptions"] == {"FULL": 4, "PRES": 2, "ABS": 2}
    assert d3.score(str(folder.parent), predictions) == d3.score(str(folder / d3.PARTS["FULL"]), predictions)


def test_one_file_with_flags_and_one_without(tmp_path, caplog):
    wanted = d3.score(str(_release(tmp_path)), _found(tmp_path))
    (tmp_path / "flags.json").write_text(json.dumps(_content((1, 2, 3, 4), flags=True)))
    assert d3.score(str(tmp_path / "flags.json"), str(tmp_path / "found.json")) == wanted
    (tmp_path / "plain.json").write_text(json.dumps(_content((1, 2, 3, 4))))
    plain = d3.score(str(tmp_path / "plain.json"), str(tmp_path / "found.json"))
    assert (plain["FULL"], plain["PRES"], plain["ABS"]) == (wanted["FULL"], -1, -1)
    assert "does not tell which descriptions are of absence" in caplog.text


def test_inter_counts_finds_of_other_groups_where_the_pickles_tell(tmp_path):
    folder, predictions = _release(tmp_path), _found(tmp_path)
    assert d3.score(str(folder), predictions, inter=True)["all_groups"] is None
    _pickles(tmp_path)
    found = d3.score(str(folder), predictions, inter=True)
    # "a dog" in image 2 is the best score of its description: wrong by the released file, right by the pickles. There are three
    # dogs then: precision is 1 up to a recall of 1/3, which are 34 of 101 points, and 3/4 at the others.
    assert found["PRES"] < found["all_groups"]["PRES"] == pytest.approx((1 + (34 + 67 * 3 / 4) / 101) / 2)
    assert found["ABS"] == found["all_groups"]["ABS"]


def test_pickles_cannot_run_code(tmp_path):
    folder = _pickles(tmp_path)
    assert d3.read_pickles(str(folder))["groups"][1]["img_id"] == [2]

    class Harmful:
        def __reduce__(self):
            return subprocess.check_output, (["touch", str(tmp_path / "ran")],)

    (folder / "groups.pkl").write_bytes(pickle.dumps({0: Harmful()}))
    with pytest.raises(
        MetricError, match=r"groups.pkl cannot be read .*subprocess.check_output, expected plain values"
    ):
        d3.read_pickles(str(folder))
    assert not (tmp_path / "ran").exists()
    (folder / "groups.pkl").unlink()
    with pytest.raises(MetricError, match="groups.pkl does not exist"):
        d3.read_pickles(str(folder))


def test_files_of_different_versions_are_refused(tmp_path):
    folder, predictions = _release(tmp_path), _found(tmp_path)
    content = _content((2, 4))
    content["images"].append({"id": 9, "file_name": "9.jpg"})
    (folder / d3.PARTS["ABS"]).write_text(json.dumps(content))
    with pytest.raises(MetricError, match=r"lists 4 images and .* 3, or others: the files are of different versions"):
        d3.score(str(folder), predictions)
