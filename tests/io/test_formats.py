"""What was given in place of another file or folder is called by its name, with what reads it."""

import gzip
import io
import json
import pickle
import re
import tarfile
import typing
import zipfile
from pathlib import Path

import pytest
from etils import epath

from glip_jax import UserError
from glip_jax.cli.data import Format
from glip_jax.evaluation.average_precision import load_ground_truth
from glip_jax.evaluation.recall import load_grounding
from glip_jax.io import formats
from glip_jax.weights.readers import read_arrays
from tests.data.conftest import coco_json, mdetr_json
from tests.run_job import run_job

_NONE = "which no format of `data` reads"
_CAPTIONS = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
_COCO = coco_json([(24, 32)])
_LABELME = {
    "version": "5.5.0",
    "imagePath": "0.jpg",
    "imageData": None,
    "shapes": [{"label": "dog", "points": [[2, 3], [4, 5]]}],
}
_VOC = "<annotation><filename>0.jpg</filename><object><name>dog</name></object></annotation>"
_ODVG = '{"filename": "0.jpg", "grounding": {"caption": "a dog", "regions": []}}\n'
_VIA = {"0.jpg900": {"filename": "0.jpg", "size": 900, "regions": [], "file_attributes": {}}}


def _tar(compression: str = "") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        tar.addfile(tarfile.TarInfo("a.jpg"))
    return data.getvalue()


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.json", "{}")
    return data.getvalue()


FILES: dict[str, tuple[typing.Any, str]] = {
    "0.xml": (_VOC, "import it with `data voc` (give the folder of these files)"),
    "cvat.xml": ('<annotations><image id="0"></image></annotations>', "export of CVAT"),
    "data.yaml": ("train: images\nnames:\n  0: dog\n", "is data.yaml of YOLO: import it with `data yolo`"),
    "0.txt": ("0 0.18 0.21 0.31 0.31\n1 0.7 -0.5 0.4 0.6\n", "is a label file of YOLO"),
    "polygon.txt": ("0 0.18 0.21 0.31 0.31 0.4 0.5\n", "is a label file of YOLO"),
    "kitti.txt": ("Car 0.00 0 -1.57 599.4 156.4 629.7 189.2 2.85 2.63 12.3 0.47 1.49 69.44 -1.56\n", "KITTI"),
    "odvg.jsonl": (2 * _ODVG, "is ODVG"),
    "one.jsonl": (_ODVG, "is ODVG"),
    "map.json": ({"0": "dog", "1": "cat"}, "label map"),
    "labelme.json": (_LABELME, "is a file of LabelMe"),
    "studio.json": ([{"id": 1, "data": {"image": "0.jpg"}, "annotations": []}], "is an export of Label Studio"),
    "via.json": (_VIA, "is an export of VIA"),
    "project.json": ({"_via_settings": {}, "_via_img_metadata": {}}, "is a project of VIA"),
    "createml.json": ([{"image": "0", "annotations": [{"label": "a", "coordinates": {"x": 1}}]}], "CreateML"),
    "tf.csv": ("filename,width,height,class,xmin,ymin,xmax,ymax\n0.jpg,64,48,dog,2,3,22,18\n", "TensorFlow's object detection"),
    "retina.csv": ("a/0.jpg,2,3,22,18,dog\na/1.jpg,2,3,22,18,cat\n", "is a CSV of boxes"),
    "boxes.csv": ("ImageID,Source,LabelName,XMin\n", "import it with `data openimages`"),
    "hf.jsonl": ('{"file_name": "0.jpg", "objects": {"bbox": [], "categories": []}}\n', "Hugging Face image folder with boxes"),
    "text.jsonl": (2 * '{"file_name": "0.jpg", "text": "a dog"}\n', "`data caption-lines` (with --image-key=file_name"),
    "refs(unc).p": (pickle.dumps([{"ref_id": 1, "sentences": [{"sent": "a dog"}]}]), "RefCOCO's references (a pickle"),
    "old.p": (pickle.dumps([1], 0), "is a pickle of Python"),
    "a.parquet": (b"PAR1\x15\x04", "is a Parquet table"),
    "voc.tfrecord-00000-of-00001": (b"\x10\0\0\0\0\0\0\0abcd\x0a\x0e", "is a TFRecord file"),
    "a.zip": (_zip(), "is a ZIP archive: unpack it first"),
    "a.tar": (_tar(), "is a tar archive: import it with `data webdataset`"),
    "a.tgz": (_tar("gz"), "is a packed tar archive (tar.gz)"),
    "a.json.gz": (gzip.compress(b"{}"), "is a gzip archive: unpack it first (gunzip)"),
    "page.json": ("\n<!DOCTYPE html><html>", "is an HTML page"),
    "denied.json": ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "error message of a storage"),
    "lfs.json": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
    "photo.json": (b"\xff\xd8\xff\xe0", "is a JPEG image"),
    "wide.json": ("{}".encode("utf-16"), "is text in UTF-16: save it as UTF-8"),
    "coco.json": (_COCO, "import it with `data coco`"),
    "mark.json": (b"\xef\xbb\xbf" + json.dumps(_COCO).encode(), "import it with `data coco`"),
    "mdetr.json": (mdetr_json([(24, 32)]), "import it with `data mdetr`"),
    "captions.json": (_CAPTIONS, "import it with `data coco-captions`"),
    "results.json": ([{"image_id": 1, "category_id": 1, "bbox": [], "score": 0.5}], "is COCO's results"),
    "x.yaml": ("img: a.tsv\nlabel: b.tsv\n", "import it with `data tsv`"),
    "notes.txt": ("a list of things\nto do\n", ""),
    "empty.json": ("", ""),
    "broken.json": ('{"a": [1, ', ""),
}  # fmt: skip


def _content(value: typing.Any) -> bytes:
    if isinstance(value, dict | list):
        return json.dumps(value).encode()
    return value.encode() if isinstance(value, str) else value


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    value, expected = FILES[name]
    (tmp_path / name).write_bytes(_content(value))
    found = formats.explain(tmp_path / name)
    assert expected in found and bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"Annotations/0.xml": _VOC, "JPEGImages/0.jpg": ""}, "is a folder of Pascal VOC annotations (XML)"),
        ({"0.xml": _VOC, "0.jpg": ""}, "is a folder of Pascal VOC annotations (XML)"),
        ({"VOC2012/Annotations/0.xml": _VOC}, "is a folder; VOC2012 in it is a folder of Pascal VOC"),
        ({"data.yaml": "nc: 1", "images/0.jpg": ""}, "is a folder of YOLO"),
        ({"0.txt": "0 0.1 0.2 0.3 0.4\n", "classes.txt": "dog\n"}, "is a folder of YOLO"),
        ({"0.json": json.dumps(_LABELME)}, "is a folder of LabelMe files"),
        ({"annotations/instances_val2017.json": "{}"}, "such as annotations/instances_val2017.json"),
        ({"_annotations.coco.json": "{}", "0.jpg": ""}, "import it with `data odinw`"),
        ({"00000.tar": ""}, "import it with `data webdataset`"),
        ({"Annotations/0.xml": "", "Sentences/0.txt": ""}, "import it with `data flickr30k`"),
        ({"train-00000.parquet": ""}, "Parquet"),
        ({"voc-train.tfrecord-00000-of-00001": ""}, "TFRecord"),
        ({"metadata.jsonl": "", "0.jpg": ""}, "image folder of Hugging Face"),
        ({"0.jpg": ""}, "is a folder of images"),
        ({"manifest.json": "{}", "columns.npz": ""}, "is a folder of shards, which is imported already"),
        ({}, "is an empty folder"),
    ],
)
def test_folders(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    (tmp_path / "given").mkdir()
    for name, text in files.items():
        (tmp_path / "given" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "given" / name).write_text(text)
    assert expected in formats.explain(tmp_path / "given")


def test_the_list_of_formats_is_that_of_the_job() -> None:
    kinds = [kind for part in typing.get_args(Format) for kind in (typing.get_args(part)[0],)]
    names = tuple(re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower() for kind in kinds)
    assert names == formats.IMPORT_FORMATS


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("coco {}/voc --images={}", "voc is a folder, expected a file; it is a folder of Pascal VOC annotations"),
        ("coco {}/odvg.jsonl --images={}", "odvg.jsonl is ODVG"),
        ("coco {}/coco.json --images={}/a.zip", "a.zip is a file, it is a ZIP archive: unpack it first: set --images"),
        ("coco {}/labelme.json --images={}", "it is a file of LabelMe"),
        ("coco {}/createml.json --images={}", "it is a file of CreateML"),
        ("coco {}/captions.json --images={}", "import it with `data coco-captions`"),
        ("mdetr {}/coco.json --images={}", "import it with `data coco`"),
        ("caption-lines {}/odvg.jsonl --images={}", "odvg.jsonl is ODVG"),
        ("odinw {}/voc", "is a folder of Pascal VOC annotations"),
        ("tsv {}/data.yaml --kind=detection", "is data.yaml of YOLO"),
        ("openimages {}/tf.csv --classes={}/voc --images={}", "voc is a folder, expected a file"),
        ("webdataset {}/voc", "is a folder of Pascal VOC annotations"),
        ("flickr30k {}/voc --images={}", "is a folder of Pascal VOC annotations"),
        ("sbu {}/voc --images={}", "is a folder of Pascal VOC annotations"),
    ],
)
def test_the_job_says_it_in_its_one_line(tmp_path: Path, capsys, command: str, expected: str) -> None:
    for name in (
        "a.zip",
        "odvg.jsonl",
        "labelme.json",
        "createml.json",
        "captions.json",
        "coco.json",
        "data.yaml",
        "tf.csv",
    ):
        (tmp_path / name).write_bytes(_content(FILES[name][0]))
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "0.xml").write_text(_VOC)
    assert (
        run_job("data", [*command.replace("{}", str(tmp_path)).split(), f"--out={tmp_path}/out", "--processes=1"]) == 2
    )
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "copy it" not in error


@pytest.mark.parametrize(
    ("name", "expected"),
    [("voc", "voc is a folder"), ("odvg.jsonl", "is ODVG"), ("studio.json", "it is an export of Label Studio")],
)
def test_an_evaluation_says_it_too(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "voc").mkdir()
    if name in FILES:
        (tmp_path / name).write_bytes(_content(FILES[name][0]))
    for load in (load_ground_truth, load_grounding):
        with pytest.raises(UserError, match=expected):
            load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["page.json", "lfs.json", "a.tgz", "a.parquet", "photo.json"])
def test_a_file_of_weights_is_something_else(tmp_path: Path, name: str) -> None:
    for given in ("x.pth", "x.safetensors"):
        (tmp_path / given).write_bytes(_content(FILES[name][0]))
        with pytest.raises(UserError, match="expected weights"):
            read_arrays(epath.Path(tmp_path / given))
