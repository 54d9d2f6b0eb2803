"""Imports detection annotations in COCO's JSON format: COCO, LVIS, Objects365 (v1 and v2), ODinW folders, your own data.

There is one entry per image, including images without boxes. Boxes are xywh in pixels; a file whose boxes seem to be xyxy or
relative is refused, and the message says what to do. Crowd boxes are dropped, and their category is marked as not exhaustive
in the image.

`known_absent` of an image is a list of names of categories that are known to be absent from it. LVIS: so are the categories in
`neg_category_ids`; those in `not_exhaustive_category_ids` are not exhaustive; file names come from `coco_url`. Objects365:
`isfake` (a drawing, a statue) is ignored. If a path does not exist below the image folder, leading folders are removed
(images/v1/patch8/x.jpg -> patch8/x.jpg -> x.jpg).
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.data.importers.coco_json import BoxFormat, Crowds, DetectionFile, read_detections
from glip_jax.data.importers.entry import Entry, ImportSource, Report, SourceError, from_xywh, image_folder
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import JsonLists
from glip_jax.data.importers.sources import located
from glip_jax.io import gcs, text_files

__all__ = [
    "Coco", "DetectionOptions", "Lvis", "NamedOptions", "Objects365", "Odinw", "detections", "open_coco", "open_converted",
    "open_odinw", "rename_map",
]  # fmt: skip


def open_coco(
    annotations: epath.PathLike,
    images: epath.PathLike,
    *,
    rename: Mapping[str, str] | None = None,
    merge_names: bool = False,
    boxes: BoxFormat | None = None,
    crowds: Crowds | None = None,
    strict: bool = False,
    scratch: Path | None = None,
) -> ImportSource:
    """Opens a COCO JSON file of detection annotations.

    `rename`: prompt text by category name or id, for names without meaning, e.g. {"RBC": "red blood cell"}. `merge_names`:
    categories of one name are one. `boxes`: format of `bbox`; None: xywh, checked for plausibility. `crowds`: whether boxes with
    `iscrowd` are dropped (None: as well) or single objects. Raises SourceError if the file is not JSON, a key is missing, ids or
    names are duplicated, a name has no letter or digit, the image folder is missing or empty, or boxes have another format.
    """
    folder, report = image_folder(images), Report(strict=strict)
    data = read_detections(
        annotations, images, report, rename=rename, merge_names=merge_names, boxes=boxes, crowds=crowds, scratch=scratch
    )
    return ImportSource(detections(data, report), folder, report, data.categories.names, data.count, (data.path,))


def open_converted(
    read: Callable[[Report], Mapping[str, Any]],
    path: epath.PathLike,
    images: epath.PathLike,
    *,
    inputs: Sequence[epath.PathLike] = (),
    rename: Mapping[str, str] | None = None,
    merge_names: bool = False,
    strict: bool = False,
    scratch: Path | None = None,
) -> ImportSource:
    """Opens annotations of another format, which `read` returns in COCO's form.

    `path`: file or folder of the annotations, for messages; `inputs`: the files that decide the result, default `path`. Other
    options and errors as for `open_coco`. The annotations are held in memory.
    """
    folder, report = image_folder(images), Report(strict=strict)
    coco = read(report)
    found, missing = located(coco["images"], epath.Path(images))
    lists = JsonLists(
        path, {key: functools.partial(iter, items) for key, items in {**coco, "images": [*found, *missing]}.items()}
    )
    data = read_detections(lists, images, report, rename=rename, merge_names=merge_names, boxes="xywh", scratch=scratch)
    used = tuple(map(epath.Path, inputs)) or (epath.Path(path),)
    return ImportSource(detections(data, report), folder, report, data.categories.names, data.count, used)


def open_odinw(folder: epath.PathLike, **options: Any) -> ImportSource:
    """Opens a folder of ODinW or Roboflow: images with an annotation file beside them. Options as for `open_coco`.

    Raises SourceError if there is no annotation file, or several candidates.
    """
    return open_coco(_annotation_file(epath.Path(folder)), epath.Path(folder), **options)


def _annotation_file(root: epath.Path) -> epath.Path:
    if not root.is_dir():
        raise SourceError(
            f"{root} is not a folder: expected one with images and an annotation file, e.g. Aquarium/train"
        )
    wanted = ("annotations_without_background.json", "_annotations.coco.json")
    files = [root / name for name in wanted if (root / name).exists()][:1] or sorted(root.glob("*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no JSON file"
        raise SourceError(f"{root} has {found}: expected {' or '.join(wanted)}, or one JSON file")
    return files[0]


def detections(data: DetectionFile, report: Report) -> Iterator[Entry]:
    """Yields one entry per image."""
    categories = data.categories
    for image in data.images:
        where = f"image {image.id}"
        boxes, labels, ids, crowds = [], [], [], []
        for box in image.boxes:
            if box.crowd:
                report.drop(
                    "box: crowd", f"annotation {box.key} of {where}; --crowds=keep takes them as single objects"
                )
                crowds.append(categories.names[box.label])
            elif (corners := from_xywh(box.xywh, report, f"annotation {box.key} of {where}")) is not None:
                boxes.append(corners)
                labels.append(box.label)
                ids.append(box.key)
        absent, boxed = image.known_absent, {categories.names[label] for label in labels}
        if absent is not None and boxed.intersection(absent):
            both = [name for name in absent if name in boxed]
            report.note("name: known absent but boxed, not kept as absent", f"{where}, {both[0]!r}", len(both))
            absent = tuple(name for name in absent if name not in boxed)
        yield Entry(
            id=str(image.id), image=image.file, kind="detection", height=image.height, width=image.width,
            boxes=tuple(boxes), labels=tuple(labels), known_absent=absent, ids=tuple(ids), provenance=data.path.name,
            not_exhaustive=tuple(dict.fromkeys((*image.not_exhaustive, *crowds))),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NamedOptions(BuildOptions):
    """Options of an import of boxes with category names."""

    names: PathArgument | None = None
    """JSON object with prompt text for category names or ids, e.g. {"RBC": "red blood cell", "4": "mug"}; a text given to several
    of them makes these one name."""
    merge_names: bool = False
    """Take categories of one name as one, instead of refusing them."""

    def naming(self, scratch: Path) -> dict[str, Any]:
        """The keywords of `open_converted`."""
        return {
            "rename": rename_map(self.names), "merge_names": self.merge_names, "strict": self.strict, "scratch": scratch
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(NamedOptions):
    """Options of an import of boxes with category names in COCO's format."""

    boxes: BoxFormat | None = None
    """Format of bbox; default: xywh, checked for plausibility."""
    crowds: Crowds | None = None
    """Boxes with iscrowd 1: drop them, or keep them as single objects (masks of CVAT, SAM and others); default: drop, refused if
    most boxes are crowds."""

    def options(self, scratch: Path) -> dict[str, Any]:
        """The keywords of `open_coco`."""
        return {**self.naming(scratch), "boxes": self.boxes, "crowds": self.crowds}

    @property
    def chosen_drops(self) -> frozenset[str]:
        """The reasons for drops that the options ask for."""
        return frozenset({"box: crowd"} if self.crowds == "drop" else ())


@dataclass(frozen=True, kw_only=True)
class Coco(DetectionOptions):
    """Import boxes with category names from a COCO JSON file, the format to use for your own detection data.

    example: python -m glip_jax data coco instances_train2017.json --images=train2017 --out=shards/coco
    """

    annotations: tyro.conf.Positional[PathArgument]
    """The annotation file."""
    images: PathArgument
    """Folder of the images."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The annotation file."""
        return (self.annotations,)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_coco(self.annotations, self.images, **self.options(scratch))


@dataclass(frozen=True, kw_only=True)
class Lvis(Coco):
    """Import LVIS: COCO's format with categories known to be absent and categories without exhaustive boxes.

    example: python -m glip_jax data lvis lvis_v1_train.json --images=coco --out=shards/lvis
    """


@dataclass(frozen=True, kw_only=True)
class Objects365(Coco):
    """Import Objects365, v1 or v2, from its JSON files.

    example: python -m glip_jax data objects365 zhiyuan_objv2_train.json --images=objects365/train --out=shards/o365
    """


@dataclass(frozen=True, kw_only=True)
class Odinw(DetectionOptions):
    """Import a folder of ODinW or Roboflow: images with an annotation file beside them.

    example: python -m glip_jax data odinw Aquarium/train --out=shards/aquarium
    """

    folder: tyro.conf.Positional[PathArgument]
    """Folder with the images and annotations_without_background.json or _annotations.coco.json."""

    @property
    def source(self) -> epath.Path:
        """The folder."""
        return self.folder

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The annotation file in the folder."""
        return (_annotation_file(self.folder),)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_odinw(self.folder, **self.options(scratch))


def rename_map(path: epath.Path | None) -> dict[str, str] | None:
    """Reads a JSON object of texts; SourceError for any other file."""
    if path is None:
        return None
    try:
        names = json.loads(text_files.decoded(gcs.open_file(path).read()))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"--names {path} cannot be read as JSON ({error})") from None
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise SourceError(
            f"--names {path}: expected a JSON object of texts, name or id in the file -> text in the prompt"
        )
    return names
