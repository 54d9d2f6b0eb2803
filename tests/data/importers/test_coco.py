"""COCO's JSON: invalid items are counted by reason, errors of the whole file stop with a one-line message."""

import copy
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data.importers.coco import open_coco
from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.mdetr import open_mdetr
from tests.data.conftest import NAMES, coco_json, mdetr_json, records, saved, write_image

SIZE = [(24, 32)]


def test_boxes_names_and_ids(tmp_path: Path, pictures: Path) -> None:
    data = coco_json([(24, 32), (24, 32)])
    data["annotations"] = data["annotations"][:3]
    data["annotations"][2]["bbox"] = [20.5, -4, 100, 10]
    data["categories"].insert(0, {"id": 0, "name": "__background__"})
    data["categories"].reverse()
    data["images"][1]["neg_category_ids"] = [2, 5]
    source = open_coco(saved(tmp_path, data), pictures, rename={"dog": "small dog"})
    assert source.names == ("person", "small dog", *NAMES[2:])
    first, second = records(source)
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
def test_invalid_boxes_are_counted_and_strict_mode_stops(
    tmp_path: Path, pictures: Path, change: dict, reason: str
) -> None:
    data = coco_json(SIZE)
    data["annotations"][1].update(change)
    path = saved(tmp_path, data)
    source = open_coco(path, pictures)
    (record,) = records(source)
    assert len(record.boxes) == 2
    assert source.report.dropped == {reason: 1}
    assert "annotation 2" in source.report.first[reason]
    with pytest.raises(SourceError, match=reason):
        records(open_coco(path, pictures, strict=True))


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
def test_invalid_images_are_counted_with_their_boxes(tmp_path: Path, pictures: Path, damage: Any, reason: str) -> None:
    damage(pictures / "img0.png")
    for form, read in ((coco_json([(24, 32)] * 2), open_coco), (mdetr_json([(24, 32)] * 2), open_mdetr)):
        source = read(saved(tmp_path, form), pictures)
        assert [record.id for record in records(source)] == ["2"]
        boxes = len(form["annotations"]) // 2
        assert source.report.dropped == {reason: 1, "box: image dropped": boxes}
        assert source.report.kept["images"] == 1 and source.report.kept["boxes"] == boxes


def changed(path: list, value: Any) -> dict:
    """The valid file with one value replaced, or removed for the value `...`."""
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
        (changed(["images", 1, "file_name"], ""), "image 2 has the file name ''"),
        (changed(["images", 1, "id"], 1), "the id 1 occurs twice in images"),
        (changed(["images", 1, "id"], [1]), r"images\[1\] has the id \[1\]"),
        (changed(["annotations", 1, "id"], 1), "the id 1 occurs twice in annotations"),
        (changed(["annotations", 1, "bbox"], ...), r"annotations\[1\] lacks bbox"),
        (changed(["categories", 1, "name"], ...), r"categories\[1\] lacks name"),
        (changed(["categories", 1, "name"], "person"), "1 and 2 are both named 'person'.*--names"),
        (
            changed(["categories", 1, "name"], "Pérson"),
            r"1 \('person'\) and 2 \('Pérson'\) are the same to the model.*--names",
        ),
        (changed(["categories", 1, "name"], "_(dog)"), "named '_.dog.'.*--names"),
        (changed(["categories"], []), "no category"),
    ],
)
def test_errors_of_the_whole_file_are_refused(tmp_path: Path, pictures: Path, data: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_coco(saved(tmp_path, data), pictures)


def test_invalid_image_folders_and_rename_maps_are_refused(tmp_path: Path, pictures: Path) -> None:
    path = saved(tmp_path, coco_json(SIZE))
    with pytest.raises(SourceError, match="does not exist or is not a folder"):
        open_coco(path, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="is empty"):
        open_coco(path, tmp_path / "empty")
    with pytest.raises(SourceError, match="does not exist"):
        open_coco(tmp_path / "absent.json", pictures)
    with pytest.raises(SourceError, match="--names has 'dgo', which is the name or id of no category"):
        open_coco(path, pictures, rename={"dgo": "dog"})
    with pytest.raises(SourceError, match=r"images\[0\] lacks caption"):
        open_mdetr(path, pictures)
