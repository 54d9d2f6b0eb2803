"""Sets of the benchmark in their official layouts, with two to five made images each, for tests without the real ones.

`write_set(NAME, folder)` writes the files of a set of the table below a data folder. Its counts are not those of the real set.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glip_jax.evaluation.benchmark.sets import BenchmarkSet
from glip_jax.evaluation.benchmark.table import SETS

HEIGHT, WIDTH = 48, 64
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 160, 30), "yellow": (220, 220, 30)}
BOXES = [[4, 6, 20, 16], [34, 20, 24, 24], [10, 28, 12, 14]]
"""x, y, width, height of the boxes of an image; image i has the first 1 + i % 3."""


def boxes_of(image: int) -> list[list[int]]:
    """The boxes of image number `image`, shifted by its number."""
    return [[x + image % 4, y, width, height] for x, y, width, height in BOXES[: 1 + image % 3]]


def write_image(path: Path, image: int) -> None:
    """An image with colored rectangles at the boxes of image number `image`."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (200, 200, 200))
    for (x, y, width, height), color in zip(boxes_of(image), COLORS.values(), strict=False):
        ImageDraw.Draw(picture).rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=95)


def write_set(name: str, data: Path) -> BenchmarkSet:
    """Writes the files of a set below `data`, and returns its entry in the table."""
    item = SETS[name]
    match item.layout:
        case "categories" if name.startswith("lvis"):
            _write_lvis(item, data)
        case "categories":
            _write_categories(item, data)
        case "flickr":
            _write_flickr(item, data)
        case "expressions":
            _write_expressions(item, data)
        case "d3":
            _write_d3(item, data)
        case "omnilabel":
            _write_omnilabel(item, data)
    return item


def _path(item: BenchmarkSet, role: str, data: Path) -> Path:
    return data / item.file(role).paths[0]


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _coco(files: list[str], ids: list[int], categories: list[dict[str, Any]], first: int = 1) -> dict[str, Any]:
    """COCO's JSON of images 0, 1, ...; the last has no box, and the categories take turns."""
    annotations = [
        {"image_id": ids[i], "category_id": categories[(i + k) % len(categories)]["id"], "bbox": box, "area": box[2] * box[3],
         "iscrowd": 0}
        for i in range(len(files) - 1) for k, box in enumerate(boxes_of(i))
    ]  # fmt: skip
    return {
        "images": [{"id": key, "file_name": file, "height": HEIGHT, "width": WIDTH} for key, file in zip(ids, files)],
        "annotations": [{"id": first + i, **entry} for i, entry in enumerate(annotations)],
        "categories": categories,
    }


def _write_categories(item: BenchmarkSet, data: Path) -> None:
    """COCO, ODinW, RF100-VL (with the unused class 0 of an export) and V3Det."""
    ids, folder = [11, 13, 12], _path(item, "images", data)
    below = {"coco": "", "v3det": "images/a0001/"}.get(item.name, "")
    names = ["cat", "dog", "person"]
    if item.name.startswith("odinw"):
        names = [*item.prompts] or ["boat", "car"]
    categories: list[dict[str, Any]] = [
        {"id": i, "name": name, "supercategory": "none"} for i, name in enumerate(names, 1)
    ]
    if item.name.startswith("rf100vl"):
        categories = [{**each, "supercategory": "animals"} for each in categories]
    content = _coco([f"{below}{key:012d}.jpg" for key in ids], ids, categories)
    if item.name.startswith("rf100vl"):
        content["categories"] = [{"id": 0, "name": "animals", "supercategory": "none"}, *categories]
    if item.name == "coco":
        content["annotations"].append({"id": 99, "image_id": 12, "category_id": 1, "bbox": [0, 0, 30, 30], "area": 700, "iscrowd": 1,
                                       "segmentation": {"counts": "", "size": [HEIGHT, WIDTH]}})  # fmt: skip
    _write(_path(item, "annotations", data), content)
    for i, entry in enumerate(content["images"]):
        write_image(folder / entry["file_name"], i)


def _write_lvis(item: BenchmarkSet, data: Path) -> None:
    """LVIS v1 val: no file_name, images of train2017 and val2017, masks, absent and unfinished names."""
    ids, parts = [139, 285, 632, 724], ["val2017", "train2017", "val2017", "val2017"]
    names = [("aerosol_can", "c"), ("cat", "f"), ("bow_(weapon)", "r"), ("person", "f")]
    categories = [
        {"id": i, "name": name, "frequency": frequency, "synset": f"{name}.n.01", "synonyms": [name], "image_count": 9,
         "instance_count": 9}
        for i, (name, frequency) in enumerate(names, 1)
    ]  # fmt: skip
    content = _coco([""] * 4, ids, categories)
    content["images"] = [
        {"id": key, "coco_url": f"http://images.cocodataset.org/{part}/{key:012d}.jpg", "height": HEIGHT, "width": WIDTH,
         "neg_category_ids": [3], "not_exhaustive_category_ids": [4]}
        for key, part in zip(ids, parts)
    ]  # fmt: skip
    for entry in content["annotations"]:
        entry["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    _write(data / "lvis/lvis_v1_val.json", content)
    for i, (key, part) in enumerate(zip(ids, parts)):
        write_image(data / f"coco/{part}/{key:012d}.jpg", i)


def _write_flickr(item: BenchmarkSet, data: Path) -> None:
    """The release with two images of two and one sentences that count, and MDETR's JSON of the same split."""
    split, captions, annotations = _path(item, "annotations", data), [], []
    sentences = [
        [
            "[/EN#1/people The man] with [/EN#2/clothing a red hat] .",
            "[/EN#0/notvisual It] is [/EN#3/scene the street] .",
        ],
        ["[/EN#2/clothing/other A hat] , and [/EN#1/people a man] ."],
    ]
    asked = [
        ("The man with a red hat .", [[[0, 7]], [[13, 22]]], 0, 0), ("It is the street .", [], 0, 1),
        ("A hat , and a man .", [[[0, 5]], [[12, 17]]], 1, 0),
    ]  # fmt: skip
    split.parent.mkdir(parents=True, exist_ok=True)
    split.write_text("1001\n1002\n")
    for folder in ("Annotations", "Sentences"):
        (split.parent / folder).mkdir(exist_ok=True)
    for i, lines in enumerate(sentences):
        objects = "".join(
            f"<object><name>{chain}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for chain, (x, y, w, h) in zip((1, 2), boxes_of(1))
        )
        scene = "<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>"
        (split.parent / f"Annotations/{1001 + i}.xml").write_text(f"<annotation>{objects}{scene}</annotation>")
        (split.parent / f"Sentences/{1001 + i}.txt").write_text("\n".join(lines) + "\n")
        write_image(_path(item, "images", data) / f"{1001 + i}.jpg", 1)
    for number, (caption, phrases, image, sentence) in enumerate(asked):
        captions.append({
            "id": number, "file_name": f"{1001 + image}.jpg", "height": str(HEIGHT), "width": str(WIDTH), "caption": caption,
            "dataset_name": "flickr", "tokens_negative": [[0, len(caption)]], "sentence_id": sentence, "original_img_id": 1001 + image,
            "tokens_positive_eval": phrases,
        })  # fmt: skip
        annotations += [
            {"id": len(annotations) + k, "image_id": number, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
             "tokens_positive": spans}
            for k, (spans, box) in enumerate(zip(phrases, boxes_of(1)))
        ]  # fmt: skip
    content = {"images": captions, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    _write(_path(item, "captions", data), content)


def _write_expressions(item: BenchmarkSet, data: Path) -> None:
    """RefCOCO's: three expressions of two images; gRefCOCO's: also two targets, and none."""
    captions = ["the red thing", "blue thing on the right.", "the green one"]
    files = ["COCO_train2014_000000000021.jpg", "COCO_train2014_000000000021.jpg", "COCO_train2014_000000000022.jpg"]
    boxes = [[boxes_of(2)[0]], [boxes_of(2)[1]], [boxes_of(2)[2]]]
    dataset = item.name.rpartition("_")[0]
    if dataset == "grefcoco":
        captions, files, boxes = (
            [*captions, "all things", "a horse"],
            [*files, files[0], files[2]],
            [*boxes, boxes_of(2)[:2], []],
        )
    images = [
        {"id": i, "file_name": file, "height": HEIGHT, "width": WIDTH, "original_id": int(file[-6:-4]), "caption": caption,
         "dataset_name": dataset, "tokens_negative": [[0, len(caption)]]}
        for i, (caption, file) in enumerate(zip(captions, files))
    ]  # fmt: skip
    annotations: list[dict[str, Any]] = []
    for i, own in enumerate(boxes):
        for box in own:
            annotations.append({"image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                                "tokens_positive": [[0, 3]]})  # fmt: skip
        if not own:
            annotations.append(
                {"image_id": i, "category_id": -1, "bbox": [0, 0, 0, 0], "area": -1, "iscrowd": -1, "empty": True}
            )
    content = {"images": images, "annotations": [{"id": i, **a} for i, a in enumerate(annotations)],
               "categories": [{"id": 1, "name": "object"}]}  # fmt: skip
    _write(_path(item, "annotations", data), content)
    for file in files:
        write_image(_path(item, "images", data) / file, 2)


def _write_d3(item: BenchmarkSet, data: Path) -> None:
    """Two groups of two images; sentence 3 of the second group is true of an image of the first (outer)."""
    texts = [
        (1, "a red thing", False),
        (2, "a thing without green", True),
        (3, "the blue thing on the right of it", False),
        (4, "a dog.", False),
    ]
    group_of = {0: 0, 1: 0, 2: 1, 3: 1}
    true = [(0, [1, 3], 0), (1, [1], 0), (1, [2], 1), (2, [3], 0), (2, [4], 1)]  # image, sentences, number of the box
    annotations = {
        i: {"id": i, "sent_id": sentences, "image_id": image, "group_id": group_of[image], "bbox": np.array([boxes_of(2)[box]]),
            "area": np.array([boxes_of(2)[box][2] * boxes_of(2)[box][3]]), "iscrowd": 0, "segmentation": [{"counts": b"", "size": [HEIGHT, WIDTH]}]}
        for i, (image, sentences, box) in enumerate(true)
    }  # fmt: skip
    inner = {0: [1, 2], 1: [3, 4]}
    tables = {
        "sentences": {key: {"id": key, "anno_id": [i for i, a in annotations.items() if key in a["sent_id"]],
                            "group_id": [g for g, own in inner.items() if key in own], "is_negative": negative, "raw_sent": text}
                      for key, text, negative in texts},
        "annotations": annotations,
        "images": {key: {"id": key, "file_name": f"scene/{key}.jpg", "height": HEIGHT, "width": WIDTH, "group_id": group,
                         "anno_id": [i for i, a in annotations.items() if a["image_id"] == key]} for key, group in group_of.items()},
        "groups": {key: {"id": key, "pos_sent_id": own, "inner_sent_id": own, "outer_sent_id": [3] if key == 0 else [],
                         "img_id": [i for i, g in group_of.items() if g == key], "scene": ["street"], "group_name": f"group{key}"}
                   for key, own in inner.items()},
    }  # fmt: skip
    folder = _path(item, "pickles", data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(table))
    for part, wanted in (("full", (True, False)), ("pres", (False,)), ("abs", (True,))):
        kept = {key: text for key, text, negative in texts if negative in wanted}
        rows = [
            {"image_id": image, "category_id": key, "bbox": boxes_of(2)[box], "area": 100, "iscrowd": 0}
            for image, sentences, box in true for key in sentences if key in kept and key in inner[group_of[image]]
        ]  # fmt: skip
        _write(_path(item, "annotations", data).with_name(f"d3_{part}_annotations.json"), {
            "images": [{k: image[k] for k in ("id", "file_name", "height", "width")} for image in tables["images"].values()],
            "categories": [{"id": key, "name": text} for key, text in kept.items()],
            "annotations": [{"id": i, **row} for i, row in enumerate(rows)],
        })  # fmt: skip
    for image in group_of:
        write_image(_path(item, "images", data) / f"scene/{image}.jpg", 2)


def _write_omnilabel(item: BenchmarkSet, data: Path) -> None:
    """Two images with a label space each: categories and descriptions, true and false ones."""
    images = [
        {"id": 7, "file_name": "coco/val2017/000000000007.jpg"},
        {"id": 9, "file_name": "object365/patch1/v1_9.jpg"},
    ]
    texts = [(30, "Person", "object_category", [7, 9]), (31, "Cat", "object_category", [7]),
             (21, "the red thing that stands on the left.", "object_description", [7]), (22, "not the blue thing", "object_description", [9, 7])]  # fmt: skip
    descriptions = [
        {"id": key, "text": text, "image_ids": own, "anno_info": {"type": kind, "orig_id": key}}
        for key, text, kind, own in texts
    ]
    true = [(7, 0, [30]), (7, 1, [21]), (9, 0, [22]), (9, 1, [30, 22])]
    annotations = [
        {"id": i, "image_id": image, "bbox": boxes_of(2)[box], "description_ids": own}
        for i, (image, box, own) in enumerate(true, 1)
    ]
    _write(
        _path(item, "annotations", data), {"images": images, "descriptions": descriptions, "annotations": annotations}
    )
    for image in images:
        write_image(_path(item, "images", data) / str(image["file_name"]), 2)
