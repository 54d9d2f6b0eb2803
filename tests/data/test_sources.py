"""Importers: single faults are counted by reason, faults of the file stop with one clear line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data import sources
from glip_jax.data.sources import SourceError
from tests.data.conftest import CAPTION, NAMES, coco_json, mdetr_json, write_image

SIZE = [(24, 32)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        write_image(folder / f"img{i}.png", 24, 32, i)
    return folder


def saved(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "a.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_boxes_names_and_ids(tmp_path: Path, pictures: Path) -> None:
    data = coco_json([(24, 32), (24, 32)])
    data["annotations"] = data["annotations"][:3]
    data["annotations"][2]["bbox"] = [20.5, -4, 100, 10]
    data["categories"].insert(0, {"id": 0, "name": "__background__"})
    data["categories"].reverse()
    data["images"][1]["neg_category_ids"] = [2, 5]
    source = sources.coco(saved(tmp_path, data), pictures, rename={"dog": "small dog"})
    assert source.names == ("person", "small dog", *NAMES[2:])
    first, second = source.records
    assert (first.id, first.kind, first.height, first.width) == ("1", "detection", 24, 32)
    # x + w - 1, clipped to the last pixel.
    assert first.boxes.tolist() == [[2, 3, 7, 7], [3, 3, 9, 8], [20.5, 0, 31, 5]]
    assert first.categories == (0, 1, 2)
    assert first.known_absent is None
    assert second.boxes.shape == (0, 4)
    assert second.known_absent == ("small dog", "cat_(animal)")
    assert source.report.kept == {"images": 2, "boxes": 3}
    assert not source.report.dropped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [100, 3, 5, 5]}, "box: outside the image"),
        ({"bbox": [-9, 3, 5, 5]}, "box: outside the image"),
        ({"bbox": [3, 3, 1, 5]}, "box: no area"),
        ({"bbox": [3, 3, 5, -2]}, "box: no area"),
        ({"bbox": [3, 3, float("nan"), 5]}, "box: not finite"),
        ({"bbox": [3, 3, 5]}, "box: not four numbers"),
        ({"bbox": [3, 3, 5, "x"]}, "box: not four numbers"),
        ({"iscrowd": 1}, "box: crowd"),
        ({"category_id": 77}, "box: category not listed"),
        ({"image_id": 77}, "box: image not listed"),
    ],
)
def test_bad_boxes_are_counted_and_strict_stops(tmp_path: Path, pictures: Path, change: dict, reason: str) -> None:
    data = coco_json(SIZE)
    data["annotations"][1].update(change)
    path = saved(tmp_path, data)
    source = sources.coco(path, pictures)
    (record,) = source.records
    assert len(record.boxes) == 2
    assert source.report.dropped == {reason: 1}
    assert f"dropped {reason}" in source.report.table()
    assert "annotation 2" in source.report.first[reason]
    with pytest.raises(SourceError, match=reason):
        list(sources.coco(path, pictures, strict=True).records)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.unlink(), "image: file missing"),
        (lambda p: p.write_bytes(b"no image"), "image: cannot be decoded"),
        (lambda p: p.write_bytes(b""), "image: file empty"),
        (lambda p: p.write_bytes(p.read_bytes()[:60]), "image: cannot be decoded"),
        (lambda p: write_image(p, 32, 24, 0), "image: size differs"),
        (lambda p: (p.unlink(), p.mkdir()), "image: file unreadable"),
    ],
)
def test_bad_images_are_counted_with_their_boxes(tmp_path: Path, pictures: Path, damage: Any, reason: str) -> None:
    damage(pictures / "img0.png")
    for form, read in ((coco_json([(24, 32)] * 2), sources.coco), (mdetr_json([(24, 32)] * 2), sources.mdetr)):
        source = read(saved(tmp_path, form), pictures)
        assert [record.id for record in source.records] == ["2"]
        boxes = len(form["annotations"]) // 2
        assert source.report.dropped == {reason: 1, "box: image dropped": boxes}
        assert source.report.kept == {"images": 1, "boxes": boxes}


def test_captions_and_spans(tmp_path: Path, pictures: Path) -> None:
    data = mdetr_json(SIZE)
    data["annotations"][0]["tokens"] = [[0, 5]]
    source = sources.mdetr(saved(tmp_path, data), pictures)
    (record,) = source.records
    assert record.kind == "grounding"
    assert record.caption == CAPTION
    assert record.spans == (((0, 5),), ((2, 5),))
    assert source.names == ()


@pytest.mark.parametrize(
    ("spans", "reasons"),
    [
        ([[1, 2]], {"span: to no token": 1, "box: no span left": 1}),
        ([[2, 999]], {"span: beyond the caption": 1, "box: no span left": 1}),
        ([[5, 2], [2, 5]], {"span: to no token": 1}),
        ([[2], [2, 5]], {"span: not two integers": 1}),
        ([], {"box: no span": 1}),
        (None, {"box: no span": 1}),
    ],
)
def test_bad_spans_are_counted(tmp_path: Path, pictures: Path, spans: Any, reasons: dict) -> None:
    data = mdetr_json(SIZE)
    data["annotations"][0]["tokens_positive"] = spans
    source = sources.mdetr(saved(tmp_path, data), pictures)
    (record,) = source.records
    assert len(record.boxes) == 2 - any(reason.startswith("box") for reason in reasons)
    assert source.report.dropped == reasons


def test_an_empty_caption_is_no_record(tmp_path: Path, pictures: Path) -> None:
    data = mdetr_json([(24, 32)] * 2)
    data["images"][0]["caption"] = "  "
    source = sources.mdetr(saved(tmp_path, data), pictures)
    assert [record.id for record in source.records] == ["2"]
    assert source.report.dropped["image: caption empty"] == 1


def changed(path: list, value: Any) -> dict:
    """The form with one place set, or, for the value ..., removed."""
    data: Any = copy.deepcopy(coco_json([(24, 32), (24, 32)]))
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
        ("[]", "holds a list, expected an object"),
        (changed(["images"], ...), "expected a list under 'images', found nothing"),
        (changed(["annotations"], {}), "expected a list under 'annotations', found dict"),
        (changed(["images"], []), "'images' is empty"),
        (changed(["images", 0], 5), r"images\[0\] is 5, expected an object"),
        (changed(["images", 1, "height"], ...), r"images\[1\] lacks height"),
        (changed(["images", 1, "height"], 2.5), "image 2 has height 2.5"),
        (changed(["images", 1, "file_name"], ""), "image 2 has the file name ''"),
        (changed(["images", 1, "id"], 1), "the id 1 stands twice in images"),
        (changed(["images", 1, "id"], [1]), r"images\[1\] has the id \[1\]"),
        (changed(["annotations", 1, "id"], 1), "the id 1 stands twice in annotations"),
        (changed(["annotations", 1, "bbox"], ...), r"annotations\[1\] lacks bbox"),
        (changed(["categories", 1, "name"], ...), r"categories\[1\] lacks name"),
        (changed(["categories", 1, "name"], "person"), "1 and 2 are both named 'person'.*--names"),
        (changed(["categories", 1, "name"], "_(dog)"), "named '_.dog.'.*--names"),
        (changed(["categories"], []), "no category"),
    ],
)
def test_whole_file_faults_stop(tmp_path: Path, pictures: Path, data: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        sources.coco(saved(tmp_path, data), pictures)


def test_folders_and_maps_that_do_not_fit(tmp_path: Path, pictures: Path) -> None:
    path = saved(tmp_path, coco_json(SIZE))
    with pytest.raises(SourceError, match="does not exist or is no folder"):
        sources.coco(path, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="is empty"):
        sources.coco(path, tmp_path / "empty")
    with pytest.raises(SourceError, match="does not exist"):
        sources.coco(tmp_path / "absent.json", pictures)
    with pytest.raises(SourceError, match="rename map has 'dgo'"):
        sources.coco(path, pictures, rename={"dgo": "dog"})
    with pytest.raises(SourceError, match=r"images\[0\] lacks caption"):
        sources.mdetr(path, pictures)
