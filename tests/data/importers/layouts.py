"""A small example of every format in its official layout, and how to open it."""

import functools
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glip_jax.data.importers.caption_files import open_caption_lines, open_caption_tsv, open_sbu, open_webdataset
from glip_jax.data.importers.coco import open_coco, open_odinw
from glip_jax.data.importers.entry import ImportSource
from glip_jax.data.importers.flickr30k import open_flickr30k
from glip_jax.data.importers.label_studio import open_label_studio
from glip_jax.data.importers.labelme import open_labelme
from glip_jax.data.importers.mdetr import MIXED_FOLDERS, open_coco_captions, open_mdetr
from glip_jax.data.importers.odvg import open_odvg
from glip_jax.data.importers.openimages import open_openimages
from glip_jax.data.importers.tfds import open_tfds
from glip_jax.data.importers.tsv import open_tsv
from glip_jax.data.importers.visual_genome import open_visual_genome
from glip_jax.data.importers.voc import open_voc
from glip_jax.data.importers.yolo import open_yolo
from tests.data.conftest import coco_json, mdetr_json, write_image
from tests.data.importers.prepared_set import prepare
from tests.data.importers.test_flickr30k import SENTENCES, XML
from tests.data.importers.test_tsv import DETECTION, V1, V2, container

__all__ = ["LABELME", "LAYOUTS", "REGIONS", "TASKS", "Layout"]

SIZES = [(24, 32)] * 3


@dataclass(frozen=True)
class Layout:
    """A format; `make` writes its files into a folder with pictures/img0.png to img2.png."""

    make: Callable[[Path], dict[str, str]]
    """Returns the kind (see `mutations.mutated`) of each annotation file, by path below the folder."""
    open: Callable[[Path], ImportSource]
    command: str
    """Arguments of the job `data` for the same import; {p} is the folder."""
    records: int = 3


def _json_file(name: str, data: Any) -> Callable[[Path], dict[str, str]]:
    def make(folder: Path) -> dict[str, str]:
        (folder / name).write_text(json.dumps(data))
        return {name: "json"}

    return make


def _texts(files: dict[str, str], kind: str = "text") -> Callable[[Path], dict[str, str]]:
    def make(folder: Path) -> dict[str, str]:
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return dict.fromkeys(files, kind)

    return make


def _lvis() -> dict[str, Any]:
    data = coco_json(SIZES)
    for image in data["images"]:
        name = image.pop("file_name")
        image |= {
            "coco_url": f"http://images.cocodataset.org/train2017/{name}",
            "neg_category_ids": [6],
            "not_exhaustive_category_ids": [1],
        }
    for category in data["categories"]:
        category |= {"synset": "x.n.01", "synonyms": [category["name"]], "def": "a thing", "frequency": "c"}
    return data


def _objects365() -> dict[str, Any]:
    data = coco_json(SIZES)
    for image in data["images"]:
        image["file_name"] = f"images/v1/patch0/{image['file_name']}"
    for note in data["annotations"]:
        note |= {"isfake": 0, "isreflected": 0, "area": 30.5}
    return data


def _roboflow() -> dict[str, Any]:
    data = coco_json(SIZES)
    data["categories"] = [
        {"id": 0, "name": "things", "supercategory": "none"},
        *({**category, "supercategory": "things"} for category in data["categories"]),
    ]
    return data


def _mixed() -> dict[str, Any]:
    data = mdetr_json(SIZES)
    for image in data["images"]:
        image["data_source"] = "vg"
    return data


def _coco_captions() -> dict[str, Any]:
    data = coco_json(SIZES, 0)
    data["annotations"] = [{"id": i, "image_id": i % 3 + 1, "caption": f"a dog {i}"} for i in range(5)]
    return data


def _flickr(folder: Path) -> dict[str, str]:
    sentences = "".join(SENTENCES.splitlines(True)[:2])
    files = {"Annotations/img0.xml": XML, "Sentences/img0.txt": sentences, "train.txt": "img0\n"}
    write_image(folder / "pictures" / "img0.jpg", 24, 32, 0)
    return _texts(files)(folder)


def _tar(folder: Path) -> dict[str, str]:
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(3):
            image = (folder / "pictures" / f"img{i}.png").read_bytes()
            about = json.dumps({"caption": f"a dog {i}", "key": f"{i:05d}"}).encode()
            for suffix, data in (("png", image), ("json", about), ("txt", f"a dog {i}".encode())):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"00000.tar": "bytes"}


def _container(labels: list[Any]) -> Callable[[Path], dict[str, str]]:
    def make(folder: Path) -> dict[str, str]:
        container(folder, labels)
        (folder / "lines").write_text("2\n0\n1\n")
        with (folder / "train.yaml").open("a") as file:
            file.write("linelist: lines\n")
        (folder / "one.jpg").unlink()
        names = ["train.yaml", "train.img.tsv", "train.label.tsv", "train.hw.tsv", "map.json", "lines"]
        names += [f"train.{part}.lineidx" for part in ("img", "label", "hw")]
        return {name: "json" if name.endswith("json") else "text" for name in names}

    return make


_OPEN_IMAGES = {
    "train-annotations-bbox.csv": (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
        + "".join(f"img{i},xclick,/m/01,1,0.1,0.5,0.2,0.{6 + i},0,0,0,0,0\n" for i in range(3))
        + "img0,xclick,/m/02,1,0.3,0.9,0.2,0.8,0,0,0,0,0\n"
    ),
    "class-descriptions-boxable.csv": "/m/01,Dog\n/m/02,Cat\n/m/03,Animal\n",
    "labels.csv": "ImageID,Source,LabelName,Confidence\nimg0,verification,/m/03,1\nimg1,verification,/m/02,0\n",
}
_HIERARCHY = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [{"LabelName": "/m/03", "Subcategory": [{"LabelName": "/m/01"}, {"LabelName": "/m/02"}]}],
}


def _open_images(folder: Path) -> dict[str, str]:
    for i in range(3):
        write_image(folder / "pictures" / f"img{i}.jpg", 24, 32, i)
        (folder / "pictures" / f"img{i}.png").unlink()
    return _texts(_OPEN_IMAGES)(folder) | _json_file("hierarchy.json", _HIERARCHY)(folder)


def _visual_genome(folder: Path) -> dict[str, str]:
    about = [
        {
            "image_id": i,
            "width": 32,
            "height": 24,
            "coco_id": None,
            "flickr_id": 5 + i,
            "url": f"https://x.edu/VG/img{i}.png",
        }
        for i in range(3)
    ]
    things = [
        {"object_id": 9 * i + k, "x": 2 + k, "y": 3, "w": 6, "h": 7, "names": ["Dog", "hound"][: k + 1], "synsets": ["dog.n.01"]}
        for i in range(3) for k in range(2)
    ]  # fmt: skip
    objects = [{"image_id": i, "image_url": about[i]["url"], "objects": things[2 * i : 2 * i + 2]} for i in range(3)]
    return _json_file("image_data.json", about)(folder) | _json_file("objects.json", objects)(folder)


@functools.cache
def _prepared() -> dict[str, bytes]:
    """Files of a TFDS set; cached, because writing one takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def _tfds(folder: Path) -> dict[str, str]:
    (folder / "tiny" / "1.0.0").mkdir(parents=True)
    for name, data in _prepared().items():
        (folder / "tiny" / "1.0.0" / name).write_bytes(data)
    kinds = {"features.json": "json", "dataset_info.json": "json"}
    return {f"tiny/1.0.0/{name}": kinds.get(name, "bytes") for name in _prepared()}


_VOC = """<annotation>
  <folder>JPEGImages</folder><filename>img{i}.png</filename><size><width>32</width><height>24</height><depth>3</depth></size>
  <object><name>dog</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>15</ymax></bndbox></object>
  <object><name>cat</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>32</xmax><ymax>24</ymax></bndbox></object>
</annotation>
"""
_VOC_FILES = {f"Annotations/img{i}.xml": _VOC.replace("{i}", str(i)) for i in range(3)}
_YAML = "path: elsewhere\ntrain: ../pictures\nval: pictures\nnc: 2\nnames: [dog, cat]\n"
_YOLO_LABELS = "0 0.21875 0.375 0.3125 0.5\n1 0.25 0.25 0.5 0.25 0.5 0.5\n"
_YOLO_FILES = {f"pictures/img{i}.txt": _YOLO_LABELS for i in range(3)}
_DETECTION_LINE = {"detection": {"instances": [{"bbox": [2, 3, 12, 15], "label": 1, "category": "dog"}]}}
_GROUNDING_LINE = {
    "grounding": {
        "caption": "a dog and two cats",
        "regions": [
            {"bbox": [2, 3, 12, 15], "phrase": "a dog", "tokens_positive": [[0, 5]]},
            {"bbox": [[1, 1, 9, 9], [9, 9, 30, 20]], "phrase": "two cats"},
        ],
    },
    "conversations": [{"from": "human", "value": "what is there?"}],
}
_ODVG_LINES = "\n".join(
    json.dumps({"filename": f"img{i}.png", "height": 24, "width": 32, **line})
    for i, line in enumerate([_DETECTION_LINE, _GROUNDING_LINE, _DETECTION_LINE | _GROUNDING_LINE])
)
LABELME = {
    "version": "5.5.0", "flags": {}, "imageData": None, "imageHeight": 24, "imageWidth": 32,
    "shapes": [
        {"label": "dog", "points": [[12, 15], [2, 3]], "shape_type": "rectangle", "flags": {}},
        {"label": "cat", "points": [[10, 4], [20, 8], [12, 20]], "shape_type": "polygon"},
        {"label": "dog", "points": [[16, 12], [19, 16]], "shape_type": "circle"},
    ],
}  # fmt: skip
_LABELME_FILES = {f"pictures/img{i}.json": json.dumps({**LABELME, "imagePath": f"img{i}.png"}) for i in range(3)}
_REGION = {
    "type": "rectanglelabels",
    "original_width": 32,
    "original_height": 24,
    "image_rotation": 0,
    "from_name": "label",
}
REGIONS = [
    {**_REGION, "id": "a", "value": {"x": 6.25, "y": 12.5, "width": 31.25, "height": 50, "rotation": 0, "rectanglelabels": ["dog"]}},
    {**_REGION, "id": "b", "value": {"x": 50, "y": 25, "width": 25, "height": 25, "rotation": 90, "rectanglelabels": ["cat"]}},
    {**_REGION, "id": "c", "type": "polygonlabels", "value": {"points": [[25, 25], [50, 25], [50, 75]], "polygonlabels": ["cat"]}},
    {"id": "e", "type": "choices", "value": {"choices": ["day"]}},
]  # fmt: skip
TASKS = [
    {"id": i, "data": {"image": f"/data/upload/7/3f9a0c2{i}-img{i}.png"}, "annotations": [
        {"id": 9, "was_cancelled": True, "result": []}, {"id": 10 + i, "was_cancelled": False, "result": REGIONS}]}
    for i in range(3)
]  # fmt: skip

_SBU = {
    "SBU_captioned_photo_dataset_urls.txt": "".join(f"http://flickr.com/1/img{i}.png\n" for i in range(3)),
    "SBU_captioned_photo_dataset_captions.txt": "a dog\nthe cat\na bird \N{SNOWMAN}\n",
}
_LINES = "\n".join(json.dumps({"image": f"img{i}.png", "caption": f"a dog {i}"}) for i in range(3))

LAYOUTS: dict[str, Layout] = {
    "coco": Layout(
        _json_file("a.json", coco_json(SIZES)), lambda p: open_coco(p / "a.json", p / "pictures"),
        "coco {p}/a.json --images={p}/pictures",
    ),
    "lvis": Layout(
        _json_file("a.json", _lvis()), lambda p: open_coco(p / "a.json", p / "pictures"),
        "lvis {p}/a.json --images={p}/pictures",
    ),
    "objects365": Layout(
        _json_file("a.json", _objects365()), lambda p: open_coco(p / "a.json", p / "pictures"),
        "objects365 {p}/a.json --images={p}/pictures",
    ),
    "odinw": Layout(
        _json_file("pictures/_annotations.coco.json", _roboflow()), lambda p: open_odinw(p / "pictures"),
        "odinw {p}/pictures",
    ),
    "openimages": Layout(
        _open_images,
        lambda p: open_openimages(
            p / "train-annotations-bbox.csv", p / "pictures", classes=p / "class-descriptions-boxable.csv",
            hierarchy=p / "hierarchy.json", labels=p / "labels.csv",
        ),
        "openimages {p}/train-annotations-bbox.csv --images={p}/pictures --classes={p}/class-descriptions-boxable.csv "
        "--hierarchy={p}/hierarchy.json --labels={p}/labels.csv",
    ),
    "visual-genome": Layout(
        _visual_genome,
        lambda p: open_visual_genome(p / "objects.json", p / "pictures", image_data=p / "image_data.json"),
        "visual-genome {p}/objects.json --images={p}/pictures --image-data={p}/image_data.json",
    ),
    "mdetr": Layout(
        _json_file("a.json", mdetr_json(SIZES)), lambda p: open_mdetr(p / "a.json", p / "pictures"),
        "mdetr {p}/a.json --images={p}/pictures",
    ),
    "mixed": Layout(
        _json_file("a.json", _mixed()),
        lambda p: open_mdetr(p / "a.json", p / "pictures", folders=MIXED_FOLDERS | {"vg": ""}),
        "mdetr {p}/a.json --images={p}/pictures --folders=coco=,vg=",
    ),
    "flickr30k": Layout(
        _flickr, lambda p: open_flickr30k(p, p / "pictures", split=p / "train.txt"),
        "flickr30k {p} --images={p}/pictures --split={p}/train.txt", records=2,
    ),
    "coco-captions": Layout(
        _json_file("a.json", _coco_captions()), lambda p: open_coco_captions(p / "a.json", p / "pictures"),
        "coco-captions {p}/a.json --images={p}/pictures", records=5,
    ),
    "caption-tsv": Layout(
        _texts({"a.tsv": "a dog\timg0.png\nthe cat\timg1.png\na bird \N{SNOWMAN}\timg2.png\n"}),
        lambda p: open_caption_tsv(p / "a.tsv", p / "pictures"),
        "caption-tsv {p}/a.tsv --images={p}/pictures",
    ),
    "caption-lines": Layout(
        _texts({"a.jsonl": _LINES}, "jsonl"), lambda p: open_caption_lines(p / "a.jsonl", p / "pictures"),
        "caption-lines {p}/a.jsonl --images={p}/pictures",
    ),
    "sbu": Layout(_texts(_SBU), lambda p: open_sbu(p, p / "pictures"), "sbu {p} --images={p}/pictures"),
    "sbu-json": Layout(
        _json_file("a.json", {"image_urls": ["img0.png", "x/img1.png", "img2.png"], "captions": ["a", "b", "c"]}),
        lambda p: open_sbu(p / "a.json", p / "pictures"), "sbu {p}/a.json --images={p}/pictures",
    ),
    "webdataset": Layout(
        _tar, lambda p: open_webdataset(p / "00000.tar"), "webdataset {p}/00000.tar",
    ),
    "tfds": Layout(_tfds, lambda p: open_tfds(p / "tiny" / "1.0.0"), "tfds {p}/tiny/1.0.0"),
    "tsv-detection": Layout(
        _container(DETECTION), lambda p: open_tsv(p / "train.yaml", kind="detection"),
        "tsv {p}/train.yaml --kind=detection",
    ),
    "tsv-pseudo": Layout(
        _container([V1, V2, V1]), lambda p: open_tsv(p / "train.yaml", kind="pseudo", oversample=True),
        "tsv {p}/train.yaml --kind=pseudo --oversample",
    ),
    "voc": Layout(
        _texts(_VOC_FILES), lambda p: open_voc(p / "Annotations", p / "pictures"),
        "voc {p}/Annotations --images={p}/pictures",
    ),
    "yolo": Layout(
        _texts({"data.yaml": _YAML, **_YOLO_FILES}), lambda p: open_yolo(p / "data.yaml"), "yolo {p}/data.yaml",
    ),
    "odvg": Layout(
        _texts({"a.jsonl": _ODVG_LINES}, "jsonl"), lambda p: open_odvg(p / "a.jsonl", p / "pictures"),
        "odvg {p}/a.jsonl --images={p}/pictures", records=4,
    ),
    "labelme": Layout(
        _texts(_LABELME_FILES, "json"), lambda p: open_labelme(p / "pictures", p / "pictures"),
        "labelme {p}/pictures --images={p}/pictures",
    ),
    "label-studio": Layout(
        _json_file("a.json", TASKS), lambda p: open_label_studio(p / "a.json", p / "pictures"),
        "label-studio {p}/a.json --images={p}/pictures",
    ),
}  # fmt: skip
"""Layouts by name."""
