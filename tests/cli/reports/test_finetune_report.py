"""The results of a fine-tuning: finetune.json, the table for a terminal, the HTML report with the errors drawn."""

import base64
import dataclasses
import json

import pytest
from PIL import Image

from glip_jax.cli.reports.finetune_report import Errors, render, table
from glip_jax.evaluation.average_precision import GroundTruthError, load_ground_truth
from glip_jax.evaluation.detection_errors import detection_errors
from glip_jax.evaluation.transfer import (
    CurvePoint,
    Interpolated,
    KeptSet,
    SeedResult,
    Transfer,
    over_seeds,
    split_result,
    summary,
)


def _row(image, category, bbox, score):
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two images: before, one of two cells is found; after, both and a <WBC> in the wrong place. A name has no box."""
    folder = tmp_path_factory.mktemp("set")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), (90, 90, 90)).save(folder / name)
    boxes = [(1, 7, [1, 2, 20, 10]), (1, 9, [30, 20, 20, 10]), (2, 7, [1, 2, 20, 10])]
    content = {
        "images": [{"id": i, "file_name": f"{name}.png", "height": 40, "width": 60} for i, name in enumerate("ab", 1)],
        "categories": [{"id": 7, "name": "cell"}, {"id": 8, "name": "gone"}, {"id": 9, "name": "<WBC>"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": k, "bbox": box} for i, (image, k, box) in enumerate(boxes, 1)
        ],
    }
    (folder / "test.json").write_text(json.dumps(content))
    truth = load_ground_truth(str(folder / "test.json"))
    before = [_row(1, 7, [1, 2, 20, 10], 0.6)]
    after = [*before, _row(2, 7, [1, 2, 20, 10], 0.9), _row(1, 9, [5, 25, 20, 10], 0.8)]
    found = split_result(truth, before, after)
    errors = Errors(detection_errors(truth, before), detection_errors(truth, after))
    with pytest.raises(GroundTruthError, match="no images"):
        split_result(truth, [_row(3, 7, [1, 2, 20, 10], 0.6)], [])
    return found, errors, folder


@pytest.fixture
def result(measured):
    runs = tuple(
        SeedResult(seed, 10, 20, {"AP": 0.1, "AP50": 0.2}, {"AP": 0.3, "AP50": value})
        for seed, value in ((3, 0.5), (30, 0.6), (300, 0.7))
    )
    return Transfer(
        "<cells>", "full", "base/run", "test", {"valid": measured[0], "test": measured[0]}, 100, 250, 4.5,
        curve=(CurvePoint(50, 0.2, 0.4), CurvePoint(100, 0.3, 0.5)), kept={"scenes": KeptSet("AP", 0.5, 0.4)},
        interpolation=tuple(Interpolated(s, 0.1 + 0.2 * s, {"scenes": 0.5 - 0.1 * s}) for s in (0.0, 0.5, 1.0)), runs=runs,
        notes=("10 % of train are valid",), commands=(("draws boxes", "glip-jax predict"),), settings={"seed": "0"},
    )  # fmt: skip


def test_finetune_json(result, measured):
    found = json.loads(json.dumps(summary(result)))
    assert found["split"] == "test" and found["zero_shot"]["AP50"] == pytest.approx(0.5 * 51 / 101)
    assert found["tuned"]["AP50"] == 0.5 and found["valid"]["tuned"] == found["test"]["tuned"] == found["tuned"]
    assert found["per_class"]["cell"] | {"zero_shot": 0} == {
        "images": 2, "boxes": 2, "zero_shot": 0, "tuned": {"AP": 1.0, "AP50": 1.0}, "threshold": None,
    }  # fmt: skip
    assert found["per_class"]["gone"]["tuned"] == {"AP": None, "AP50": None}
    assert found["seeds"]["10"]["AP50"]["tuned"] == pytest.approx({"mean": 0.6, "deviation": 0.1, "count": 3})
    only = summary(dataclasses.replace(result, split="valid", splits={"valid": measured[0]}, runs=()))
    assert only["test"] is None and only["tuned"] == only["valid"]["tuned"] and only["seeds"] == {}
    # All data last.
    assert [*over_seeds([*result.runs, result.runs[0]._replace(shots=0), result.runs[0]._replace(shots=1)])] == [
        1,
        10,
        0,
    ]


def test_the_table_for_a_terminal(result, measured):
    lines = table(result).splitlines()
    assert lines[0] == "<cells>, full: step 100 is the best on valid (250 steps, 4.5 minutes of training)"
    valid, test = (
        next(i for i, line in enumerate(lines) if line.startswith(f"{name}, %")) for name in ("valid", "test")
    )
    assert lines[valid + 1].startswith("all names") and not lines[valid + 2], "names are shown of the reported split"
    assert [line.split() for line in lines[test + 1 : test + 5]] == [
        ["all", "names", "25.2", "50.0", "+24.8", "25.2", "50.0", "+24.8", "2", "3"],
        ["cell", "50.5", "100.0", "+49.5", "50.5", "100.0", "+49.5", "2", "2"],
        ["gone", *["-"] * 6, "0", "0"],
        ["<WBC>", "0.0", "0.0", "+0.0", "0.0", "0.0", "+0.0", "1", "1"],
    ]
    text = " ".join(table(result).split())
    for part in (
        "scenes AP 50.0 40.0 -10.0 0.800",
        "10-shot 3 10.0 ±0.0 30.0 ±0.0 20.0 ±0.0 60.0 ±10.0",
        "0.5 20.0 45.0",
    ):
        assert part in text
    assert "note: 10 % of train are valid" in text
    assert "no evaluation on valid was better than the one before training" in table(
        dataclasses.replace(result, best_step=0)
    )
    names = [f"name {i}" for i in range(50)]
    numbers = measured[0].tuned
    many = measured[0]._replace(
        class_boxes={name: i for i, name in enumerate(names)}, class_images=dict.fromkeys(names, 1),
        **dict.fromkeys(
            ("zero_shot", "tuned"), numbers._replace(per_class=dict.fromkeys(names, 0.5), per_class_50=dict.fromkeys(names, 0.5))
        ),
    )  # fmt: skip
    text = table(dataclasses.replace(result, splits={"test": many}))
    assert "(10 more names are in finetune.json; shown are the 40 with most boxes)" in text
    assert "name 10 " in text and "name 9 " not in text


def test_the_report_draws_the_errors_and_escapes_names(result, measured, caplog):
    _, errors, folder = measured
    page = render(result, errors, str(folder))
    assert "<cells>" not in page and "&lt;cells&gt;" in page and "✗ &lt;WBC&gt;" in page
    assert page.count("<svg viewBox") == 2, "a false alarm, and the image where a <WBC> is missed"
    for part in (
        "Worst false alarms",
        "Worst misses",
        "New names against kept ones",
        "Recall by size",
        "glip-jax predict",
    ):
        assert part in page
    assert page.count(f"base64,{base64.b64encode(b'<?xml').decode()[:6]}") == 2, "two curves"
    without = render(dataclasses.replace(result, interpolation=(), curve=(), runs=(), kept={}), None, str(folder))
    assert "Worst" not in without and "New names against" not in without
    (folder / "a.png").rename(folder / "gone.png")
    with caplog.at_level("WARNING"):
        assert "<svg viewBox" not in render(result, errors, str(folder))
    (folder / "gone.png").rename(folder / "a.png")
    assert "a.png is not drawn" in caplog.text
