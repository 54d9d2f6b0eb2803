"""Two small sources, detection and grounding, made once per test process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glip_jax.data import shards
from glip_jax.data.importers.coco import open_coco
from glip_jax.data.importers.entry import ImportSource, make_record
from glip_jax.data.importers.mdetr import open_mdetr
from glip_jax.data.records import Record

NAMES = ["person", "dog", "traffic light", "cell phone", "cat_(animal)", "table"]
CAPTION = "a man near the old red table holding two small dogs"


def write_image(path: Path, height: int, width: int, seed: int) -> None:
    """Coarse noise as PNG, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path)


def saved(folder: Path, data: Any, name: str = "a.json") -> Path:
    """Writes a text, or another value as JSON, into `folder`."""
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / name


def coco_json(sizes: list[tuple[int, int]], boxes: int = 3) -> dict:
    """Images img<i>.png of the given (height, width) with `boxes` boxes each."""
    images = [{"id": i + 1, "file_name": f"img{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    notes = [
        {"image_id": i + 1, "bbox": [2 + k, 3, 6 + k, 5 + k], "category_id": (i + k) % len(NAMES) + 1, "iscrowd": 0}
        for i in range(len(sizes))
        for k in range(boxes)
    ]
    for i, note in enumerate(notes):
        note["id"] = i + 1
    return {
        "images": images,
        "annotations": notes,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
    }


def mdetr_json(sizes: list[tuple[int, int]]) -> dict:
    """The same pictures with a caption and two phrases each."""
    data = coco_json(sizes, 2)
    for image in data["images"]:
        image["caption"] = CAPTION
    for i, note in enumerate(data["annotations"]):
        note["tokens_positive"] = [[2, 5]] if i % 2 else [[15, 18], [23, 28]]
    return data


def records(opened: ImportSource) -> list[Record]:
    """All records of an opened source, its pictures read."""
    made = (make_record(entry, opened.images, opened.report) for entry in opened.entries)
    return [record for record in made if record is not None]


SIZES = [(24, 32)] * 9 + [(32, 24)] * 5 + [(28, 28)] * 3
"""Landscape, portrait, square."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of shards `boxes` (17 records) and `captions` (14, none of them square), pictures and JSON files."""
    root = tmp_path_factory.mktemp("sources")
    pictures = root / "pictures"
    pictures.mkdir()
    for i, (height, width) in enumerate(SIZES):
        write_image(pictures / f"img{i}.png", height, width, i)
    (root / "boxes.json").write_text(json.dumps(coco_json(SIZES)))
    (root / "captions.json").write_text(json.dumps(mdetr_json(SIZES[:14])))
    boxes = open_coco(root / "boxes.json", pictures)
    shards.write(records(boxes), root / "boxes", name="boxes", names=boxes.names, shards=3)
    captions = open_mdetr(root / "captions.json", pictures)
    shards.write(records(captions), root / "captions", name="captions", shards=2)
    return {"root": root, "pictures": pictures, "boxes": root / "boxes", "captions": root / "captions"}
