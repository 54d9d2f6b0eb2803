"""Imports Pascal VOC: an XML file per image, as VOC, labelImg, Roboflow and CVAT write it.

    Annotations/000005.xml    <annotation><filename>, <size>, <object><name><bndbox><xmin> ...
    JPEGImages/000005.jpg
    ImageSets/Main/train.txt  names of a split, a line each

An image is found by the name of its XML file, else by `filename`. VOC counts pixels from 1 and includes xmax and ymax; some
tools count from 0: a set with a coordinate below 1 is read so. Objects that are `difficult` are kept as all others.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import tyro
from defusedxml.ElementTree import fromstring
from etils import epath

from glip_jax.data.importers.coco import NamedOptions, open_converted
from glip_jax.data.importers.entry import ImportSource, Report, SourceError
from glip_jax.data.importers.options import PathArgument
from glip_jax.data.importers.readers import as_integer
from glip_jax.data.importers.sources import Source, coco_form, files_with, folders_below, one_per_split, split_of
from glip_jax.io import gcs, text_files
from glip_jax.io.image_files import ENDINGS

__all__ = ["Voc", "open_voc", "read_voc", "sources"]

_IMAGES = ("jpegimages", "images", "image", "imgs", "img")


def open_voc(
    annotations: epath.PathLike, images: epath.PathLike, *, split: epath.PathLike | None = None, **options: Any
) -> ImportSource:
    """Opens a folder of XML files; `split`: a text file with the names of the images to read, a line each. Options and errors as
    for `coco.open_converted`.
    """
    folder = epath.Path(annotations)
    if gcs.kind(folder) != "folder":
        raise SourceError(f"{folder} is no folder: expected the folder of the XML files")
    names = None if split is None else _names(epath.Path(split))

    inputs = (folder, *([] if split is None else [split]))
    return open_converted(
        lambda report: read_voc(xml_files(folder, names), report), folder, images, inputs=inputs, **options
    )


def xml_files(folder: epath.Path, names: Sequence[str] | None = None) -> list[epath.Path]:
    """The XML files in a folder, or those of the given names; SourceError if there is none, or one of the names has none."""
    files = {path.stem: path for path in files_with(folder, ".xml")}
    if not files:
        raise SourceError(f"{folder} has no XML file: expected one for each image")
    if names is None:
        return list(files.values())
    if missing := [name for name in names if name not in files]:
        raise SourceError(
            f"{folder} has no {missing[0]}.xml, which the list of the split names ({len(missing)} are missing)"
        )
    return [files[name] for name in names]


def read_voc(files: Iterable[epath.Path], report: Report) -> dict[str, Any]:
    """The annotations of XML files in COCO's form; files that are no annotation are dropped and counted.

    `names` of an image are the other names by which it is looked for.
    """
    listed: list[dict[str, Any]] = []
    boxes: list[tuple[int, str, list[Any]]] = []
    for number, file in enumerate(files, 1):
        root = _root(file, report)
        if root is None:
            continue
        name = (root.findtext("filename") or "").strip()
        ending = epath.Path(name).suffix if name else ".jpg"
        size = {side: as_integer((root.findtext(f"size/{side}") or "").strip()) for side in ("height", "width")}
        listed.append({"id": number, "file_name": f"{file.stem}{ending}", "names": [name] if name else [], **size})
        boxes += [(number, *found) for found in _objects(root, file, report)]
    if not listed:
        raise SourceError(
            f"none of the XML files is of Pascal VOC (first: {next(iter(report.first.values()), 'no file')})"
        )
    from_zero = any(value is not None and value < 1 for _, _, (xmin, ymin, _, _) in boxes for value in (xmin, ymin))
    report.note(
        "box: pixels counted from 0, not from 1 as in VOC", boxes[0][1] if boxes else "", from_zero * len(boxes)
    )
    first = 0 if from_zero else 1
    notes = [{"image_id": image, "category_id": name, "bbox": _xywh(corners, first)} for image, name, corners in boxes]
    return coco_form(listed, notes)


def _root(file: epath.Path, report: Report) -> Element | None:
    try:
        root = fromstring(text_files.decoded(file.read_bytes()))
    except OSError as error:
        if isinstance(error, gcs.StorageError):
            raise
        report.drop("image: annotation unreadable", f"{file}, {error.strerror or error}")
        return None
    except (ParseError, ValueError, LookupError) as error:  # defusedxml raises ValueError for forbidden content
        report.drop("image: annotation is no XML", f"{file}, {error!s:.80}")
        return None
    if root.tag != "annotation":
        report.drop("image: annotation is not of Pascal VOC", f"{file}, found <{root.tag!s:.40}>")
        return None
    return root


def _objects(root: Element, file: epath.Path, report: Report) -> Iterator[tuple[str, list[Any]]]:
    """Yields name and (xmin, ymin, xmax, ymax) of each object; None for what is no number."""
    for index, item in enumerate(root.findall("object")):
        name, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        where = f"object {index} of {file.name}"
        if not name:
            report.drop("box: without a name", where)
        elif box is None:
            report.drop("box: no bndbox", where)
        else:
            report.note("box: difficult, kept as all others", where, (item.findtext("difficult") or "").strip() == "1")
            yield name, [_number(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")]


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _xywh(corners: list[float | None], first: int) -> list[Any]:
    """x, y, width, height of corners whose pixels count from `first`; from 1 the last pixel belongs to the box."""
    xmin, ymin, xmax, ymax = corners
    if xmin is None or ymin is None or xmax is None or ymax is None:
        return [xmin, ymin, xmax, ymax]  # the reader counts it
    return [xmin - first, ymin - first, xmax - xmin + first, ymax - ymin + first]


def _names(file: epath.Path) -> list[str]:
    """The first word of each line of a list of images, without an ending."""
    try:
        lines = text_files.decoded(file.read_bytes()).splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read ({error}): expected names of images, a line each") from None
    words = [line.split()[0].rpartition("/")[2] for line in lines if line.strip()]
    return [word.rpartition(".")[0] if word.lower().endswith((".xml", *ENDINGS)) else word for word in words]


def sources(folder: epath.Path) -> list[Source]:
    """The splits of a folder of VOC: by ImageSets/Main, by folders of their names, or one without a name."""
    below = folders_below(folder)
    images = (*_below(folder, _IMAGES), folder)
    found = []
    for place in (folder, *below):
        split = split_of(place.name) if place != folder else ""
        if not split and _has_xml(place):
            found += _by_lists(folder, place, images) or [_source("", place, (*images, place))]
            continue
        inner = [] if place == folder else folders_below(place)
        if split:  # train/*.xml, or train/Annotations/*.xml
            own = next((path for path in (place, *inner) if _has_xml(path)), None)
            if own is not None:
                found.append(_source(split, own, (*_below(place, _IMAGES), place, *images)))
        else:  # Annotations/train/*.xml beside images/train
            for own in (path for path in inner if split_of(path.name) and _has_xml(path)):
                beside = [path for other in below for path in folders_below(other) if path.name == own.name]
                found.append(_source(split_of(own.name), own, (*beside, *images)))
    return one_per_split(found, folder)


def _below(folder: epath.Path, names: Sequence[str]) -> list[epath.Path]:
    return [path for path in folders_below(folder) if path.name.lower() in names]


def _has_xml(folder: epath.Path) -> bool:
    files = files_with(folder, ".xml")
    return bool(files) and re.search(rb"<annotation[\s>]", files[0].read_bytes()[:4096]) is not None


def _by_lists(folder: epath.Path, place: epath.Path, images: tuple[epath.Path, ...]) -> list[Source]:
    """The splits that ImageSets/Main lists; `trainval` where there is no `train`."""
    lists = folder / "ImageSets" / "Main"
    if not lists.is_dir():
        return []
    files = {path.stem.lower(): path for path in files_with(lists, ".txt")}
    named = {split_of(stem): file for stem, file in files.items() if split_of(stem) and "_" not in stem}
    if "train" not in named and "trainval" in files:
        named["train"] = files["trainval"]
    return [_source(split, place, images, file) for split, file in named.items()]


def _source(split: str, place: epath.Path, images: tuple[epath.Path, ...], listed: epath.Path | None = None) -> Source:
    def read(report: Report) -> dict[str, Any]:
        return read_voc(xml_files(place, None if listed is None else _names(listed)), report)

    return Source(split, place if listed is None else listed, images, read)


@dataclass(frozen=True, kw_only=True)
class Voc(NamedOptions):
    """Import Pascal VOC: a folder of XML files, one for each image.

    example: python -m glip_jax data voc VOC2012/Annotations --images=VOC2012/JPEGImages
    --split=VOC2012/ImageSets/Main/train.txt --out=shards/voc
    """

    annotations: tyro.conf.Positional[PathArgument]
    """Folder of the XML files."""
    images: PathArgument
    """Folder of the images, which have the names of the XML files."""
    split: PathArgument | None = None
    """Text file with the names of the images to import, a line each, as in ImageSets/Main; default: all."""

    @property
    def source(self) -> epath.Path:
        """The folder of the XML files."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The folder of the XML files, and the list of the split."""
        return (self.annotations, *([] if self.split is None else [self.split]))

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_voc(self.annotations, self.images, split=self.split, **self.naming(scratch))
