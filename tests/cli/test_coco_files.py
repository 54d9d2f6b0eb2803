"""`--coco`: what `predict`, `evaluate` and `label` write opens in pycocotools, in `score` and in `label --detections`."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from glip_jax.cli import coco_files
from glip_jax.cli.command_line import CommandLineError
from glip_jax.data import shards
from glip_jax.data.records import Record, boxes_array
from tests.run_job import run_job


def listing(**images):
    """Two images with a box each, as `write` takes them."""
    rows = {number: coco_files.result_rows(number, np.array([[1, 2, 10, 21]]), [0.5], [number]) for number in (1, 2)}
    entries = [{"id": number, "file_name": f"{number}.png", "height": 48, "width": 64} for number in (1, 2)]
    return [coco_files.DetectedImage(entry, rows[entry["id"]]) for entry in entries]


CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "Schaf, groß"}]


def read(path) -> Any:
    """The results as pycocotools reads them, with the annotation file beside them."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(coco_files.annotation_file(str(path)))).loadRes(str(path))


def test_pycocotools_reads_the_results_and_the_annotations(tmp_path):
    path = tmp_path / "new" / "found.json"
    coco_files.check_target(str(path), "images")
    coco_files.write(str(path), "images", CATEGORIES, listing())
    assert json.loads(path.read_text())[0] == {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20], "score": 0.5}
    found = read(path)
    assert [row["area"] for row in found.loadAnns(found.getAnnIds(imgIds=[2]))] == [200]
    assert found.loadCats([2])[0]["name"] == "Schaf, groß"
    full = json.loads(coco_files.annotation_file(str(path)).read_text())
    own = {"id": 2, "segmentation": [], "area": 200, "iscrowd": 0}
    assert full["annotations"][1] == own | json.loads(path.read_text())[1]
    assert sorted(file.name for file in path.parent.iterdir()) == ["found.json", "found_annotations.json"]


def test_what_stops_the_writing_leaves_the_files_of_before(tmp_path):
    path = tmp_path / "found.json"
    coco_files.write(str(path), "images", CATEGORIES, listing())
    before = path.read_bytes(), coco_files.annotation_file(str(path)).read_bytes()

    def broken():
        yield listing()[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        coco_files.write(str(path), "images", CATEGORIES, broken())
    assert (path.read_bytes(), coco_files.annotation_file(str(path)).read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_list_is_valid_and_noted(tmp_path, caplog):
    path = tmp_path / "none.json"
    coco_files.write(str(path), "images", CATEGORIES, [image._replace(rows=[]) for image in listing()])
    assert json.loads(path.read_text()) == []
    assert len(json.loads(coco_files.annotation_file(str(path)).read_text())["images"]) == 2
    assert "is an empty list, which pycocotools' loadRes cannot read" in caplog.text


@pytest.mark.parametrize(
    ("name", "folder", "files", "message"),
    [
        ("found.json", "images", ["1.png", "2.png", "3.png"], ""),
        ("found.json", "images", None, ""),
        ("found.json", "images", ["2.png"], "hold detections of other images, of images"),
        ("found.json", "elsewhere", ["1.png", "2.png"], "hold detections of other images, of images"),
        ("own.json", "images", None, "own.json exists and holds nothing that this job wrote"),
        ("found.txt", "images", None, "expected a name that ends in .json"),
        ("folder.json", "images", None, "is a folder"),
        ("own.json/found.json", "images", None, "cannot be written"),
    ],
)
def test_files_of_other_images_are_not_overwritten(tmp_path, name, folder, files, message):
    coco_files.write(str(tmp_path / "found.json"), "images", CATEGORIES, listing())
    (tmp_path / "own.json").write_text("[]")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(CommandLineError, match=message) if message else contextlib.nullcontext():
        coco_files.check_target(str(tmp_path / name), folder, files)


@pytest.mark.compiles
def test_predict_writes_what_predictions_json_says(trained, tmp_path, capsys):
    """Again after it was done: the same. A third image elsewhere: refused before anything is computed."""
    images, path = trained.scenes / "validation" / "images", tmp_path / "found.json"
    command = [images, f"--workdir={trained.workdir}", "--names=cat,dog", f"--out={tmp_path / 'out'}"]
    for _ in range(2):
        assert run_job("predict", [*command, "--threshold=0.05", f"--coco={path}"]) == 0
    content, found = json.loads((tmp_path / "out" / "predictions.json").read_text()), read(path)
    entries = {entry["file"].rpartition("/")[2]: entry for entry in content["images"]}
    boxes = 0
    for image in found.loadImgs(found.getImgIds()):
        entry = entries[image["file_name"]]
        rows = found.loadAnns(found.getAnnIds(imgIds=[image["id"]]))
        assert (image["height"], image["width"]) == (entry["height"], entry["width"])
        for row, own in zip(rows, entry["detections"], strict=True):
            x1, y1, x2, y2 = own["box"]
            assert row["bbox"] == pytest.approx([x1, y1, x2 - x1 + 1, y2 - y1 + 1], abs=0.011)
            assert found.loadCats([row["category_id"]])[0]["name"] == ["cat", "dog"][own["phrase"]]
            assert row["score"] == own["score"]
        boxes += len(rows)
    assert len(entries) == 2 and boxes > 2
    other = tmp_path / "other.png"
    Image.new("RGB", (96, 96)).save(other)
    capsys.readouterr()
    assert run_job("predict", [other, *command[1:3], f"--out={tmp_path / 'no'}", f"--coco={path}"]) == 2
    assert capsys.readouterr().err.startswith(f"predict: --coco={path}: ")
    assert not (tmp_path / "no").exists()


@pytest.mark.compiles
def test_evaluate_keeps_the_ids_and_score_gives_its_numbers(trained, tmp_path, capsys):
    path, out = tmp_path / "found.json", tmp_path / "out"
    command = [f"--config={trained.config}", f"--workdir={trained.workdir}", f"--out={out}", f"--coco={path}"]
    assert run_job("evaluate", command) == 0
    assert json.loads(path.read_text()) == json.loads((out / "detections_scenes.json").read_text()) != []
    annotations = trained.scenes / "validation" / "annotations.json"
    true, found = json.loads(annotations.read_text()), read(path)
    assert sorted(found.getImgIds()) == sorted(image["id"] for image in true["images"])
    assert {c["id"]: c["name"] for c in found.dataset["categories"]} == {c["id"]: c["name"] for c in true["categories"]}
    capsys.readouterr()
    assert run_job("score", ["coco", f"--annotations={annotations}", f"--predictions={path}"]) == 0
    numbers = json.loads((out / "evaluation.json").read_text())["sets"]["scenes"]["numbers"]
    assert json.loads(capsys.readouterr().out).items() >= {key: numbers[key] for key in ("AP", "AP50", "AR100")}.items()
    other = tmp_path / "other.json"
    other.write_text(
        json.dumps(
            {**true, "images": [{**image, "id": 9000 + image["id"]} for image in true["images"]], "annotations": []}
        )
    )
    assert run_job("score", ["coco", f"--annotations={other}", f"--predictions={path}"]) == 2
    assert "are of another image list" in capsys.readouterr().err
    only = "--config.evaluation.sets.scenes.kind=grounding"
    assert run_job("evaluate", [*command, only]) == 2
    assert (
        "results have categories, expected a set of kind detection, found scenes (grounding)" in capsys.readouterr().err
    )


@pytest.mark.compiles
@pytest.mark.parametrize("numbered", [True, False])
def test_label_reads_what_label_wrote(trained, tmp_path, numbered):
    """Two captions of one image; the boxes come back as the teacher of the same captions."""
    texts = ("two brown cats", "a red dog", "the dog by a cup of tea")
    files = sorted((trained.scenes / "validation" / "images").iterdir())
    shards.write(
        (
            Record(
                f"{index}", "caption", files[index % 2].read_bytes(), 96, 96, boxes_array(()), caption=text,
                file=files[index % 2].name, image_id=str(70 + index % 2) if numbered else "",
            )
            for index, text in enumerate(texts)
        ),
        tmp_path / "captions", name="cc",
    )  # fmt: skip
    command, path = (
        [tmp_path / "captions", f"--workdir={trained.workdir}", "--threshold=0.001"],
        tmp_path / "found.json",
    )
    assert run_job("label", [*command, f"--out={tmp_path / 'one'}", f"--coco={path}"]) == 0
    found = read(path)
    assert sorted(found.getImgIds()) == ([70, 71] if numbered else [1, 2])
    assert {each["name"] for each in found.dataset["categories"]} == {"brown cat", "red dog", "dog", "cup", "tea"}
    outside = [f"--detections={path}", f"--categories={coco_files.annotation_file(str(path))}", "--threshold=0"]
    assert run_job("label", [tmp_path / "captions", f"--out={tmp_path / 'two'}", *outside, "--nms=1"]) == 0
    one, two = (
        {record.id: record for record in (made[index] for index in range(len(made)))}
        for made in (shards.Shards(tmp_path / name) for name in ("one", "two"))
    )
    assert one.keys() == two.keys() == {"0", "1", "2"}
    # The image of the first and the last caption has the boxes of both, and each phrase takes those of its own category.
    for key in one:
        np.testing.assert_allclose(two[key].boxes, one[key].boxes, atol=0.02)
        assert two[key].spans == one[key].spans
    path.unlink()
    assert run_job("label", [*command, f"--out={tmp_path / 'one'}", f"--coco={path}"]) == 0, "of a finished folder"
    assert len(read(path).dataset["images"]) == 2
