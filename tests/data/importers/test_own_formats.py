"""Pascal VOC, YOLO, ODVG, LabelMe and Label Studio: small files as their owners write them, imported and found in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data.importers.entry import ImportSource, SourceError
from glip_jax.data.importers.label_studio import open_label_studio
from glip_jax.data.importers.labelme import open_labelme
from glip_jax.data.importers.layouts import LayoutError, find
from glip_jax.data.importers.odvg import open_odvg
from glip_jax.data.importers.voc import open_voc
from glip_jax.data.importers.yolo import open_yolo
from tests.data.conftest import records, write_image
from tests.data.importers.layouts import LABELME, LAYOUTS, REGIONS, TASKS
from tests.data.importers.test_layouts import sizes

FORMATS = ("voc", "yolo", "odvg", "labelme", "label-studio")


def made(name: str, folder: Path, pictures: str = "pictures") -> Path:
    """The small example of a format, as the fuzz tests have it."""
    (folder / pictures).mkdir(parents=True)
    for i in range(3):
        write_image(folder / pictures / f"img{i}.png", 24, 32, i)
    LAYOUTS[name].make(folder)
    return folder


def boxes(opened: ImportSource, index: int = 0) -> list[tuple[str, list[float]]]:
    """Name and box, in inclusive pixels, of a record."""
    record = records(opened)[index]
    return [(opened.names[label], box.tolist()) for label, box in zip(record.categories, record.boxes)]


DOG = ("dog", [2, 3, 11, 14])
"""x 2, y 3, width 10, height 12: pixels 2 to 11 and 3 to 14."""


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("voc", [("cat", [0, 0, 31, 23])]),
        ("yolo", [("cat", [8, 6, 15, 11])]),
        ("odvg", []),
        ("labelme", [("cat", [10, 4, 19, 19]), ("dog", [11, 7, 20, 16])]),
        ("label-studio", [("cat", [10, 6, 15, 13]), ("cat", [8, 6, 15, 17])]),
    ],
)
def test_boxes_of_a_small_example(tmp_path, name, others):
    opened = LAYOUTS[name].open(made(name, tmp_path))
    assert boxes(opened) == [DOG, *others]
    assert not opened.report.dropped


@pytest.mark.parametrize("name", FORMATS)
def test_the_small_examples_are_found_in_a_folder(tmp_path, name):
    found = find(made(name, tmp_path, "pictures"))
    count = 2 if name == "odvg" else 3
    assert found.layout == name and len(found.splits["train"].coco["images"]) == count
    note = found.splits["train"].coco["annotations"][0]
    assert note["bbox"] == [2, 3, 10, 12] and found.names[note["category_id"] - 1] == "dog"
    assert ("valid" in found.splits) == (name == "yolo")


def test_voc_counts_from_1_or_from_0_and_finds_images_of_another_ending(tmp_path):
    folder = made("voc", tmp_path)
    xml = folder / "Annotations/img1.xml"
    xml.write_text(xml.read_text().replace("<xmin>1<", "<xmin>0<").replace("img1.png", "stale.jpg"))
    opened = open_voc(folder / "Annotations", folder / "pictures")
    assert boxes(opened)[0] == ("dog", [3, 4, 11, 14])  # 3 to 12 without the last pixel
    assert opened.report.noted["box: pixels counted from 0, not from 1 as in VOC"] == 6
    assert opened.report.noted["box: difficult, kept as all others"] == 3


def test_voc_splits_by_its_lists_and_by_folders(tmp_path):
    folder = made("voc", tmp_path / "a", "JPEGImages")
    for name, lines in {"train": "img0\nimg1\n", "val": "img2\n", "dog_train": "img0 1\n"}.items():
        (folder / f"ImageSets/Main/{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Main/{name}.txt").write_text(lines)
    assert sizes(find(tmp_path)) == {"train": (2, 4), "valid": (1, 2)}  # as in VOCdevkit/VOC2012
    (folder / "ImageSets/Main/train.txt").rename(folder / "ImageSets/Main/trainval.txt")
    assert sizes(find(tmp_path)) == {"train": (2, 4), "valid": (1, 2)}
    for split, number in (("train", 0), ("valid", 1), ("test", 2)):
        place = tmp_path / "b" / split
        place.mkdir(parents=True)
        for ending, origin in ((".xml", "Annotations"), (".png", "JPEGImages")):
            (folder / origin / f"img{number}{ending}").rename(place / f"img{number}{ending}")
    assert sizes(find(tmp_path / "b")) == {"train": (1, 2), "valid": (1, 2), "test": (1, 2)}


def test_voc_in_a_folder_of_another_name(tmp_path):
    folder = made("voc", tmp_path, "images")
    (folder / "Annotations").rename(folder / "annots")
    assert sizes(find(folder)) == {"train": (3, 6)}


def _yolo(folder: Path, yaml: str, *splits: str) -> Path:
    for number, split in enumerate(splits):
        for kind in ("images", "labels"):
            (folder / split.format(kind)).mkdir(parents=True, exist_ok=True)
        write_image(folder / split.format("images") / f"{number}.png", 24, 32, number)
        (folder / split.format("labels") / f"{number}.txt").write_text("1 0.5 0.5 0.25 0.5\n0 0.5 0.5 0.25 0.5 0.9\n")
    (folder / "data.yaml").write_text(yaml)
    return folder


@pytest.mark.parametrize(
    ("yaml", "splits"),
    [
        # Roboflow: folders beside data.yaml, written as if they lay above it; a split that was not exported.
        (
            "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['a', 'b']\n",
            ("train/{}", "valid/{}"),
        ),
        # ultralytics: `path` on another machine, names by number.
        (
            "path: /data/sets/mine\ntrain: images/train\nval: images/val\nnames:\n  0: a\n  1: b\n",
            ("{}/train", "{}/val"),
        ),
        # A list of folders, and a list of files.
        ("train: [images/train]\nval: val.txt\nnames: {0: a, 1: b}\n", ("{}/train", "{}/val")),
    ],
)
def test_yolo_as_it_is_exported(tmp_path, yaml, splits):
    folder = _yolo(tmp_path, yaml, *splits)
    (folder / "val.txt").write_text("./images/val/1.png\n")
    found = find(folder)
    assert sizes(found) == {"train": (1, 2), "valid": (1, 2)} and found.names == ("a", "b")
    assert [note["bbox"] for note in found.splits["valid"].coco["annotations"]] == [[12, 6, 8, 12]] * 2
    assert ("no test set" in " ".join(found.notes)) == ("test:" in yaml)


def test_yolo_without_data_yaml_and_what_is_refused(tmp_path):
    folder = _yolo(tmp_path / "a", "", "{}")
    (folder / "data.yaml").rename(folder / "labels" / "notes.yaml")
    (folder / "labels/classes.txt").write_text("a\nb\n")
    assert sizes(find(folder)) == {"train": (1, 2)}
    opened = open_yolo(folder / "labels", folder / "images")
    assert len(records(opened)) == 1 and opened.names == ("a", "b")
    (folder / "labels/0.txt").write_text("0 12 6 8 12\n1 40 20 10 10\n")
    with pytest.raises(SourceError, match="2 of 2 boxes are no shares of the image"):
        open_yolo(folder / "labels", folder / "images")
    with pytest.raises(SourceError, match="has no split 'val'; it has: train"):
        open_yolo(_yolo(tmp_path / "b", "train: images\nnames: [a]\n", "{}") / "data.yaml", split="val")
    with pytest.raises(SourceError, match="expected 'names', a list of class names"):
        open_yolo(_yolo(tmp_path / "c", "train: images\nnc: 2\n", "{}") / "data.yaml")


def test_odvg_of_classes_and_phrases(tmp_path):
    folder = made("odvg", tmp_path)
    (folder / "a_label_map.json").write_text('{"0": "cat", "1": "hound"}')
    opened = open_odvg(folder / "a.jsonl", folder / "pictures", label_map=folder / "a_label_map.json")
    detection, both, *captions = records(opened)
    assert opened.names == ("cat", "hound") and detection.categories == both.categories == (1,)
    assert [record.kind for record in captions] == ["grounding", "grounding"]
    assert captions[0].caption == "a dog and two cats" and captions[0].spans == (((0, 5),), ((10, 18),), ((10, 18),))
    assert captions[0].boxes.tolist() == [[2, 3, 11, 14], [1, 1, 8, 8], [9, 9, 29, 19]]
    assert find(folder).names == ("cat", "hound")


def test_odvg_without_classes_is_for_pretraining(tmp_path):
    folder = made("odvg", tmp_path)
    line = (folder / "a.jsonl").read_text().splitlines()[1]
    (folder / "a.jsonl").write_text(line.replace('"two cats"', '"three cats"'))
    opened = open_odvg(folder / "a.jsonl", folder / "pictures")
    assert len(records(opened)[0].boxes) == 1 and opened.report.dropped == {"box: no span": 2}
    with pytest.raises(SourceError, match="phrases of captions only"):
        find(folder)


def test_labelme_and_label_studio_count_what_is_no_box(tmp_path):
    folder = made("labelme", tmp_path)
    point: dict[str, Any] = {"label": "cat", "points": [[1, 1]], "shape_type": "point"}
    data = {**LABELME, "imagePath": "..\\photographs\\before.png", "shapes": [point, *LABELME["shapes"]]}
    (folder / "pictures/img0.json").write_text(json.dumps(data))
    opened = open_labelme(folder / "pictures", folder / "pictures")
    assert boxes(opened)[0] == DOG and opened.report.dropped == {"box: a point has no area": 1}
    key = {**REGIONS[0], "type": "keypointlabels", "value": {"x": 5, "y": 5, "width": 1, "keypointlabels": ["dog"]}}
    minimal = [{"id": 1, "annotator": 1, "image": TASKS[1]["data"]["image"], "label": [
        {**region["value"], "original_width": 32, "original_height": 24} for region in (*REGIONS[:2], key)]}]  # fmt: skip
    (folder / "min.json").write_text(json.dumps(minimal))
    opened = open_label_studio(folder / "min.json", folder / "pictures")
    assert boxes(opened) == [DOG, ("cat", [10, 6, 15, 13])]
    assert opened.report.dropped == {"box: region that is no rectangle, polygon or ellipse": 1}


def test_two_layouts_in_one_folder_are_refused_unless_one_is_named(tmp_path):
    folder = made("voc", made("yolo", tmp_path).parent / "x" / "y")
    LAYOUTS["yolo"].make(folder)
    with pytest.raises(LayoutError, match="has 2 data sets: voc in .*; yolo in .*--layout=voc"):
        find(folder)
    assert find(folder, layout="yolo").layout == "yolo"
    with pytest.raises(LayoutError, match="there is no layout 'tar'; there are coco, voc"):
        find(folder, layout="tar")


@pytest.mark.parametrize(("name", "text"), [("voc", "<a/>"), ("labelme", "[]"), ("label-studio", "{}"), ("odvg", "{}")])
def test_files_of_another_kind_are_refused(tmp_path, name, text):
    folder = made(name, tmp_path)
    for path in folder.rglob("*"):
        if path.suffix in (".xml", ".json", ".jsonl"):
            path.write_text(text)
    with pytest.raises(SourceError, match=r"none of the|no list of objects|no line with"):
        LAYOUTS[name].open(folder)
