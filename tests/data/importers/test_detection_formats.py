"""LVIS, Objects365, ODinW, OpenImages, Visual Genome, TensorFlow Datasets: small files in their owners' layouts, and what
is found out about boxes and ids before they are believed."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glip_jax.data.importers.coco import open_coco, open_odinw
from glip_jax.data.importers.entry import ImportSource, SourceError
from glip_jax.data.importers.openimages import open_openimages
from glip_jax.data.importers.visual_genome import open_visual_genome
from glip_jax.data.records import Record, decode, encode
from glip_jax.data.shards import Shards
from tests.data.conftest import NAMES, coco_json, records, saved
from tests.data.importers.prepared_set import prepare
from tests.run_job import run_job


def noted(opened: ImportSource) -> set[str]:
    return set(opened.report.noted)


# COCO's format ------------------------------------------------------------------------------------------------------------


def test_a_crowd_box_is_dropped_and_its_category_is_not_exhaustive(tmp_path, pictures):
    data = coco_json([(24, 32)])
    data["annotations"][2]["iscrowd"] = 1
    source = open_coco(saved(tmp_path, data), pictures)
    (record,) = records(source)
    assert source.report.dropped == {"box: crowd": 1}
    assert record.not_exhaustive == (NAMES[2],) and record.known_absent is None
    assert decode(encode(record)).not_exhaustive == (NAMES[2],)


@pytest.mark.parametrize(("boxes", "count"), [(None, 0), ("xyxy", 12), ("xywh", 12)])
def test_boxes_that_seem_to_be_xyxy_are_refused(tmp_path, pictures, boxes, count):
    data = coco_json([(24, 32)] * 4)
    for i, note in enumerate(data["annotations"]):
        note["bbox"] = [12 + i, 8, 20 + i, 20]
    source = open_coco(saved(tmp_path, data), pictures, boxes=boxes)
    if boxes is None:
        with pytest.raises(SourceError, match=r"corners.*12 of 12 leave their image.*--boxes=xyxy"):
            records(source)
        return
    found = records(source)
    assert sum(len(record.boxes) for record in found) == count
    assert found[0].boxes[0].tolist() == ([12, 8, 19, 19] if boxes == "xyxy" else [12, 8, 31, 23])


def test_boxes_that_seem_to_be_relative_are_refused(tmp_path, pictures):
    data = coco_json([(24, 32)] * 4)
    for note in data["annotations"]:
        note["bbox"] = [0.1, 0.2, 0.5, 0.25]
    with pytest.raises(SourceError, match="all values of bbox are between 0 and 1"):
        records(open_coco(saved(tmp_path, data), pictures))


@pytest.mark.parametrize(("shift", "words"), [(-1, "one lower"), (1, "one higher")])
def test_category_ids_shifted_by_one_are_refused(tmp_path, pictures, shift, words):
    data = coco_json([(24, 32)] * 4)
    for note in data["annotations"]:
        note["category_id"] += shift
    with pytest.raises(SourceError, match=words):
        open_coco(saved(tmp_path, data), pictures)


def test_boxes_of_another_category_list_are_refused(tmp_path, pictures):
    data = coco_json([(24, 32)] * 4)
    for note in data["annotations"][:7]:
        note["category_id"] += 50
    with pytest.raises(SourceError, match=r"7 of 12 boxes have a category that is not listed \(first: 51\)"):
        open_coco(saved(tmp_path, data), pictures)


def test_background_and_parent_categories_are_omitted_and_gaps_are_allowed(tmp_path, pictures):
    data = coco_json([(24, 32)] * 4)
    ids = {i + 1: 10 * (i + 1) for i in range(len(NAMES))}
    data["categories"] = [{"id": ids[i + 1], "name": name, "supercategory": "things"} for i, name in enumerate(NAMES)]
    data["categories"] += [{"id": 0, "name": "things", "supercategory": "none"}, {"id": 99, "name": "Background"}]
    for note in data["annotations"]:
        note["category_id"] = float(ids[note["category_id"]])
    data["annotations"][0]["category_id"] = 99
    source = open_coco(saved(tmp_path, data), pictures)
    assert source.names == tuple(NAMES)
    assert noted(source) == {"category: background, left out", "category: heading without boxes, left out"}
    assert records(source)[0].categories == (1, 2)
    assert source.report.dropped == {"box: background class": 1}


def test_a_parent_category_with_boxes_is_kept(tmp_path, pictures):
    data = coco_json([(24, 32)])
    for item in data["categories"]:
        item["supercategory"] = "person"
    assert open_coco(saved(tmp_path, data), pictures).names == tuple(NAMES)


def test_duplicate_boxes_are_dropped_and_clipped_boxes_are_noted(tmp_path, pictures):
    data = coco_json([(24, 32)])
    data["annotations"][1] |= {"bbox": [20, 10, 30, 5], "category_id": 1}
    data["annotations"].append(data["annotations"][1] | {"id": 9})
    data["annotations"].append(data["annotations"][1] | {"id": 10, "category_id": 2})
    source = open_coco(saved(tmp_path, data), pictures)
    (record,) = records(source)
    assert record.boxes.tolist()[1:] == [[20, 10, 31, 14], [4, 3, 11, 9], [20, 10, 31, 14]]
    assert (
        source.report.dropped == {"box: there twice": 1} and "annotation 9" in source.report.first["box: there twice"]
    )
    assert source.report.noted == {"box: cut at the edge of the image": 2}


def test_names_known_to_be_absent_are_listed_by_name(tmp_path, pictures):
    data = coco_json([(24, 32)] * 3)
    data["images"][0] |= {"known_absent": ["cell phone", "unicorn", 4], "neg_category_ids": [5]}
    data["images"][1]["known_absent"] = []
    source = open_coco(saved(tmp_path, data), pictures)
    first, second, third = records(source)
    assert first.known_absent == ("cat_(animal)", "cell phone")
    assert second.known_absent == () and third.known_absent is None
    assert source.report.noted == {"name: of no category in a list of the image, left out": 2}


def test_lvis_negatives_not_exhaustive_categories_and_urls(tmp_path, pictures):
    data = coco_json([(24, 32)] * 2)
    (pictures / "train2017").mkdir()
    for i, item in enumerate(data["images"]):
        name = item.pop("file_name")
        item["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
        item |= {"neg_category_ids": [4, 5, 77], "not_exhaustive_category_ids": [1 + i, "x", None]}
        (pictures / name).rename(pictures / "train2017" / name)
    data["images"][0]["neg_category_ids"].append(1)
    source = open_coco(saved(tmp_path, data), pictures)
    first, second = records(source)
    assert first.known_absent == ("cell phone", "cat_(animal)") and first.not_exhaustive == ("person",)
    assert second.known_absent == ("cat_(animal)",) and second.not_exhaustive == ("dog",)
    assert source.report.noted == {
        "name: known absent but boxed, not kept as absent": 2,
        "name: id of no category in a list of the image, left out": 6,
    }
    # The image folder is that of one split.
    assert len(records(open_coco(tmp_path / "a.json", pictures / "train2017"))) == 2


def test_objects365_paths_lose_folders_that_do_not_exist(tmp_path, pictures):
    data = coco_json([(24, 32)] * 3)
    (pictures / "patch8").mkdir()
    (pictures / "img0.png").rename(pictures / "patch8" / "img0.png")
    for item, folder in zip(data["images"], ("images/v1/patch8", "images/v2/patch9", "v2\\")):
        item["file_name"] = f"{folder}/{item['file_name']}"
    data["annotations"][0] |= {"isfake": 1, "isreflected": 0}
    source = open_coco(saved(tmp_path, data), pictures)
    assert len(records(source)) == 3 and not source.report.dropped


def test_odinw_folders(tmp_path, pictures, capsys):
    with pytest.raises(SourceError, match="has no JSON file"):
        open_odinw(pictures)
    data = coco_json([(24, 32)] * 2)
    saved(pictures, data, "annotations_without_background.json")
    saved(pictures, "{", "_annotations.coco.json")
    assert len(records(open_odinw(pictures))) == 2
    assert run_job("data", ["odinw", str(pictures), f"--out={tmp_path}/set"]) == 0
    assert Shards(tmp_path / "set").manifest.source == str(pictures)
    (pictures / "annotations_without_background.json").unlink()
    with pytest.raises(SourceError, match="_annotations.coco.json is not JSON"):
        open_odinw(pictures)
    with pytest.raises(SourceError, match="is not a folder"):
        open_odinw(pictures / "img0.png")


# OpenImages -------------------------------------------------------------------------------------------------------------

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
BOXES = f"""{HEADER}
img1,xclick,/m/dog,1,0.25,0.75,0.5,1,0,0,0,0,0
img0,xclick,/m/cat,1,0,0.5,0,0.5,0,0,0,0,0
img1,xclick,/m/cat,1,0.1,0.2,0.1,0.2,0,0,1,0,0
img1,xclick,/m/other,1,0.1,0.2,0.1,0.2,0,0,0,0,0
img0,activemil,/m/cat,1,0,x,0,0.5,0,0,0,0,0
"""
CLASSES = "/m/cat,Cat\n/m/dog,Dog\n/m/animal,Animal\n/m/car,Car\n/m/van,Van\n"
HIERARCHY = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [
        {"LabelName": "/m/animal", "Subcategory": [{"LabelName": "/m/cat"}, {"LabelName": "/m/dog"}]},
        {"LabelName": "/m/car", "Subcategory": [{"LabelName": "/m/van"}], "Part": [{"LabelName": "/m/wheel"}]},
    ],
}
LABELS = """ImageID,Source,LabelName,Confidence
img2,verification,/m/cat,1
img1,verification,/m/car,0
img0,verification,/m/animal,0
img0,verification,/m/dog,0
"""


@pytest.fixture
def openimages(tmp_path, pictures):
    files = {"boxes.csv": BOXES, "classes.csv": CLASSES, "labels.csv": LABELS, "tree.json": json.dumps(HIERARCHY)}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for i in range(3):
        with Image.open(pictures / f"img{i}.png") as image:
            image.save(pictures / f"img{i}.jpg")
    return tmp_path


def opened(place: Path, **options: Any) -> ImportSource:
    chosen = {"classes": "classes.csv", "hierarchy": "tree.json", "labels": "labels.csv"} | options
    paths = {key: place / str(name) for key, name in chosen.items() if name is not None}
    return open_openimages(place / "boxes.csv", place / "pictures", **paths)  # pyright: ignore[reportArgumentType]


def test_openimages(openimages):
    source = opened(openimages)
    assert source.names == ("Cat", "Dog", "Animal", "Car", "Van") and source.count == 3
    found = {record.id: record for record in records(source)}
    assert list(found) == ["img1", "img0", "img2"]
    one = found["img1"]
    assert one.boxes.tolist() == [[8, 12, 23, 23]] and one.categories == (1,)  # of 24 x 32, last pixel inclusive
    assert one.known_absent == ("Car", "Van") and one.not_exhaustive == ("Cat",)
    # A cat has a box, so "animal" cannot be absent, but "dog" can.
    assert found["img0"].known_absent == ("Dog",)
    assert found["img2"].known_absent == () and len(found["img2"].boxes) == 0
    assert source.report.dropped == {"box: group": 1, "box: category not listed": 1, "box: not four numbers": 1}
    assert "line 4 of image img1" in source.report.first["box: group"]
    assert source.report.noted == {"name: known absent but boxed, not kept as absent": 2}
    # Without image-level labels nothing is known to be absent.
    assert {record.known_absent for record in records(opened(openimages, labels=None, hierarchy=None))} == {()}
    (openimages / "boxes.csv").write_text(HEADER)
    assert len(records(opened(openimages))) == 3
    with pytest.raises(SourceError, match="has no box"):
        opened(openimages, labels=None)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("boxes.csv", "a,b\n", "the header lacks ImageID, LabelName"),
        ("boxes.csv", BOXES + "img1,xclick\n", "line 7 has 2 columns, the header 13"),
        ("boxes.csv", b"\xff\xfe", "is not a CSV"),
        ("classes.csv", "/m/cat,Cat\n/m/dog,Cat\n", "line 2: /m/dog, 'Cat' occurs twice"),
        ("classes.csv", "/m/cat\n", "line 1 has 1 columns, expected 2"),
        ("classes.csv", "", "is empty"),
        ("classes.csv", "/m/cat,_\n", "no letter or digit after cleaning"),
        ("tree.json", "[]", "expected an object with LabelName"),
        ("tree.json", "{", "is not JSON"),
        ("labels.csv", "x\n", "the header lacks ImageID"),
        ("labels.csv", None, "labels.csv does not exist"),
    ],
)
def test_invalid_openimages_files_are_refused(openimages, file, content, message):
    (openimages / file).unlink()
    if content is not None:
        (openimages / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=message):
        records(opened(openimages))


# Visual Genome ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def genome(tmp_path, pictures):
    (pictures / "VG_100K_2").mkdir()
    (pictures / "img1.png").rename(pictures / "VG_100K_2" / "1.jpg")
    (pictures / "img2.png").rename(pictures / "2.jpg")
    size = {"width": 32, "height": 24, "flickr_id": None}
    address = "https://cs.stanford.edu/people/rak248"
    images = [
        size | {"image_id": 1, "url": f"{address}/VG_100K_2/1.jpg", "coco_id": None},
        size | {"image_id": 2, "url": f"{address}/VG_100K/2.jpg", "coco_id": 99},
    ]
    thing = {"merged_object_ids": [], "synsets": ["tree.n.01"], "x": 2, "y": 3, "w": 10, "h": 12}
    objects = [
        {"image_id": 2, "objects": [thing | {"object_id": 7, "names": ["Trees ", "tree"]}]},
        {
            "image_id": 1,
            "objects": [
                thing | {"object_id": 8, "names": ["tree"]},
                thing | {"object_id": 9, "names": ["tree"], "x": 5, "w": 1},
                thing | {"object_id": 10, "names": ["--"]},
                thing | {"object_id": 11, "names": ["red  Roof"], "x": 4},
            ],
        },
        {"image_id": 3, "objects": [thing | {"object_id": 12, "names": ["tree"]}]},
    ]
    saved(tmp_path, images, "image_data.json")
    saved(tmp_path, objects, "objects.json")
    return tmp_path


def test_visual_genome(genome):
    def read(**options: Any) -> tuple[ImportSource, list[Record]]:
        source = open_visual_genome(
            genome / "objects.json", genome / "pictures", image_data=genome / "image_data.json", **options
        )
        return source, records(source)

    source, (first, second) = read()
    assert source.names == ("tree", "red roof", "trees") and source.count == 2
    assert first.boxes.tolist() == [[2, 3, 11, 14], [4, 3, 13, 14]] and first.categories == (0, 1)
    assert second.categories == (2,) and {first.known_absent, second.known_absent} == {()}
    assert source.report.dropped == {
        "box: no area": 1, "box: name not in the vocabulary": 1, "box: image not listed": 1,
    }  # fmt: skip
    (genome / "names.txt").write_text("tree,trees\nhouse\n")
    source, (first, second) = read(vocabulary=genome / "names.txt", without_coco=False)
    assert source.names == ("tree", "house") and second.categories == (0,)
    source, found = read(without_coco=True, min_boxes=2)
    assert source.names == ("tree",) and [record.id for record in found] == ["1"]
    assert source.report.dropped["image: also in COCO"] == 1
    with pytest.raises(SourceError, match="no name is left"):
        read(min_boxes=9)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("objects.json", {}, "holds a dict, expected a list"),
        ("objects.json", [{"image_id": 1}], r"has objects None, expected a list"),
        ("objects.json", [{"image_id": 1, "objects": [{"x": 1}]}], r"\[0\].objects\[0\] lacks y, w, h"),
        ("image_data.json", [{"image_id": 1, "width": 3, "height": 3}] * 2, "the image id 1 occurs twice"),
    ],
)
def test_invalid_visual_genome_files_are_refused(genome, file, data, message):
    saved(genome, data, file)
    with pytest.raises(SourceError, match=message):
        open_visual_genome(genome / "objects.json", genome / "pictures", image_data=genome / "image_data.json")


# TensorFlow Datasets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A set of three examples, written by TensorFlow Datasets."""
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.mark.processes
def test_a_prepared_tfds_set_is_read_without_tensorflow(prepared, tmp_path, capsys):
    assert run_job("data", ["tfds", str(prepared), f"--out={tmp_path}/set", "--processes=2", "--shards=2"]) == 0
    found = Shards(tmp_path / "set")
    assert found.manifest.names == ("cat", "dog", "cow") and found.manifest.drops == {"box: crowd": 3}
    by_id = {found[i].id: found[i] for i in range(3)}
    assert set(by_id) == {"100", "101", "102"}
    record = by_id["101"]
    assert record.boxes.tolist() == [[16, 6, 31, 11]] and record.categories == (1,)
    assert record.not_exhaustive == ("cat",) and record.known_absent == ("cow",)
    assert record.image.startswith(b"\xff\xd8")  # as stored
    for arguments, message in [
        ([str(prepared), "--split=val"], "has the splits train, not 'val'"),
        ([str(tmp_path)], "has no features.json"),
    ]:
        assert run_job("data", ["tfds", *arguments, f"--out={tmp_path}/other"]) == 2
        assert message in capsys.readouterr().err
