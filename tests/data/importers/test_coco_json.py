"""Files of COCO's family as tools write them: import and evaluation accept, repair, count and refuse the same."""

import codecs
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from glip_jax.config import EvaluationSet
from glip_jax.data.importers.caption_files import open_caption_lines
from glip_jax.data.importers.coco import open_coco, rename_map
from glip_jax.data.importers.coco_json import ImagePaths
from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.mdetr import open_coco_captions, open_mdetr
from glip_jax.data.importers.readers import numbered_lines
from glip_jax.data.records import decode, encode
from glip_jax.data.shards import Shards
from glip_jax.evaluation.average_precision import GroundTruthError, load_ground_truth
from glip_jax.evaluation.recall import load_grounding
from tests.data.conftest import NAMES, coco_json, mdetr_json, records, saved, write_image
from tests.run_job import run_job

SIZES = [(24, 32)] * 4


def changed(data: dict, *changes: tuple[str, Any]) -> dict:
    """A copy with other values: ("annotations.0.bbox", value) of one item, ("annotations.*.bbox", value) of all, `...`: removed."""
    data = copy.deepcopy(data)
    for path, value in changes:
        key, number, field = path.split(".")
        for item in data[key] if number == "*" else [data[key][int(number)]]:
            if value is ...:
                del item[field]
            else:
                item[field] = value(item[field]) if callable(value) else value
    return data


TEXT_IDS = (("annotations.*.category_id", str), ("annotations.*.image_id", str), ("annotations.*.id", float))
CASES: list[tuple[tuple, dict[str, int]]] = [
    # What is repaired.
    (TEXT_IDS, {"box: category id as text or number, matched": 12, "annotation: image id as text or number, matched": 12}),
    ((("categories.*.id", str), ("annotations.*.category_id", float)), {"box: category id as text or number, matched": 12}),
    ((("images.*.id", float), ("annotations.*.id", ...)), {}),
    ((("images.0.height", None), ("images.1.width", ...)), {"image: listed size is no size, the image's own is used": 2}),
    ((("images.*.height", ...), ("images.*.width", ...)), {"image: no size listed, the image's own is used": 4}),
    ((("images.*.height", str), ("images.0.width", 32.0)), {"image: size listed as text": 4}),
    ((("images.0.height", 0), ("images.1.height", "x")), {"image: listed size is no size, the image's own is used": 2}),
    ((("annotations.*.bbox", lambda box: [str(v) for v in box]),), {"box: numbers as text": 12}),
    ((("annotations.*.iscrowd", "0"), ("annotations.0.iscrowd", False), ("annotations.1.iscrowd", None)), {}),
    ((("categories.0.name", 7),), {"category: name is a number, read as text": 1}),
    # What is dropped.
    ((("annotations.0.iscrowd", True), ("annotations.1.iscrowd", "1")), {"box: crowd": 2}),
    ((("annotations.0.iscrowd", [1]),), {"box: iscrowd neither 0 nor 1": 1}),
    ((("annotations.0.bbox", None), ("annotations.1.bbox", [])), {"box: not four numbers": 2}),
    ((("annotations.0.bbox", [3, 3, float("nan"), 5]), ("annotations.1.bbox", [3, 3, "inf", 5])),
     {"box: not finite": 2, "box: numbers as text": 1}),
    ((("annotations.0.category_id", None), ("annotations.1.category_id", [1])), {"box: category not listed": 2}),
    ((("annotations.0.image_id", "x"),), {"box: image not listed": 1}),
    ((("annotations.0.bbox", [3, 3, 0, 5]),), {"box: no area": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reasons"), CASES)
def test_import_and_evaluation_read_alike(tmp_path: Path, pictures: Path, changes: tuple, reasons: dict) -> None:
    path = saved(tmp_path, changed(coco_json(SIZES), *changes))
    source = open_coco(path, pictures)
    found = records(source)
    truth = load_ground_truth(str(path), EvaluationSet(str(path), str(pictures)))
    assert source.report.dropped + source.report.noted == reasons
    assert truth.left_out == reasons
    assert truth.prompts == source.names and len(found) == len(truth.content["images"]) == 4
    kept = [note for note in truth.content["annotations"] if not note["iscrowd"]]
    assert sum(len(record.boxes) for record in found) == len(kept) == 12 - sum(source.report.dropped.values())


@pytest.mark.parametrize("area", [None, "x", -1, ..., float("nan")])
def test_an_area_that_is_no_area_is_that_of_the_box(tmp_path, area):
    path = saved(tmp_path, changed(coco_json(SIZES), ("annotations.0.iscrowd", 0)))
    data = json.loads(path.read_text())
    data["annotations"][0] |= {} if area is ... else {"area": area}
    truth = load_ground_truth(str(saved(tmp_path, data)))
    assert truth.content["annotations"][0]["area"] == 30
    assert ("box: area unusable, width x height taken" in truth.left_out) == (area not in (None, ...))


def test_categories_of_an_evaluation_are_those_of_the_import(tmp_path, pictures):
    data = coco_json(SIZES)
    data["categories"] = [
        {**item, "supercategory": "pets" if item["id"] % 2 else "things"} for item in data["categories"]
    ]
    data["categories"] += [
        {"id": 0, "name": "all", "supercategory": "none"}, {"id": 20, "name": "things", "supercategory": "all"},
        {"id": 21, "name": "pets", "supercategory": "things"}, {"id": 22, "name": "__background__", "supercategory": None},
        {"id": 23, "name": "unused", "supercategory": "all"},
    ]  # fmt: skip
    path = saved(tmp_path, data)
    source, truth = open_coco(path, pictures), load_ground_truth(str(path))
    assert source.names == truth.prompts == (*NAMES, "unused")
    assert truth.left_out == {"category: background, left out": 1, "category: heading without boxes, left out": 3}
    # One class, whose heading has the name of the class.
    one = {
        "categories": [
            {"id": 0, "name": "brick", "supercategory": "none"},
            {"id": 1, "name": "brick", "supercategory": "brick"},
        ]
    }
    path = saved(tmp_path, changed(data, ("annotations.*.category_id", 1)) | one)
    assert open_coco(path, pictures).names == load_ground_truth(str(path)).prompts == ("brick",)
    # A background that is a class of objects can be named.
    renamed = {"__background__": "backdrop", "id:20": "thing"}
    assert open_coco(saved(tmp_path, data), pictures, rename=renamed).names[-3:] == ("thing", "backdrop", "unused")


DOUBLE = [{"id": 1, "name": "car"}, {"id": 2, "name": "car"}, {"id": 3, "name": "bus"}]


@pytest.mark.parametrize(
    ("rename", "merge", "names"),
    [
        ({"1": "car", "2": "truck"}, False, ("car", "truck", "bus")),
        ({"id:2": "truck"}, False, ("car", "truck", "bus")),
        ({"1": "vehicle", "2": "vehicle"}, False, ("vehicle", "bus")),
        ({"1": "vehicle", "2": "vehicle", "bus": "vehicle"}, False, ("vehicle",)),
        ({}, True, ("car", "bus")),
        ({"car": "automobile"}, True, ("automobile", "bus")),
        ({}, False, "categories 1 and 2 are both named 'car': give --merge-names .* by id with --names"),
        ({"car": "automobile"}, False, "both named 'automobile'"),
        ({"bus": "car", "2": "truck"}, False, "categories 1 and 3 are both named 'car'"),
        ({"9": "x"}, True, "'9', which is the name or id of no category"),
    ],
)
def test_categories_of_one_name_can_be_told_apart_or_taken_together(tmp_path, pictures, rename, merge, names):
    data = changed(coco_json(SIZES), ("annotations.*.category_id", lambda number: number % 3 + 1)) | {
        "categories": DOUBLE
    }
    path = saved(tmp_path, data)
    if isinstance(names, str):
        with pytest.raises(SourceError, match=names):
            open_coco(path, pictures, rename=rename, merge_names=merge)
        return
    source = open_coco(path, pictures, rename=rename, merge_names=merge)
    truth = load_ground_truth(str(path), EvaluationSet(str(path), "", rename, merge_names=merge))
    assert source.names == truth.prompts == names and sum(len(record.boxes) for record in records(source)) == 12
    assert len(truth.content["categories"]) == len(names)
    # Digits are names before they are ids.
    digits = {"categories": [{"id": i + 1, "name": str(i)} for i in range(3)]}
    assert open_coco(saved(tmp_path, data | digits), pictures, rename={"1": "one"}).names == ("0", "one", "2")


def test_image_files_are_found_as_tools_write_them(tmp_path, pictures):
    (pictures / "a b").mkdir()
    (pictures / "img3.png").rename(pictures / "a b" / "img3.png")
    names = [
        "images\\img0.png",
        "..\\..\\tool\\media\\upload\\4\\img1.png",
        "/data/upload/4/img2.png",
        "C:\\me\\a b\\img3.png",
    ]
    urls = ["./img0.png", "x/../img1.png", "http://host/data/img2.png?size=3", "/data/local-files/?d=a%20b/img3.png"]
    found = ["img0.png", "img1.png", "img2.png", "a b/img3.png"]
    for listed in (names, urls):
        data, phrases, captions = coco_json(SIZES), mdetr_json(SIZES), mdetr_json(SIZES)
        for content in (data, phrases, captions):
            for item, name in zip(content["images"], listed, strict=True):
                item["file_name"] = name
        captions["annotations"] = [{"id": i, "image_id": i, "caption": "a dog"} for i in range(1, 5)]
        lines = tmp_path / "lines.jsonl"
        lines.write_text("".join(json.dumps({"image": name, "caption": "a dog"}) + "\n" for name in listed))
        path = saved(tmp_path, data)
        sources = [
            open_coco(path, pictures), open_mdetr(saved(tmp_path, phrases, "b.json"), pictures),
            open_coco_captions(saved(tmp_path, captions, "c.json"), pictures), open_caption_lines(lines, pictures),
        ]  # fmt: skip
        for source in sources[: 4 if listed is names else 3]:  # an address needs --files in lines of captions
            assert len(records(source)) == 4 and not source.report.dropped
        truth = load_ground_truth(str(path), EvaluationSet(str(path), str(pictures)))
        assert [item["file_name"] for item in truth.content["images"]] == found
        phrases = load_grounding(str(tmp_path / "b.json"), EvaluationSet("", str(pictures), kind="grounding"))
        assert [image.entry["file_name"] for image in phrases.images] == found


def test_a_path_neither_leaves_the_folder_nor_stands_for_two_images(tmp_path, pictures):
    paths = ImagePaths(pictures)
    write_image(tmp_path / "outside.png", 24, 32, 9)
    assert paths.find("../outside.png") == "outside.png" and paths.find("img0.png") == "img0.png"
    with pytest.raises(SourceError, match=r"'img0.png' and 'a/img0.png' would both be read from 'img0.png'"):
        paths.find("a/img0.png")
    data = changed(coco_json(SIZES), ("images.0.file_name", "a/img1.png"))
    with pytest.raises(SourceError, match="would both be read"):
        open_coco(saved(tmp_path, data), pictures)
    with pytest.raises(GroundTruthError, match=r"would both be read.*set evaluation\.sets\.NAME\.images"):
        load_ground_truth(str(tmp_path / "a.json"), EvaluationSet("", str(pictures)))


def test_corners_are_seen_without_sizes_too(tmp_path, pictures):
    corners = (("annotations.*.bbox", [12, 8, 20, 20]), ("images.*.height", None))
    path = saved(tmp_path, changed(coco_json(SIZES), *corners))
    with pytest.raises(SourceError, match="corners.*--boxes=xyxy"):
        records(open_coco(path, pictures))
    with pytest.raises(GroundTruthError, match=r"corners.*evaluation\.sets\.me\.boxes"):
        load_ground_truth(str(path), EvaluationSet(str(path), str(pictures)), "me")
    truth = load_ground_truth(str(path), EvaluationSet(str(path), str(pictures), boxes="xyxy"))
    assert truth.content["annotations"][0]["bbox"] == [12, 8, 8, 12]


LOST = [
    ([("annotations.*.iscrowd", 1)], [], "none of 12 boxes is kept; dropped: box: crowd 12 .*--crowds=keep"),
    ([("annotations.*.iscrowd", 1)], ["--crowds=drop"], "none of 12 boxes is kept"),
    ([("annotations.*.iscrowd", 1)], ["--crowds=keep"], 12),
    ([(f"annotations.{i}.iscrowd", 1) for i in range(8)], [], "8 of 12 boxes .* box: crowd .*--allow-drops"),
    ([(f"annotations.{i}.iscrowd", 1) for i in range(8)], ["--crowds=drop"], 4),
    ([(f"annotations.{i}.iscrowd", 1) for i in range(5)], [], 7),
    ([(f"annotations.{i}.bbox", None) for i in range(7)], [], "7 of 12 boxes .* box: not four numbers"),
    ([(f"annotations.{i}.bbox", None) for i in range(7)], ["--allow-drops"], 5),
    ([(f"images.{i}.file_name", f"no{i}.png") for i in range(3)], [], "3 of 4 images .* image: file missing .*--images"),
    ([("images.*.height", 25)], [], "no record came out .*image: size differs 4 .*use the images that were annotated"),
    ([("annotations.*.bbox", [90, 90, 5, 5])], [], "none of 12 boxes is kept; dropped: box: outside the image"),
    ([("annotations.*.category_id", None)], [], "12 of 12 boxes have a category that is not listed"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "outcome"), LOST)
def test_an_import_that_loses_most_boxes_is_refused(tmp_path, pictures, capsys, changes, options, outcome):
    path, out = saved(tmp_path, changed(coco_json(SIZES), *changes)), tmp_path / "out"
    code = run_job("data", ["coco", str(path), f"--images={pictures}", f"--out={out}", "--processes=1", *options])
    printed = capsys.readouterr()
    if isinstance(outcome, int):
        assert code == 0 and Shards(out).manifest.boxes == outcome
        return
    (line,) = printed.err.strip().splitlines()
    assert code == 2 and not out.exists()
    assert re.search(outcome, line), line


def test_an_evaluation_that_loses_most_boxes_is_refused(tmp_path):
    data = coco_json(SIZES)
    path = saved(tmp_path, changed(data, *[(f"annotations.{i}.iscrowd", 1) for i in range(8)]))
    with pytest.raises(GroundTruthError, match=r"8 of 12 boxes.*evaluation\.sets\.x\.crowds=keep"):
        load_ground_truth(str(path), EvaluationSet("", ""), "x")
    for sets, crowds in (
        (EvaluationSet("", "", crowds="drop"), 8),
        (EvaluationSet("", "", crowds="keep"), 0),
        (EvaluationSet("", "", allow_drops=True), 8),
    ):
        truth = load_ground_truth(str(path), sets)
        assert sum(note["iscrowd"] for note in truth.content["annotations"]) == crowds
    phrases = saved(tmp_path, changed(mdetr_json(SIZES), ("annotations.*.iscrowd", 1)))
    with pytest.raises(GroundTruthError, match=r"none of 8 boxes is kept; dropped: box: crowd 8"):
        load_grounding(str(phrases), EvaluationSet("", "", kind="grounding"))
    assert load_grounding(str(phrases), EvaluationSet("", "", kind="grounding", crowds="keep")).images[0].phrases


def test_a_byte_order_mark_is_skipped_and_utf_16_is_said(tmp_path, pictures):
    text = json.dumps(coco_json(SIZES))
    path, names, lines = (tmp_path / name for name in ("a.json", "n.json", "l.txt"))
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    names.write_bytes(codecs.BOM_UTF8 + b'{"dog": "puppy"}')
    lines.write_bytes(codecs.BOM_UTF8 + b"a\nb")
    assert open_coco(path, pictures, rename=rename_map(names)).names[1] == load_ground_truth(
        str(path), EvaluationSet("", "", {"dog": "puppy"})
    ).prompts[1] == "puppy"  # fmt: skip
    assert [line for _, line in numbered_lines(lines)] == [b"a", b"b"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes(text.encode(encoding))
        names.write_bytes('{"dog": "puppy"}'.encode(encoding))
        for read in (lambda: open_coco(path, pictures), lambda: rename_map(names), lambda: list(numbered_lines(names))):
            with pytest.raises(SourceError, match=f"is text in {encoding[:6].upper()}: save it as UTF-8"):
                read()
        with pytest.raises(GroundTruthError, match="save it as UTF-8"):
            load_ground_truth(str(path))


def test_a_record_of_a_caption_keeps_its_file_and_image_id(tmp_path, pictures):
    data = mdetr_json(SIZES)
    data["annotations"] = [{"id": 7, "image_id": 2, "caption": "a dog"}]
    (record,) = records(open_coco_captions(saved(tmp_path, data), pictures))
    assert (decode(encode(record)).file, decode(encode(record)).image_id) == ("img1.png", "2")
    (tmp_path / "l.jsonl").write_text('{"image": "x\\\\img3.png", "caption": "a dog"}\n')
    (record,) = records(open_caption_lines(tmp_path / "l.jsonl", pictures))
    assert (record.id, record.file, record.image_id) == ("1", "img3.png", "")
