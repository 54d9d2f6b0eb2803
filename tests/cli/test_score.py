"""The job `score`: one line of JSON with the official numbers, and one message for what cannot be scored."""

import json
from pathlib import Path

import pytest

from glip_jax.__main__ import main
from glip_jax.cli import environment
from glip_jax.evaluation.metrics.d3 import PARTS
from glip_jax.io import gcs

MADE = Path(__file__).parents[1] / "fixtures/eval_parity"
FILES = {
    "coco": (MADE / "coco_ignore/gt_ignore_test.json", MADE / "coco_ignore/dt_ignore_test.json"),
    "lvis": (MADE / "lvis_made/annotations.json", MADE / "lvis_made/predictions.json"),
    "lvis-fixed": (MADE / "lvis_made/annotations.json", MADE / "lvis_made/predictions.json"),
    "d3": (MADE / "coco_ignore/gt_ignore_test.json", MADE / "coco_ignore/dt_ignore_test.json"),
    "flickr": (MADE / "flickr_made", MADE / "flickr_made/predictions.json"),
    "refexp": (MADE / "refexp_made/annotations.json", MADE / "refexp_made/predictions.json"),
    "grefcoco": (MADE / "grefcoco_made/annotations.json", MADE / "grefcoco_made/predictions.json"),
    "omnilabel": (MADE / "omnilabel_8357/8357.json", MADE / "omnilabel_8357/predictions_perfect.json"),
}


FILES["absence"] = FILES["grefcoco"]
ONCE = [metric for metric in FILES if metric not in ("lvis-fixed", "absence")]  # they read as others do
OF_IMAGES = [metric for metric in ONCE if metric != "flickr"]


@pytest.fixture(autouse=True)
def _libraries(monkeypatch):
    """The versions of all libraries are looked up once a job, which takes longer than most of these scores."""
    monkeypatch.setattr(environment, "mismatches", list)


def _score(metric, annotations, predictions, *flags):
    return main(["score", metric, f"--annotations={annotations}", f"--predictions={predictions}", *flags])


def _refused(capsys, code):
    """The one line on stderr of a job that refuses its input (notes left out)."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2 and not out and len(lines) == 1, (code, out, err)
    return lines[0]


@pytest.mark.parametrize(("metric", "flags", "expected"), [
    ("coco", [], {"AR1": 0.0}),
    ("lvis", [], ("lvis_made", "standard", "300")),
    ("lvis", ["--top=3"], ("lvis_made", "standard", "3")),
    ("lvis-fixed", ["--top=10"], ("lvis_made", "fixed", "10")),
    ("flickr", [], ("flickr_made",)),
    ("refexp", [], ("refexp_made", "official_giou")),
    ("refexp", ["--overlap=iou"], ("refexp_made", "same_evaluator_with_iou")),
    ("grefcoco", [], ("grefcoco_made", "official_giou", "0.7")),
    ("grefcoco", ["--overlap=iou", "--threshold=0.5"], ("grefcoco_made", "same_evaluator_with_iou", "0.5")),
    ("omnilabel", [], {"AP categ": 1.0, "AP descr": 1.0}),
    ("d3", [], {"PRES": -1.0}),
    ("absence", ["--threshold=0.35"], {"images": 64}),
])  # fmt: skip
def test_prints_one_line_of_json(capsys, metric, flags, expected):
    assert _score(metric, *FILES[metric], *flags) == 0
    found = json.loads(capsys.readouterr().out)  # more than one line is no JSON
    if isinstance(expected, tuple):
        folder, *keys = expected
        expected = json.loads((MADE / folder / "expected.json").read_text())
        for key in keys:
            expected = expected[key]
    assert {key: found[key] for key in expected} == expected
    assert found["protocol"]["metric"] == metric


@pytest.mark.parametrize("metric", ONCE)
def test_missing_and_broken_files(tmp_path, capsys, metric):
    annotations, predictions = FILES[metric]
    assert "nothing.json" in _refused(capsys, _score(metric, annotations, tmp_path / "nothing.json"))
    assert "nothing" in _refused(capsys, _score(metric, tmp_path / "nothing", predictions))
    half = tmp_path / "half.json"
    half.write_bytes(predictions.read_bytes()[: predictions.stat().st_size // 2])
    assert "half.json" in _refused(capsys, _score(metric, annotations, half))
    half.write_text('"text"')
    assert "half.json" in _refused(capsys, _score(metric, annotations, half))


def _changed(folder, path, change):
    """A copy of a JSON file to which `change` is applied."""
    content = json.loads(path.read_text())
    content = change(content) or content
    (folder / "changed.json").write_text(json.dumps(content))
    return folder / "changed.json"


def _first(content):
    """The first row of a file of predictions."""
    return content[0] if isinstance(content, list) else next(iter(content.values()))


def _without_number(content, value=float("nan")):
    """Puts `value` in place of the first score; of Flickr's boxes, which have none, of the first coordinate."""
    row = _first(content)
    if "score" in row:
        row["score"] = value
    elif "scores" in row:
        row["scores"][0] = value
    else:
        next(boxes for boxes in row["boxes"] if boxes)[0][0] = value


@pytest.mark.parametrize("metric", ONCE)
def test_numbers_that_are_none(tmp_path, capsys, metric):
    annotations, predictions = FILES[metric]
    message = _refused(capsys, _score(metric, annotations, _changed(tmp_path, predictions, _without_number)))
    assert "nan" in message.lower() and "finite" in message


@pytest.mark.parametrize("metric", ["coco", "flickr", "refexp", "omnilabel"])
@pytest.mark.parametrize("value", ["0.5", True])
def test_text_and_true_are_no_numbers(tmp_path, capsys, metric, value):
    """One metric of each reader of predictions."""
    annotations, predictions = FILES[metric]
    changed = _changed(tmp_path, predictions, lambda content: _without_number(content, value))
    assert f"{value!r}" in (message := _refused(capsys, _score(metric, annotations, changed))) and "finite" in message


@pytest.mark.parametrize("metric", ["coco", "lvis", "d3", "omnilabel"])
def test_predictions_of_another_image_list(tmp_path, capsys, metric):
    annotations, predictions = FILES[metric]
    changed = _changed(tmp_path, predictions, lambda content: [row | {"image_id": 123456} for row in content])
    message = _refused(capsys, _score(metric, annotations, changed))
    assert "123456" in message and "another image list" in message


@pytest.mark.parametrize("metric", OF_IMAGES)
def test_one_image_with_and_without_a_detection(tmp_path, capsys, metric):
    truth, found = (json.loads(path.read_text()) for path in FILES[metric])
    first = str(truth["annotations"][0]["image_id"])
    truth["images"] = [image for image in truth["images"] if str(image["id"]) == first]
    truth["annotations"] = [box for box in truth["annotations"] if str(box["image_id"]) == first]
    own, none = [], []
    if isinstance(found, dict):
        own, none = {first: found[first]}, {first: {"boxes": [], "scores": []}}
    else:
        own = [row for row in found if str(row["image_id"]) == first]
    for rows in (own, none):
        for name, content in (("true", truth), ("found", rows)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert _score(metric, tmp_path / "true.json", tmp_path / "found.json") == 0
        assert json.loads(capsys.readouterr().out)["protocol"]["metric"] == metric


@pytest.mark.parametrize("metric", OF_IMAGES)
def test_ids_that_occur_twice(tmp_path, capsys, metric):
    annotations, predictions = FILES[metric]
    twice = _changed(tmp_path, annotations, lambda content: content["images"].append(content["images"][0]))
    assert "twice" in _refused(capsys, _score(metric, twice, predictions))


@pytest.mark.parametrize("metric", OF_IMAGES)
def test_image_ids_as_text_find_their_numbers(tmp_path, capsys, metric):
    annotations, predictions = FILES[metric]
    assert _score(metric, annotations, predictions) == 0
    wanted = json.loads(capsys.readouterr().out)

    def as_text(content):
        for image in content["images"]:
            image["id"] = str(image["id"])

    assert _score(metric, _changed(tmp_path, annotations, as_text), predictions) == 0
    assert json.loads(capsys.readouterr().out) == wanted


@pytest.mark.parametrize(("argv", "message"), [
    (["coco", "--annotations=a.json"], "no --predictions"),
    (["cocos", "--annotations=a.json"], "invalid choice 'cocos'"),
    (["coco", "--annotations=a", "--predictions=b", "--overlap=iou"], "--overlap is a flag of refexp, grefcoco, not of coco"),
    (["coco", "--annotations=a", "--prediction=b"], "did you mean --predictions"),
    (["coco", "--annotations=http://a.json", "--predictions=b"], "download it first"),
    (["lvis", f"--annotations={FILES['lvis'][0]}", f"--predictions={FILES['lvis'][1]}", "--top=0"], "top=0: expected 1 to"),
])  # fmt: skip
def test_mistaken_commands(capsys, argv, message):
    assert message in _refused(capsys, main(["score", *argv]))


@pytest.mark.slow
def test_files_in_a_bucket(tmp_path, capsys, running, monkeypatch):
    """Each metric with both files there, LVIS with a folder of predictions, and D3 with the folder of its files."""
    bucket = running.fresh(monkeypatch, tmp_path / "cache", timeout=5)
    gcs.upload_files({str(p.relative_to(MADE)): p for p in MADE.rglob("*") if p.is_file()}, bucket, "README.md")
    for metric, files in FILES.items():
        there = [f"{bucket}/{file.relative_to(MADE)}" for file in files]
        assert _score(metric, *files) == 0
        wanted = json.loads(capsys.readouterr().out)
        assert _score(metric, *there) == 0
        assert json.loads(capsys.readouterr().out) == wanted, metric
    rows = json.loads(FILES["lvis"][1].read_text())
    folder = {}
    for key in (0, 1):
        folder[f"{key}.json"] = tmp_path / f"{key}.json"
        folder[f"{key}.json"].write_text(json.dumps(rows[key * 70 : key * 70 + 70]))
    gcs.upload_files(folder, f"{bucket}/chunks", "1.json")
    assert _score("lvis", FILES["lvis"][0], f"{bucket}/chunks") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["detections"] == len(rows)
    names = {name: FILES["d3"][0] for name in PARTS.values()}
    gcs.upload_files(names, f"{bucket}/d3_json", PARTS["FULL"])
    assert _score("d3", f"{bucket}/d3_json", FILES["d3"][1]) == 0
    assert json.loads(capsys.readouterr().out)["PRES"] > 0
    assert "nothing.json" in _refused(capsys, _score("coco", f"{bucket}/nothing.json", FILES["coco"][1]))
