"""Captions in COCO's family of JSON: MDETR's format with boxes of phrases, COCO's captions without."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data.importers.entry import ImportSource, SourceError, make_record
from glip_jax.data.importers.mdetr import MIXED_FOLDERS, folders_of, open_coco_captions, open_mdetr
from glip_jax.data.records import Record
from tests.data.conftest import CAPTION, mdetr_json, saved

SIZES = [(24, 32), (24, 32)]


def records(opened: ImportSource) -> list[Record]:
    done = [make_record(entry, opened.images, opened.report) for entry in opened.entries]
    return [record for record in done if record is not None]


def test_captions_and_spans(tmp_path: Path, pictures: Path) -> None:
    data = mdetr_json(SIZES)
    data["annotations"][0]["tokens"] = [[0, 5]]  # takes precedence over tokens_positive
    data["annotations"].append({"id": 9, "image_id": 2, "bbox": [9, 9, 4, 4], "tokens_positive": [[2, 5], [15, 18]]})
    # The order of the lists, and of what is in them, does not matter.
    data = {key: data[key] for key in ("annotations", "categories", "images")}
    opened = open_mdetr(saved(tmp_path, data), pictures)
    assert (opened.names, opened.count) == ((), 2)
    first, second = records(opened)
    assert (first.id, first.kind, first.caption, first.provenance) == ("1", "grounding", CAPTION, "a.json")
    assert first.boxes.tolist() == [[2, 3, 7, 7], [3, 3, 9, 8]]
    assert first.spans == (((0, 5),), ((2, 5),))
    assert second.boxes.tolist()[2] == [9, 9, 12, 12]
    assert second.spans == (((15, 18), (23, 28)), ((2, 5),), ((2, 5), (15, 18)))
    assert not opened.report.dropped
    assert opened.report.kept["boxes"] == 5


@pytest.mark.parametrize(
    ("spans", "reasons"),
    [
        ([[1, 2]], {"span: to no token": 1, "box: no span left": 1}),
        ([[2, 999]], {"span: beyond the caption": 1, "box: no span left": 1}),
        ([[len(CAPTION) - 4, len(CAPTION) + 1], [2, 5]], {"span: beyond the caption": 1}),
        ([[-1, 5], [2, 5]], {"span: beyond the caption": 1}),
        ([[5, 2], [2, 5]], {"span: to no token": 1}),
        ([[15, -1], [2, 5]], {"span: beyond the caption": 1}),
        ([[2], [2, 5]], {"span: not two integers": 1}),
        ([[2, 5.0], [2, 5]], {"span: not two integers": 1}),
        ([], {"box: no span": 1}),
        (None, {"box: no span": 1}),
        ("2,5", {"box: no span": 1}),
    ],
)
def test_invalid_spans_are_counted(tmp_path: Path, pictures: Path, spans: Any, reasons: dict) -> None:
    data = mdetr_json([(24, 32)])
    data["annotations"][0]["tokens_positive"] = spans
    path = saved(tmp_path, data)
    opened = open_mdetr(path, pictures)
    (record,) = records(opened)
    assert len(record.boxes) == 2 - any(reason.startswith("box") for reason in reasons)
    assert opened.report.dropped == reasons
    assert "annotation 1 of image 1" in next(iter(opened.report.first.values()))
    with pytest.raises(SourceError, match=next(iter(reasons))):
        records(open_mdetr(path, pictures, strict=True))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"bbox": [100, 3, 5, 5]}, {"box: outside the image": 1}),
        ({"bbox": [3, 3, 1, 5]}, {"box: no area": 1}),
        ({"bbox": [3, 3, 1e300, 5]}, {}),  # cut at the edge
        ({"bbox": [3, 3, 5, "x"]}, {"box: not four numbers": 1}),
        ({"iscrowd": 1}, {"box: crowd": 1}),
        ({"image_id": 77}, {"box: image not listed": 1}),
    ],
)
def test_invalid_boxes_are_counted(tmp_path: Path, pictures: Path, change: dict, reasons: dict) -> None:
    data = mdetr_json(SIZES)
    data["annotations"][1].update(change)
    opened = open_mdetr(saved(tmp_path, data), pictures)
    assert [len(record.boxes) for record in records(opened)] == [2 - len(reasons), 2]
    assert opened.report.dropped == reasons
    assert "annotation 2" in next(iter(opened.report.first.values()))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_infinity_are_counted(tmp_path: Path, pictures: Path, value: float) -> None:
    data = mdetr_json(SIZES)
    data["annotations"][1]["bbox"][2] = value
    opened = open_mdetr(saved(tmp_path, data), pictures)
    assert [len(record.boxes) for record in records(opened)] == [1, 2]
    ((reason, count),) = opened.report.dropped.items()
    assert reason in ("box: not finite", "box: not four numbers")
    assert count == 1


def test_invalid_captions_are_counted(tmp_path: Path, pictures: Path) -> None:
    data = mdetr_json(SIZES)
    for caption, reason in (("  ", "image: caption empty"), (5, "image: caption no text")):
        data["images"][0]["caption"] = caption
        opened = open_mdetr(saved(tmp_path, data), pictures)
        assert [record.id for record in records(opened)] == ["2"]
        assert opened.report.dropped[reason] == 1
        assert sum(n for what, n in opened.report.dropped.items() if what.startswith("box")) == 2


def test_folders_of_the_mixed_file(tmp_path: Path, pictures: Path) -> None:
    data = mdetr_json(SIZES)
    for image, source in zip(data["images"], ("coco", "vg")):
        image["data_source"] = source
        place = pictures / MIXED_FOLDERS[source]
        place.mkdir(parents=True)
        (pictures / image["file_name"]).rename(place / image["file_name"])
    path = saved(tmp_path, data)
    assert len(records(open_mdetr(path, pictures, folders=MIXED_FOLDERS))) == 2
    assert open_mdetr(path, pictures, folders=MIXED_FOLDERS | {"vg": ""}).entries
    assert not records(open_mdetr(path, pictures))
    with pytest.raises(SourceError, match="image 2 has data_source 'vg', expected one of coco"):
        open_mdetr(path, pictures, folders={"coco": "train2014"})
    assert folders_of("") is None
    assert folders_of("mixed") == MIXED_FOLDERS
    assert folders_of("coco=train2014,vg=") == {"coco": "train2014", "vg": ""}
    with pytest.raises(SourceError, match="--folders=vg: expected mixed"):
        folders_of("vg")


def test_boxes_that_seem_to_be_xyxy_are_refused(tmp_path: Path, pictures: Path) -> None:
    data = mdetr_json(SIZES)
    data["annotations"] = [
        {"id": k, "image_id": 1 + k % 2, "bbox": [10 + k, 12, 20 + k, 22], "tokens_positive": [[2, 5]]}
        for k in range(10)
    ]
    path = saved(tmp_path, data)
    with pytest.raises(SourceError, match="bbox seems to hold corners.*--boxes=xyxy"):
        records(open_mdetr(path, pictures))
    first, _ = records(open_mdetr(path, pictures, boxes="xyxy"))
    assert first.boxes[0].tolist() == [10, 12, 19, 21]


def changed(path: list, value: Any) -> dict:
    """The valid file with one value replaced, or removed for the value `...`."""
    data: Any = copy.deepcopy(mdetr_json(SIZES))
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "a.json is not JSON"),
        (json.dumps(mdetr_json(SIZES))[:-30], "a.json is not JSON"),
        ("[]", "holds a list, expected an object"),
        (changed(["images"], ...), "expected a list under 'images', found nothing"),
        (changed(["annotations"], {}), "expected a list under 'annotations', found dict"),
        (changed(["images"], []), "'images' is empty"),
        (changed(["images", 0], 5), r"images\[0\] is 5, expected an object"),
        (changed(["images", 1, "caption"], ...), r"images\[1\] lacks caption"),
        (changed(["images", 1, "file_name"], ""), "image 2 has the file name ''"),
        (changed(["images", 1, "id"], 1), "the id 1 occurs twice in images"),
        (changed(["images", 1, "id"], [1]), r"images\[1\] has the id \[1\]"),
        (changed(["annotations", 1, "id"], 1), "the id 1 occurs twice in annotations"),
        (changed(["annotations", 1, "image_id"], ...), r"annotations\[1\] lacks image_id"),
        (changed(["annotations", 1, "bbox"], ...), r"annotations\[1\] lacks bbox"),
    ],
)
def test_errors_of_the_whole_file_are_refused(tmp_path: Path, pictures: Path, data: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_mdetr(saved(tmp_path, data), pictures)


def test_coco_captions_give_one_entry_each(tmp_path: Path, pictures: Path) -> None:
    images = [{"id": i + 5, "file_name": f"img{i}.png", "height": 24, "width": 32} for i in range(3)]
    notes = [(5, 1, "a dog "), (6, 2, "the cat"), (5, 3, "a small dog"), (77, 4, "x"), (5, 6, 3), (6, 7, " ")]
    data = {"images": images, "annotations": [{"image_id": i, "id": k, "caption": text} for i, k, text in notes]}
    opened = open_coco_captions(saved(tmp_path, data), pictures)
    found = records(opened)
    assert [(record.id, record.kind, record.caption) for record in found] == [
        ("5#1", "caption", "a dog"), ("5#3", "caption", "a small dog"), ("6#2", "caption", "the cat"),
    ]  # fmt: skip
    assert opened.report.dropped == {
        "image: of a caption is not listed": 1, "image: without caption": 1, "image: caption no text": 1, "image: caption empty": 1,
    }  # fmt: skip
    del data["annotations"][0]["caption"]
    with pytest.raises(SourceError, match=r"annotations\[0\] lacks caption"):
        open_coco_captions(saved(tmp_path, data), pictures)
