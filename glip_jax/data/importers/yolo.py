"""Imports YOLO's labels: a text file per image, and data.yaml, which names the splits and the classes.

    data.yaml               train: images/train, val: images/val, names: [cat, dog]  (folders, lists of them, or lists of files)
    images/train/1.jpg
    labels/train/1.txt      a line a box: class x y width height, center and size as shares of the image

The label file of an image lies where the last `images` of its path is `labels`, else beside it; an image without one has no
box. Lines with more numbers are polygons (the box is the smallest that holds it), or boxes with key points where data.yaml has
`kpt_shape`, or with a score, which is ignored.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
import yaml
from etils import epath

from glip_jax.data.importers.coco import NamedOptions, open_converted
from glip_jax.data.importers.entry import ImportSource, Report, SourceError
from glip_jax.data.importers.options import PathArgument
from glip_jax.data.importers.readers import as_integer, require_file
from glip_jax.data.importers.sources import Source, coco_form, files_with, folders_below, images_below, split_of
from glip_jax.io import gcs, text_files
from glip_jax.io.image_files import ImageFileError, measured

__all__ = ["Yolo", "open_yolo", "read_yolo", "sources"]

_CLASSES = ("classes.txt", "obj.names", "predefined_classes.txt")
_SPLITS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}
"""Keys of data.yaml by split."""


class YoloSplit(NamedTuple):
    """The images of a split with their label files."""

    images: epath.Path
    """Folder that the paths of `files` are relative to."""
    files: list[str]
    labels: epath.Path | None
    """Folder of the label files; None: found from the paths of the images."""
    names: dict[int, str]
    """Class names by number, from 0."""
    keypoints: bool
    """Whether the numbers after the box are key points."""


def open_yolo(
    annotations: epath.PathLike, images: epath.PathLike | None = None, *, split: str = "train",
    classes: epath.PathLike | None = None, **options: Any,
) -> ImportSource:  # fmt: skip
    """Opens a split of a data.yaml, or, with `images`, a folder of label files whose class names `classes` lists, a line each.

    `split`: a key of data.yaml. Other options and errors as for `coco.open_converted`.
    """
    path = epath.Path(annotations)
    if gcs.kind(path) == "folder":
        if images is None:
            raise SourceError(f"{path} is a folder of label files: give --images, or data.yaml in its place")
        file = next((f for f in (classes, *(path / name for name in _CLASSES)) if f is not None and gcs.kind(f)), None)
        if file is None:
            raise SourceError(f"{path} has no {' or '.join(_CLASSES)}: give the class names, a line each, as --classes")
        place = epath.Path(images)
        found = YoloSplit(place, images_below(place), path, _listed_names(epath.Path(file)), False)
        inputs = (path, epath.Path(file))
    else:
        require_file(path, "data.yaml")
        found = yaml_split(path, split)
        inputs = (path, *_label_folders(found))
    return open_converted(lambda report: read_yolo(found, report), path, found.images, inputs=inputs, **options)


def _label_folders(split: YoloSplit) -> list[epath.Path]:
    folders = {_label_file(split, file).parent for file in split.files}
    return sorted((folder for folder in folders if folder.is_dir()), key=str)


def yaml_split(file: epath.Path, split: str) -> YoloSplit:
    """A split of data.yaml; SourceError if the file has no such split, no class names, or its images are not there."""
    fields = _fields(file)
    keys = next((keys for name, keys in _SPLITS.items() if split in (name, *keys)), (split,))
    raw = next((fields[key] for key in (split, *keys) if fields.get(key)), None)
    if raw is None:
        there = ", ".join(key for keys in _SPLITS.values() for key in keys if fields.get(key)) or "none"
        raise SourceError(f"{file} has no split {split!r}; it has: {there}")
    names = _yaml_names(fields, file)
    paths: list[epath.Path] = []
    for entry in raw if isinstance(raw, list) else [raw]:
        paths += _images_of(entry, fields, file)
    if not paths:
        raise SourceError(f"{file}: the split {split!r} has no image in {raw!s:.80}")
    common = epath.Path(os.path.commonpath([path.parent for path in paths]))
    # A list may name an image twice, as ultralytics does to repeat it.
    files = list(dict.fromkeys(str(path.relative_to(common)) for path in paths))
    return YoloSplit(common, files, None, names, bool(fields.get("kpt_shape")))


def _fields(file: epath.Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(text_files.decoded(file.read_bytes()))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read as YAML ({error!s:.120}): expected data.yaml of YOLO") from None
    if not isinstance(fields, dict):
        raise SourceError(
            f"{file} holds a {type(fields).__name__}, expected data.yaml of YOLO with train, val and names"
        )
    return fields


def _yaml_names(fields: Mapping[str, Any], file: epath.Path) -> dict[int, str]:
    raw = fields.get("names")
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    names = {as_integer(key): str(name) for key, name in items if name is not None}
    if not names or None in names:
        raise SourceError(f"{file}: expected 'names', a list of class names, found {raw!r:.60}")
    return {number: name for number, name in names.items() if number is not None}


def _listed_names(file: epath.Path) -> dict[int, str]:
    try:
        lines = text_files.decoded(file.read_bytes()).splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read ({error}): expected class names, a line each") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise SourceError(f"{file} is empty: expected class names, a line each")
    return dict(enumerate(names))


def _images_of(entry: Any, fields: Mapping[str, Any], file: epath.Path) -> list[epath.Path]:
    """The images of an entry of data.yaml: those in a folder, or of a text file of paths.

    A path is relative to `path`, or to data.yaml where that does not exist, as in a data set that was moved. Roboflow writes
    ../train/images for a folder that lies beside data.yaml.
    """
    if not isinstance(entry, str) or not entry.strip():
        raise SourceError(f"{file}: expected a folder or a list of images, found {entry!r:.40}")
    base = fields.get("path")
    roots = [file.parent / base, file.parent.parent / base] if isinstance(base, str) and base else []
    parts = [part for part in entry.replace("\\", "/").split("/") if part not in ("", ".")]
    plain = [part for part in parts if part != ".."]
    tries = [root / entry for root in (*roots, file.parent)]
    tries += [root.joinpath(*plain[i:]) for root in (file.parent, *roots) for i in range(len(plain))]
    place = next((path for path in tries if path.exists()), None)
    if place is None:
        raise SourceError(f"{file}: {entry} is not there (looked for {tries[0]} and below {file.parent})")
    if place.is_dir():
        return [place / name for name in images_below(place)]
    lines = text_files.decoded(place.read_bytes()).splitlines()
    return [_listed_image(line.strip(), place.parent, file.parent) for line in lines if line.strip()]


def _listed_image(line: str, *roots: epath.Path) -> epath.Path:
    """The image that a line of a list names: relative to the list, or to data.yaml, or by its last folders."""
    plain = [part for part in line.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    tries = [roots[0] / line, *(root.joinpath(*plain[i:]) for root in roots for i in range(len(plain)))]
    return next((path for path in tries if path.exists()), roots[0].joinpath(*plain))


def _label_file(split: YoloSplit, file: str) -> epath.Path:
    stem = file.rpartition(".")[0] + ".txt"
    if split.labels is not None:
        nested = split.labels / stem
        return nested if nested.exists() else split.labels / stem.rpartition("/")[2]
    before, images, after = str(split.images / stem).rpartition("/images/")
    path = epath.Path(f"{before}/labels/{after}") if images else epath.Path()
    return path if images and path.exists() else split.images / stem if (split.images / stem).exists() else path


def read_yolo(split: YoloSplit, report: Report) -> dict[str, Any]:
    """The boxes of a split in COCO's form; the size of an image is that of its file, upright. Lines that are no box are counted.

    SourceError if most boxes are not shares of the image.
    """
    listed: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    beyond, without, first = 0, 0, ""
    for number, file in enumerate(split.files, 1):
        labels = _label_file(split, file)
        lines = _lines(labels, report)
        image: dict[str, Any] = {"id": number, "file_name": file}
        without += lines is None
        if lines:
            try:
                height, width, _ = measured(split.images / file)
            except ImageFileError:
                height = width = 0  # whoever reads the image says what is wrong with it
            image |= {"height": height or None, "width": width or None}
            for category, shares in _boxes(lines, labels, split.keypoints, report):
                if max(shares) > 1.5 or min(shares) < -0.5:
                    beyond, first = beyond + 1, first or f"{labels}: {' '.join(f'{value:g}' for value in shares)}"
                x, y, w, h = shares
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                notes.append({"image_id": number, "category_id": category, "bbox": box})
        listed.append(image)
    if 2 * beyond > len(notes):
        raise SourceError(
            f"{beyond} of {len(notes)} boxes are no shares of the image (first: {first}): expected center and size from 0 to 1"
        )
    report.note("image: without a label file, has no box", f"{split.images}", without)
    return coco_form(listed, notes, split.names)


def _lines(file: epath.Path, report: Report) -> list[str] | None:
    """The lines of a label file that are not empty; None if there is no such file."""
    try:
        return [line for line in text_files.decoded(file.read_bytes()).splitlines() if line.strip()]
    except (FileNotFoundError, IsADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, gcs.StorageError):
            raise
        report.drop("image: label file unreadable", f"{file}, {error!s:.80}")
        return []


def _boxes(
    lines: list[str], file: epath.Path, keypoints: bool, report: Report
) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
    """Yields class and (x, y, width, height), center and size as shares, of each line that is a box or a polygon."""
    for number, line in enumerate(lines, 1):
        where = f"{file} line {number}"
        try:
            category, *values = map(float, line.split())
        except ValueError:
            report.drop("box: line with something else than numbers", f"{where}, {line!r:.60}")
            continue
        if not category.is_integer() or not all(map(math.isfinite, values)):
            report.drop("box: not finite", f"{where}, {line!r:.60}")
        elif len(values) in (4, 5) or (keypoints and len(values) > 4):
            report.note("box: a number after the four of the box is ignored", where, len(values) == 5 and not keypoints)
            x, y, w, h = values[:4]
            yield int(category), (x, y, w, h)
        elif len(values) >= 6 and len(values) % 2 == 0:
            report.note("box: of a polygon", where)
            (left, right), (top, bottom) = ((min(values[axis::2]), max(values[axis::2])) for axis in (0, 1))
            yield int(category), ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        else:
            report.drop("box: line of neither a box nor a polygon", f"{where}, {line!r:.60}")


def sources(folder: epath.Path) -> list[Source]:
    """The splits of the data.yaml in a folder; without one, `labels` beside `images` with a list of class names."""
    for file in files_with(folder, ".yaml", ".yml"):
        fields = _fields_or_none(file)
        if fields and "names" in fields and any(fields.get(key) for keys in _SPLITS.values() for key in keys):
            return _of_yaml(file, fields)
    return _without_yaml(folder)


def _fields_or_none(file: epath.Path) -> dict[str, Any] | None:
    try:
        return _fields(file)
    except SourceError:
        return None


def _of_yaml(file: epath.Path, fields: Mapping[str, Any]) -> list[Source]:
    """The splits of data.yaml; one whose images are not there is left out with a note, but the training set is refused."""
    found, notes = [], []
    for split, keys in _SPLITS.items():
        if any(fields.get(key) for key in keys):
            try:
                chosen = yaml_split(file, split)
            except SourceError as error:
                if split == "train":
                    raise
                notes.append(f"no {split} set: {error}")
            else:
                found.append(Source(split, file, (chosen.images,), _reader(chosen)))
    return [found[0]._replace(note="; ".join(notes)), *found[1:]] if found else []


def _without_yaml(folder: epath.Path) -> list[Source]:
    """labels/ and images/ with or without folders of the splits, or text files beside their images (labelImg)."""
    below = {path.name.lower(): path for path in folders_below(folder)}
    labels = below.get("labels")
    places = [path for path in (labels, folder) if path is not None]
    listed = next((place / name for place in places for name in _CLASSES if (place / name).exists()), None)
    if listed is None:
        return []
    names = _listed_names(listed)
    images = below.get("images", folder)
    of_split = {split_of(path.name): path for path in folders_below(images) if split_of(path.name)}
    found = []
    for split, place in (of_split or {"": images}).items():
        own = None if labels is None else labels / place.name if of_split else labels
        chosen = YoloSplit(place, images_below(place), own, names, False)
        if any(_label_file(chosen, file).exists() for file in chosen.files):
            found.append(Source(split, own or place, (place,), _reader(chosen)))
    return found


def _reader(chosen: YoloSplit) -> Callable[[Report], dict[str, Any]]:
    return lambda report: read_yolo(chosen, report)


@dataclass(frozen=True, kw_only=True)
class Yolo(NamedOptions):
    """Import YOLO's labels by their data.yaml, or a folder of label files.

    example: python -m glip_jax data yolo data.yaml --split=train --out=shards/mine
    """

    annotations: tyro.conf.Positional[PathArgument]
    """data.yaml, or the folder of the label files."""
    split: str = "train"
    """Split of data.yaml: train, val or test."""
    images: PathArgument | None = None
    """Folder of the images, for a folder of label files."""
    classes: PathArgument | None = None
    """Text file with the class names, a line each, for a folder of label files; default: classes.txt in it."""

    @property
    def source(self) -> epath.Path:
        """data.yaml, or the folder of the label files."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """data.yaml with the folders of the label files of its split, or the folder of the label files and the class names."""
        if gcs.kind(self.annotations) == "folder":
            listed = [self.annotations / name for name in _CLASSES] if self.classes is None else [self.classes]
            return (self.annotations, *[file for file in listed if gcs.kind(file)][:1])
        if not gcs.kind(self.annotations):
            return (self.annotations,)
        return (self.annotations, *_label_folders(yaml_split(self.annotations, self.split)))

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_yolo(
            self.annotations, self.images, split=self.split, classes=self.classes, **self.naming(scratch)
        )  # fmt: skip
