"""Recognizes what a file or folder is that was given in place of another, by its first bytes, keys and names.

Readers call `explain` where a file is not what they expect, so that the message names what was found and what reads it.
"""

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterable
from typing import IO, Any, NamedTuple

import ijson
import yaml
from etils import epath

from glip_jax.io import gcs
from glip_jax.io.retry import StorageError

__all__ = ["IMPORT_FORMATS", "Format", "explain", "explain_bytes", "recognize", "recognize_bytes"]

IMPORT_FORMATS = (
    "coco", "lvis", "objects365", "odinw", "openimages", "visual-genome", "tfds", "mdetr", "flickr30k", "tsv", "caption-tsv",
    "caption-lines", "sbu", "coco-captions", "webdataset", "voc", "yolo", "odvg", "labelme", "label-studio",
)  # fmt: skip
"""Formats of the job `data`."""

_HEAD = 1 << 18
"""Bytes of a text that are looked at."""

_EVENTS = 5_000_000
"""Events of a JSON file that are looked at, some hundred megabytes: the list of images may stand before the annotations."""

_CONVERT = "convert it to COCO JSON (FiftyOne, Datumaro and Roboflow do)"
_AGAIN = "download it again, and look at what the server answers"


class Format(NamedTuple):
    """What a file or folder is."""

    what: str
    """With its article, such as "a folder of Pascal VOC annotations (XML)"."""
    reader: str = ""
    """Format of the job `data` that reads it; "": none."""
    advice: str = ""
    """What to do, where that is not to import it with `reader`."""

    @property
    def mended(self) -> str:
        """`what` with the advice, where that holds whatever kind of file was expected in its place."""
        of_annotations = self.reader or self.advice.startswith(("convert", "give", "prepare"))
        return self.what if of_annotations or not self.advice else f"{self.what}: {self.advice}"


def explain(path: epath.PathLike, reader: str = "") -> str:
    """`is WHAT: what to do` for a file or folder of a known format that `reader` does not read; "" for any other.

    `reader`: the format of the job `data` that found it unfit; a file that is of this format is not explained.
    """
    try:
        found = recognize(path)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, StorageError):
            raise
        return ""
    if found is None or (reader and _family(found.reader) == _family(reader)) or _is_packed_text(path, reader):
        return ""
    if found.reader:
        return f"is {found.what}: import it with `data {found.reader}`{f' ({found.advice})' if found.advice else ''}"
    if found.advice != _CONVERT:
        return f"is {found.what}: {found.advice}"
    return f"is {found.what}, which no format of `data` reads: {found.advice}; there are {', '.join(IMPORT_FORMATS)}"


def explain_bytes(path: epath.PathLike) -> str:
    """`is WHAT: what to do` for a pointer, a page, an archive, a table or an image given as a file of weights; "" for others."""
    with gcs.open_file(path, 4096) as file:
        found = recognize_bytes(file.read(4096), epath.Path(path).name)
    if found is None or found.what.startswith(("a ZIP", "a pickle", "a file of weights")):
        return ""
    advice = found.mended.removeprefix(found.what)
    return f"is {found.what}, expected weights{advice}"


def _family(reader: str) -> str:
    """Formats of one kind of file."""
    return "coco" if reader in ("lvis", "objects365", "odinw") else reader


def _is_packed_text(path: epath.PathLike, reader: str) -> bool:
    return reader in ("caption-tsv", "caption-lines", "sbu") and str(path).endswith(".gz")


def recognize(path: epath.PathLike) -> Format | None:
    """What an existing file or folder is; None if it is of no known format. Raises OSError if it cannot be read."""
    if gcs.kind(path) == "folder":
        return _folder(epath.Path(path))
    with gcs.open_file(path) as file:
        head = file.read(_HEAD)
        return recognize_bytes(head, epath.Path(path).name) or _text(head, epath.Path(path).name, file)


# Files by their first bytes --------------------------------------------------------------------------------------------

_MAGIC = (
    (b"version https://git-lfs", Format("a pointer of Git LFS, not the file itself", advice="fetch the file with `git lfs pull`")),
    (b"PAR1", Format("a Parquet table", advice=_CONVERT)),
    (b"ARROW1", Format("an Arrow table", advice=_CONVERT)),
    (b"\x89HDF", Format("an HDF5 file", advice=_CONVERT)),
    (b"MATLAB 5.0 MAT-file", Format("a MATLAB file", advice=_CONVERT)),
    (b"SQLite format 3", Format("an SQLite database", advice=_CONVERT)),
    (b"\x93NUMPY", Format("an array of NumPy", advice=_CONVERT)),
    (b"BZh", Format("a bzip2 archive", advice="unpack it first")),
    (b"\xfd7zXZ\0", Format("an xz archive", advice="unpack it first")),
    (b"\x28\xb5\x2f\xfd", Format("a Zstandard archive", advice="unpack it first")),
    (b"7z\xbc\xaf\x27\x1c", Format("a 7-Zip archive", advice="unpack it first")),
    (b"Rar!", Format("a RAR archive", advice="unpack it first")),
    (b"%PDF", Format("a PDF document", advice="give the file of annotations")),
    (b"\xff\xd8\xff", Format("a JPEG image", advice="give the file of annotations, and the folder of images as --images")),
    (b"\x89PNG", Format("a PNG image", advice="give the file of annotations, and the folder of images as --images")),
    (b"GIF8", Format("a GIF image", advice="give the file of annotations, and the folder of images as --images")),
)  # fmt: skip


def recognize_bytes(head: bytes, name: str = "") -> Format | None:
    """What a file with these first bytes is, if it is no text of annotations: a pointer, a page, an archive, a table, an image."""
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    start = head[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return Format("an HTML page, as a server sends in place of a file", advice=_AGAIN)
    if start.startswith(b"<?xml") and b"<error>" in start:
        return Format("an error message of a storage (XML)", advice=_AGAIN)
    if head.startswith(b"PK\x03\x04"):
        if b"/data.pkl" in head[:256] or b"data.pkl" in head[:64]:
            return Format("a file of weights of PyTorch", advice="read it with the job `import`")
        return Format("a ZIP archive", advice="unpack it first")
    if head.startswith(b"\x1f\x8b"):
        return _gzip(head)
    if _is_tar(head):
        return Format("a tar archive", "webdataset", "if it holds images with captions; otherwise unpack it first")
    if _is_pickle(head):
        if b"ref_id" in head and b"sent" in head:
            return Format("RefCOCO's references (a pickle of Python)", advice=_CONVERT)
        return Format("a pickle of Python", advice=_CONVERT)
    if re.search(r"\.tf_?records?\b|tfrecord-\d", name.lower()) or _is_tfrecord(head):
        return Format("a TFRecord file", advice="prepare the set with `tfds build --file_format=array_record` and `data tfds`, or "
                      "convert it to COCO JSON")  # fmt: skip
    if name.endswith(".array_record"):
        return Format("one shard of a set", advice="give the folder that it lies in")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Format("text in UTF-16", advice="save it as UTF-8")
    return None


def _gzip(head: bytes) -> Format:
    try:
        plain = zlib.decompressobj(31).decompress(head, 4096)
    except zlib.error:
        plain = b""
    packed = "a packed tar archive (tar.gz)" if _is_tar(plain) else "a gzip archive"
    return Format(packed, advice="unpack it first (tar -xzf)" if _is_tar(plain) else "unpack it first (gunzip)")


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _is_pickle(head: bytes) -> bool:
    # Protocol 2 or later; or protocol 0 of a list or dict, as RefCOCO's files: "(lp0", "(dp1".
    return (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or bool(
        re.match(rb"\((?:lp|dp)\d+\n", head)
    )


def _is_tfrecord(head: bytes) -> bool:
    # Length of the first record, its checksum, then a message that begins with the field `features`.
    length = int.from_bytes(head[:8], "little")
    return (
        len(head) > 16 and 0 < length < 1 << 31 and head[3:8] == bytes(5) and head[12:13] == b"\x0a" and 0 in head[:16]
    )


# Texts: JSON, JSON lines, XML, CSV, YAML --------------------------------------------------------------------------------


def _text(head: bytes, name: str, file: IO[bytes]) -> Format | None:
    text = head.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    start = text.lstrip()
    if start[:1] in "{[" and start:
        return _json(text, file)
    if start.startswith("<"):
        return _xml(start)
    lines = [line[:1000] for line in text.splitlines()[:50] if line.strip()]
    if not lines:
        return None
    if len(lines) > 1 and len(text) == _HEAD:
        lines.pop()  # cut
    if all(re.fullmatch(r"\d+(?: +[\d.eE+-]+){4,}", line.strip()) for line in lines):
        return Format(
            "a label file of YOLO",
            "yolo",
            "give its data.yaml, or the folder of the labels with --images and --classes",
        )
    if all(re.fullmatch(r"\S+(?: -?[\d.]+){14,15}", line.strip()) for line in lines):
        return Format("a label file of KITTI", advice=_CONVERT)
    if name.lower().endswith((".yaml", ".yml")):
        return _yaml(text)
    return _csv(lines)


class _Json(NamedTuple):
    """The keys of a JSON text, as far as it was looked at."""

    is_list: bool
    keys: set[str]
    """Of the object, or of the first object in the list."""
    inner: set[str]
    """At any depth."""

    def has(self, *keys: str) -> bool:
        return self.keys.issuperset(keys)


_OBJECTS: tuple[tuple[Callable[[_Json], Any], Format], ...] = (
    (lambda j: j.has("shapes") and ("imagePath" in j.keys or "imageData" in j.keys), Format("a file of LabelMe", "labelme", "give the folder of these files")),
    (lambda j: j.has("_via_img_metadata") or j.has("_via_settings"), Format("a project of VIA", advice=_CONVERT)),
    (lambda j: {"regions", "file_attributes", "filename"} <= j.inner, Format("an export of VIA", advice=_CONVERT)),
    (lambda j: j.has("images", "annotations") and ("tokens_positive" in j.inner or "tokens" in j.inner), Format("captions with boxes in MDETR's format", "mdetr")),
    (lambda j: j.has("images", "annotations") and {"neg_category_ids", "not_exhaustive_category_ids"} & j.inner, Format("LVIS's JSON", "lvis")),
    (lambda j: j.has("images", "annotations") and "caption" in j.inner and "bbox" not in j.inner, Format("COCO's captions", "coco-captions")),
    (lambda j: j.has("images", "annotations") and "bbox" in j.inner, Format("COCO's JSON of boxes", "coco")),
    (lambda j: j.has("images", "annotations", "categories"), Format("COCO's JSON of boxes", "coco")),
    (lambda j: j.has("image_urls", "captions"), Format("SBU's captions", "sbu")),
    (lambda j: j.has("classTitle") or {"classTitle", "points"} <= j.inner, Format("a file of Supervisely", advice=_CONVERT)),
    (lambda j: j.has("assets") and "regions" in j.inner, Format("an export of VoTT", advice=_CONVERT)),
    (lambda j: j.has("categories", "items") and j.has("info"), Format("a file of Datumaro", advice=_CONVERT)),
    (lambda j: j.has("LabelName"), Format("OpenImages' class hierarchy", "openimages", "as its --hierarchy")),
    (lambda j: bool(j.keys) and all(key.isdecimal() for key in j.keys) and j.inner == j.keys, Format("a label map (number to name), as ODVG has beside its annotations", advice="give the file of annotations")),
)  # fmt: skip
_LISTS: tuple[tuple[Callable[[_Json], Any], Format], ...] = (
    (lambda j: j.has("image_id", "category_id", "score"), Format("COCO's results (detections)", advice="label captions with it by `label --detections=FILE --categories=ANNOTATIONS`")),
    (lambda j: (j.has("data") and ("annotations" in j.keys or "completions" in j.keys)) or j.has("image", "annotator"), Format("an export of Label Studio", "label-studio")),
    (lambda j: j.has("annotations") and "coordinates" in j.inner, Format("a file of CreateML", advice=_CONVERT)),
    (lambda j: j.has("objects") and ("image_id" in j.keys or "id" in j.keys), Format("objects.json of Visual Genome", "visual-genome", "with --image-data=image_data.json")),
    (lambda j: j.has("url", "width", "height"), Format("image_data.json of Visual Genome", "visual-genome", "of objects.json, as --image-data")),
    (lambda j: j.has("regions"), Format("region_descriptions.json of Visual Genome", advice=_CONVERT)),
    (lambda j: j.has("ref_id") or j.has("sentences", "ann_id"), Format("RefCOCO's references", advice=_CONVERT)),
    (lambda j: j.has("labels") and {"box2d", "poly2d"} & j.inner, Format("labels of BDD100K", advice=_CONVERT)),
    (lambda j: j.has("conversations"), Format("conversations of LLaVA", advice="write its captions as JSON lines, for `data caption-lines`")),
    (lambda j: j.has("image", "caption"), Format("one JSON list of captions", advice="write an object a line, for `data caption-lines`")),
)  # fmt: skip
_LINES: tuple[tuple[Callable[[_Json], Any], Format], ...] = (
    (lambda j: j.has("filename") and ("detection" in j.keys or "grounding" in j.keys), Format("ODVG (the JSON lines of Open-GroundingDino and MM-Grounding-DINO)", "odvg")),
    (lambda j: j.has("file_name", "objects"), Format("metadata.jsonl of a Hugging Face image folder with boxes", advice=_CONVERT)),
    (lambda j: j.has("file_name"), Format("metadata.jsonl of a Hugging Face image folder", "caption-lines", "with --image-key=file_name and --caption-key=KEY")),
    (lambda j: j.has("image", "caption"), Format("captions of JSON lines", "caption-lines")),
    (lambda _: True, Format("JSON lines (an object a line), not one JSON document", advice="captions are read by `data caption-lines`, with --caption-key and --image-key; convert boxes to COCO JSON")),
)  # fmt: skip


def _json(text: str, file: IO[bytes]) -> Format | None:
    lines = [line for line in text.split("\n") if line.strip()]
    first = _loaded(lines[0])
    if isinstance(first, dict) and len(lines) > 1 and lines[1].lstrip().startswith("{"):
        rules, found = _LINES, _Json(False, set(first), set())
    else:
        found = _json_keys(file)
        rules = _LISTS if found.is_list else _OBJECTS
        if isinstance(first, dict) and len(lines) == 1:  # one line: of either kind
            rules = (*_OBJECTS, *_LINES[:-1])
    return next((form for fits, form in rules if fits(found)), None)


def _loaded(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json_keys(file: IO[bytes]) -> _Json:
    """The keys of a JSON file, up to the first annotation and image, or as far as it is JSON."""
    file.seek(0)
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    is_list, keys, inner, ended = False, set[str](), set[str](), False
    first = set[str]()
    try:
        for count, (prefix, event, value) in enumerate(ijson.parse(file)):
            if (
                count == _EVENTS
                or first == {"annotations.item", "images.item"}  # whichever of the lists stands first
                or (ended and prefix != "item")
            ):
                break
            if event == "end_map" and prefix in ("annotations.item", "images.item"):
                first.add(prefix)
            is_list = is_list or (count == 0 and event == "start_array")
            ended = ended or (is_list and prefix == "item" and event == "end_map")
            if event == "map_key":
                inner.add(value)
                if (prefix == "item" and not ended) if is_list else not prefix:
                    keys.add(value)
    except (ijson.JSONError, ValueError, RecursionError):
        pass
    return _Json(is_list, keys, inner)


def _xml(text: str) -> Format | None:
    if "<annotations>" in text and "<image " in text:
        return Format("an export of CVAT (XML)", advice="export it from there as COCO")
    if "<annotation" in text and "<object" in text:
        return Format("an annotation of Pascal VOC (XML)", "voc", "give the folder of these files")
    return None


def _yaml(text: str) -> Format | None:
    try:
        fields = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    if {"img", "label"} <= set(fields):
        return Format("a TSV container of the original GLIP", "tsv")
    if "names" in fields or "nc" in fields:
        return Format("data.yaml of YOLO", "yolo")
    return None


def _csv(lines: list[str]) -> Format | None:
    header = [cell.strip().lower() for cell in next(csv.reader(lines[:1]), [])]
    if {"imageid", "labelname"} <= set(header):
        return Format("a CSV of OpenImages", "openimages")
    if {"xmin", "ymin", "xmax", "ymax"} <= set(header):
        return Format("a CSV of boxes, as TensorFlow's object detection has", advice=_CONVERT)
    if {"region_shape_attributes", "region_attributes"} <= set(header):
        return Format("a CSV of VIA", advice=_CONVERT)
    corners = [re.search(r",(-?[\d.]+,){4}[^,\d][^,]*$|,(-?[\d.]+,){3}-?[\d.]+,?[^,]*$", line) for line in lines]
    if len(lines[0].split(",")) >= 6 and all(corners):
        return Format("a CSV of boxes", advice=_CONVERT)
    if all(line.count("\t") == 1 for line in lines):
        return Format("tab-separated lines of two columns", "caption-tsv", "if these are captions and images")
    return None


# Folders ----------------------------------------------------------------------------------------------------------------

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def _folder(path: epath.Path, depth: int = 1) -> Format | None:
    """By the names in it, and in the folders in it."""
    entries = sorted(path.iterdir(), key=lambda entry: entry.name)[:2000]
    names, folders = [entry.name for entry in entries], {entry.name for entry in entries if entry.is_dir()}
    ends = {epath.Path(name).suffix.lower() for name in names}
    if "manifest.json" in names and "columns.npz" in names:
        return Format("a folder of shards, which is imported already", advice="give it to the other jobs as it is")
    if "checkpoints" in folders:
        return Format("a working folder of a run", advice="give it to other jobs as --checkpoint")
    if {"Annotations", "Sentences"} <= folders:
        return Format("the release of Flickr30k Entities", "flickr30k")
    if ".xml" in ends or ("Annotations" in folders and _any_of(path / "Annotations", ".xml")):
        return Format("a folder of Pascal VOC annotations (XML)", "voc")
    if "_annotations.coco.json" in names or "annotations_without_background.json" in names:
        return Format("a folder of ODinW or Roboflow", "odinw")
    if "features.json" in names:
        return Format("a set that TensorFlow Datasets prepared", "tfds")
    if "metadata.jsonl" in names or "metadata.csv" in names:
        return Format("an image folder of Hugging Face", advice=_CONVERT)
    if {"data.yaml", "dataset.yaml"} & set(names) or "labels" in folders or (".txt" in ends and _all_yolo(entries)):
        return Format(
            "a folder of YOLO", "yolo", "give its data.yaml, or the folder of the labels with --images and --classes"
        )
    if {".tar"} & ends:
        return Format("a folder of tar archives", "webdataset", "if they hold images with captions")
    if {".parquet", ".arrow"} & ends:
        return Format("a folder of Parquet or Arrow tables", advice=_CONVERT)
    if any("tfrecord" in name for name in names):
        return recognize_bytes(b"", "x.tfrecord")
    found = [entry for entry in entries if entry.suffix == ".json" and entry.name not in folders]
    first = recognize(found[0]) if found else None
    if first is not None and first.what == "a file of LabelMe":
        return Format("a folder of LabelMe files", "labelme")
    if found:
        return Format(f"a folder, in which {found[0].name} lies", advice="give the file of annotations itself")
    if "annotations" in folders:
        below = sorted(entry.name for entry in (path / "annotations").iterdir() if entry.suffix == ".json")
        if below:
            return Format("a folder", advice=f"give one of the files in it, such as annotations/{below[0]}")
    if path.name == "images" and ((path.parent / "labels").is_dir() or (path.parent / "data.yaml").exists()):
        return Format("the folder of images of a YOLO set", "yolo", "give its data.yaml")
    for name in sorted(folders)[:5] if depth else ():
        inner = _folder(path / name, depth - 1)
        if inner is not None and "image" not in inner.what and "empty" not in inner.what:
            return inner._replace(what=f"a folder; {name} in it is {inner.what}")
    if ends & set(_PICTURES):
        return Format("a folder of images", advice="give the file of annotations, and this folder as --images")
    return None if names else Format("an empty folder", advice="look for where the data was unpacked to")


def _any_of(folder: epath.Path, suffix: str) -> bool:
    return any(entry.name.lower().endswith(suffix) for entry in folder.iterdir())


def _all_yolo(entries: Iterable[epath.Path]) -> bool:
    texts = [entry for entry in entries if entry.suffix == ".txt" and entry.name != "classes.txt"][:3]
    found = [recognize(entry) for entry in texts]
    return bool(found) and all(form is not None and "YOLO" in form.what for form in found)
