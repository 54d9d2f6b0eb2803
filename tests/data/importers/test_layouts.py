"""Own data found in a folder: every layout as its owner writes it, what is mended, and what is refused."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data.importers.checks import findings, names_findings
from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.layouts import Dataset, LayoutError, carve, find
from glip_jax.data.importers.shots import draw_shots, prepared_shots
from glip_jax.structures.prompts import load_tokenizer
from tests.data.conftest import write_image

NAMES = ("cat", "dog")


def coco(images: int, first: int = 1, start: int = 1, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """`images` images NAME.png of 24 x 32, each with a box of every name; ids from `first` and `start`."""
    listed = [{"id": first + i, "file_name": f"{first + i}.png", "height": 24, "width": 32} for i in range(images)]
    notes = [
        {"image_id": image["id"], "category_id": start + k, "bbox": [2, 3, 10, 12], "iscrowd": 0, "area": 120}
        for image in listed
        for k in range(len(names))
    ]
    return {
        "images": listed,
        "annotations": [{"id": i, **note} for i, note in enumerate(notes, 1)],
        "categories": [{"id": start + k, "name": name, "supercategory": "animals"} for k, name in enumerate(names)],
    }


def save(data: Any, path: Path, images: Path | None = None) -> None:
    """Writes annotations, and an image file for each listed one into the folder `images` (default: beside them)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    folder = images or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(data["images"]):
        write_image(
            folder / image["file_name"], 24, 32, zlib.crc32(f"{path.parent.name} {path.name} {number}".encode())
        )


def sizes(dataset: Dataset) -> dict[str, tuple[int, int]]:
    return {name: (len(split.coco["images"]), split.boxes) for name, split in dataset.splits.items()}


def test_roboflow_and_its_dummy_class(tmp_path):
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        data = coco(count)
        data["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        save(data, tmp_path / split / "_annotations.coco.json")
    found = find(tmp_path)
    assert found.layout == "coco" and sizes(found) == {"train": (3, 6), "valid": (2, 4), "test": (1, 2)}
    assert found.names == NAMES and "'animals', has no box: left out" in found.notes[0]


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/{}.json", "images"),
        ("annotations/instances_{}.json", "images/{}"),
        ("{}_annotations_without_background.json", "."),
        ("annotations/{}.json", "{}/images"),
        ("{}/annotations_without_background.json", "{}"),  # ODinW
    ],
)
def test_layouts_of_coco(tmp_path, file, images):
    for split, first in (("train", 1), ("val", 11)):
        save(coco(2, first), tmp_path / "in" / file.format(split), tmp_path / "in" / images.format(split))
    save({"images": [], "annotations": [], "info": {}}, tmp_path / "in/annotations/captions_train2017.json")
    found = find(tmp_path)
    assert sizes(found) == {"train": (2, 4), "valid": (2, 4)} and found.notes == (f"the data set is in {tmp_path}/in",)
    folder = Path(found.splits["valid"].images)
    assert all((folder / image["file_name"]).exists() for image in found.splits["valid"].coco["images"])


def test_exports_of_cvat_and_label_studio_as_coco(tmp_path):
    for subset, folder in (("Train", "images/Train"), ("Validation", "images/Validation")):
        save(coco(2), tmp_path / "subsets" / f"annotations/instances_{subset}.json", tmp_path / "subsets" / folder)
    assert sizes(find(tmp_path / "subsets")) == {"train": (2, 4), "valid": (2, 4)}
    save(coco(3), tmp_path / "cvat/annotations/instances_default.json", tmp_path / "cvat/images/default")
    assert sizes(find(tmp_path / "cvat")) == {"train": (3, 6)}
    save(coco(2), tmp_path / "studio/result.json", tmp_path / "studio/images")
    data = coco(2)
    for image in data["images"]:
        image["file_name"] = f"../../label-studio/data/media/upload/3/{image['file_name']}"
    (tmp_path / "studio/result.json").write_text(json.dumps(data))
    found = find(tmp_path / "studio").splits["train"]
    assert [image["file_name"] for image in found.coco["images"]] == ["1.png", "2.png"]


def test_odinw_prefers_its_file_without_background_and_the_whole_valid(tmp_path):
    for split, first in (("train", 1), ("valid", 11), ("mini_val", 11)):
        save(coco(1 if split == "mini_val" else 2, first), tmp_path / split / "annotations_without_background.json")
        save(coco(2, first, names=("x", "cat", "dog")), tmp_path / split / "_annotations.coco.json")
    found = find(tmp_path)
    assert sizes(found) == {"train": (2, 4), "valid": (2, 4)} and found.names == NAMES


def test_category_ids_from_0_and_of_another_order_are_those_of_one_list(tmp_path):
    save(coco(2, start=0), tmp_path / "train/_annotations.coco.json")
    save(coco(1, start=5, names=("dog", "cat")), tmp_path / "valid/_annotations.coco.json")
    found = find(tmp_path)
    for split in found.splits.values():
        assert [(c["id"], c["name"]) for c in split.coco["categories"]] == [(1, "cat"), (2, "dog")]
    assert [note["category_id"] for note in found.splits["valid"].coco["annotations"]] == [2, 1]
    assert "numbered from 1" in found.notes[0]


def test_annotation_ids_that_occur_twice_are_numbered_anew(tmp_path):
    data = coco(2)
    for note in data["annotations"]:
        note["id"] = 0
    save(data, tmp_path / "train/_annotations.coco.json")
    found = find(tmp_path)
    assert [note["id"] for note in found.splits["train"].coco["annotations"]] == [1, 2, 3, 4]
    assert "ids that are missing, 0 or not unique" in found.notes[0]


def test_a_validation_set_is_carved_by_image_and_seed(tmp_path):
    save(coco(20), tmp_path / "_annotations.coco.json")
    found = find(tmp_path)
    one, other = carve(found, seed=1), carve(found, seed=2)
    assert sizes(one) == {"train": (18, 36), "valid": (2, 4)}
    assert carve(found, seed=1) == one and carve(one) is one
    assert one.splits["valid"].coco != other.splits["valid"].coco
    ids = [{image["id"] for image in split.coco["images"]} for split in one.splits.values()]
    assert not ids[0] & ids[1] and "2 of the 20 training images, drawn with seed 1" in one.notes[-1]


def test_a_carved_validation_set_has_its_share_of_images_with_and_without_boxes(tmp_path):
    data = coco(40)
    data["annotations"] = [note for note in data["annotations"] if note["image_id"] % 10 == 1]
    save(data, tmp_path / "_annotations.coco.json")
    for seed in range(4):
        assert sizes(carve(find(tmp_path), seed=seed)) == {"train": (35, 6), "valid": (5, 2)}


def test_shots_are_images_that_hold_the_class():
    # Images 1 to 5 hold: a / a b / b / a / c; image 6 has only a box of one pixel.
    held = {1: (1,), 2: (1, 2), 3: (2,), 4: (1, 1), 5: (3,), 6: (3,)}
    notes = [
        {"image_id": i, "category_id": c, "bbox": [0, 0, 1 if i == 6 else 9, 9]} for i, own in held.items() for c in own
    ]
    data = {"images": [{"id": i} for i in held], "annotations": notes, "categories": [{"id": c} for c in (1, 2, 3)]}

    def ids(shots: int, seed: int = 0) -> list[int]:
        return [image["id"] for image in draw_shots(data, shots, seed)["images"]]

    # k = 1: 1 for a, 2 for b (a goes below zero), 5 for c. k = 2: 1, 2, then 3 for the second b, 5 for c.
    assert ids(1) == [1, 2, 5] and ids(2) == [1, 2, 3, 5] and ids(3) == [1, 2, 3, 4, 5]
    assert len(draw_shots(data, 1)["annotations"]) == 4
    assert ids(1, 3) == ids(1, 3) and {tuple(ids(1, seed)) for seed in range(1, 8)} != {(1, 2, 5)}


def test_prepared_shots_are_read(tmp_path):
    save(coco(3, start=0), tmp_path / "train/_annotations.coco.json")
    (tmp_path / "train/fewshot_train_shot1_seed30.json").write_text(json.dumps(coco(1, 2, start=0)))
    found = find(tmp_path)
    shots = prepared_shots(found, 1, 30)
    assert shots is not None and [image["id"] for image in shots.coco["images"]] == [2]
    assert [note["category_id"] for note in shots.coco["annotations"]] == [1, 2]
    assert prepared_shots(found, 1, 3) is None


def test_folders_that_are_refused_say_what_was_looked_for(tmp_path):
    with pytest.raises(
        LayoutError, match=r"has no data set.*it has nothing \(0 images\).*; looked for: .*_annotations"
    ):
        find(tmp_path)
    with pytest.raises(LayoutError, match="does not exist: expected the folder"):
        find(tmp_path / "absent")
    save(coco(3), tmp_path / "train/_annotations.coco.json")
    for left, said in ((2, None), (1, "lists 3 images, and 2 of them are not in"), (0, "and none of them is there")):
        (tmp_path / f"train/{left + 1}.png").unlink()
        if said is None:
            found = find(tmp_path / "train")
            assert sizes(found) == {"train": (2, 4)} and "file missing: 1 (first: '3.png')" in found.notes[0]
            continue
        with pytest.raises(LayoutError, match=said):
            find(tmp_path / "train")
    save(coco(2), tmp_path / "train/_annotations.coco.json")
    save(coco(2), tmp_path / "annotations/train.json", tmp_path / "images")
    with pytest.raises(LayoutError, match="has 2 annotations of the train set"):
        find(tmp_path)


@pytest.mark.parametrize("boxes_last", [False, True])
def test_bad_data_is_refused_in_one_line(tmp_path, boxes_last):
    data = coco(3)
    data["annotations"] = []
    if boxes_last:
        data = dict(reversed(data.items()))
    save(data, tmp_path / "a/_annotations.coco.json")
    with pytest.raises(LayoutError, match="no image of the training set has a box"):
        find(tmp_path)
    save(coco(1), tmp_path / "a/_annotations.coco.json")
    with pytest.raises(LayoutError, match=r"has 1 images, 1 with a box, and no validation set: expected at least 2"):
        carve(find(tmp_path))
    save(coco(2), tmp_path / "a/test.json")
    (tmp_path / "a/_annotations.coco.json").unlink()
    with pytest.raises(LayoutError, match=r"has no training set, but test \(test.json\)"):
        find(tmp_path)


@pytest.mark.parametrize(("key", "field"), [("images", "id"), ("categories", "id"), ("categories", "name")])
def test_what_must_be_unique_and_is_not(tmp_path, key, field):
    data = coco(2)
    data[key][1][field] = data[key][0][field]
    save(data, tmp_path / "_annotations.coco.json")
    with pytest.raises(LayoutError, match=f"the {field} .* occurs twice in {key}"):
        find(tmp_path)


def test_ids_that_count_from_another_number_than_the_boxes_are_refused(tmp_path):
    data = coco(3, start=0)
    for note in data["annotations"]:
        note["category_id"] += 1
    save(data, tmp_path / "_annotations.coco.json")
    with pytest.raises(SourceError, match="names would be shifted by one"):
        find(tmp_path)


def test_findings(tmp_path):
    names = ("left hand", "hand", "CoW", "2", "\u732b", "fish")
    data, valid = coco(3, names=names), coco(1, 11, names=names)
    data["annotations"] = [note for note in data["annotations"] if note["category_id"] != 6][:-5]
    data["annotations"][0]["bbox"] = [2, 3, 1, 9]
    data["annotations"][1]["bbox"] = [30, 3, 9, 9]
    valid["annotations"] *= 400
    save(data, tmp_path / "train/_annotations.coco.json")
    save(valid, tmp_path / "valid/_annotations.coco.json")
    (tmp_path / "valid/11.png").write_bytes((tmp_path / "train/2.png").read_bytes())
    found = findings(find(tmp_path), {"fish": "small fish"}, load_tokenizer("tests/fixtures/vocab_tiny1.txt"))
    said = {finding.check: finding.text for finding in found}
    assert "train: 1 of 10 boxes" in said["boxes of at most one pixel"]
    assert "train: 1 of 10 boxes" in said["boxes outside the image"]
    assert "1 images have more than 100 boxes (image 11: 2400)" in said["many boxes in an image"]
    assert "train: no box of 'fish'" in said["classes without a box"]
    assert "train: 1 of 3 images have no box" in said["images without a box"]
    assert "1 images (first: 2.png and 11.png) are in train and in valid" in said["same image in two splits"]
    assert said["names without meaning"].startswith("'CoW', '2' may mean nothing")
    assert "'hand in left hand'" in said["one name inside another"]
    assert "'left hand' tell left from right" in said["left or right"]
    assert "'\u732b'" in said["names the vocabulary lacks"]
    assert [finding.check for finding in found if finding.no_flip] == ["left or right"]
    assert [finding.check for finding in found if finding.error] == ["names the vocabulary lacks"]
    many = {f"thing {i}": f"thing {i}" for i in range(500)}
    texts = [one.text for one in names_findings(many, load_tokenizer("tests/fixtures/vocab_tiny1.txt"))]
    assert any(text.startswith("500 names have ") and "and a prompt 256" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "vague", "side"),
    [("0", True, False), ("class_3", True, False), ("RBC", True, False), ("CoW", True, False), ("A", True, False),
     ("cat", False, False), ("CAR", False, False), ("tv", False, False), ("cat 2", False, False), ("object 1", True, False),
     ("trafficLight-GreenLeft", False, True), ("myright", False, True), ("bright light", False, False)],
)  # fmt: skip
def test_names_that_say_nothing_or_a_side(name, vague, side):
    checks = {finding.check for finding in names_findings({name: name})}
    assert ("names without meaning" in checks, "left or right" in checks) == (vague, side)


def test_masks_as_crowds_are_single_objects(tmp_path):
    data = coco(2)
    for note in data["annotations"][:3]:
        note["iscrowd"] = 1
    save(data, tmp_path / "_annotations.coco.json")
    found = find(tmp_path)
    assert [note["iscrowd"] for note in found.splits["train"].coco["annotations"]] == [0, 0, 0, 0]
    assert "most are (the masks of CVAT and SAM): 3" in found.notes[0]


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "annotations.xml").write_text('<annotations><image id="0"></image></annotations>')
    with pytest.raises(LayoutError, match=r"annotations.xml is an export of CVAT \(XML\).*; looked for"):
        find(tmp_path)
    with pytest.raises(LayoutError, match=r"is a file \(its folder is "):
        find(tmp_path / "annotations.xml")
