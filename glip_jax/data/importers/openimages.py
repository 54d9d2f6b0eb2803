"""Imports OpenImages (V4 to V7): boxes in a CSV, class names by id, a class hierarchy, and image-level labels.

    *-annotations-bbox.csv                          ImageID, LabelName, XMin, XMax, YMin, YMax, IsGroupOf, ...
    class-descriptions-boxable.csv                  machine id, name; no header
    bbox_labels_600_hierarchy.json                  {"LabelName", "Subcategory": [...], "Part": [...]}
    *-annotations-human-imagelabels-boxable.csv     ImageID, LabelName, Confidence: 1 present, 0 absent

Coordinates are relative to the image. An image has labels only for classes that were verified, so the classes known to be
absent are those with label 0 and all below them in the hierarchy; all other classes are unlabelled. Boxes of groups are
dropped and counted, and their class is marked as not exhaustive in the image. Images are ImageID.jpg below the image folder.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tyro
from etils import epath

from glip_jax.data.importers.entry import Entry, ImportSource, Report, SourceError, image_folder
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import Join, require_file
from glip_jax.io import gcs, text_files
from glip_jax.structures.prompts import clean_name

__all__ = ["Openimages", "hierarchy_below", "open_openimages"]

_BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
_TRUE = ("1", "1.0", "true")
_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")


def open_openimages(
    boxes: epath.PathLike,
    images: epath.PathLike,
    *,
    classes: epath.PathLike,
    hierarchy: epath.PathLike | None = None,
    labels: epath.PathLike | None = None,
    strict: bool = False,
    scratch: Path | None = None,
) -> ImportSource:
    """Opens OpenImages; one entry per image with a box or label, in the order in which the files name them.

    Raises SourceError if a file is missing or has other columns, class names are duplicated or have no letter or digit, or
    the image folder is missing or empty.
    """
    folder, report = image_folder(images), Report(strict=strict)
    inputs = [epath.Path(path) for path in (boxes, classes, hierarchy, labels) if path is not None]
    for path in inputs:
        require_file(path)
    names = _class_names(epath.Path(classes))
    below = {} if hierarchy is None else hierarchy_below(epath.Path(hierarchy))
    join = Join(scratch)

    def annotations() -> Iterator[tuple[str, None, list[Any]]]:
        for line, row in _rows(epath.Path(boxes), _BOX_COLUMNS):
            edges = [row[key] for key in _BOX_COLUMNS[2:]]
            yield row["ImageID"], None, [line, row["LabelName"], edges, row.get("IsGroupOf", "0").lower() in _TRUE]
        if labels is not None:
            for line, row in _rows(epath.Path(labels), _LABEL_COLUMNS):
                yield row["ImageID"], None, [line, row["LabelName"], row["Confidence"]]

    join.add_annotations(annotations())
    join.add_images_of_annotations()
    if not join.count:
        raise SourceError(f"{boxes} has no box: expected rows below the header")
    entries = _entries(join, names, below, epath.Path(boxes).name, report)
    return ImportSource(entries, folder, report, tuple(names.values()), join.count, tuple(inputs))


def hierarchy_below(path: epath.Path) -> dict[str, set[str]]:
    """For each class id all ids below it by `Subcategory` (`Part` is ignored); SourceError for an invalid file."""
    try:
        tree = json.loads(text_files.decoded(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON that can be used ({error!s:.100}): copy it again") from None
    below: dict[str, set[str]] = {}

    def walk(node: Any, location: str) -> set[str]:
        if not isinstance(node, dict) or not isinstance(node.get("LabelName"), str):
            raise SourceError(f"{path}: {location} is {node!r:.40}, expected an object with LabelName")
        children = node.get("Subcategory", [])
        if not isinstance(children, list):
            raise SourceError(f"{path}: Subcategory of {node['LabelName']} is {children!r:.40}, expected a list")
        found: set[str] = set()
        for i, child in enumerate(children):
            found |= walk(child, f"{location}.Subcategory[{i}]") | {child["LabelName"]}
        below.setdefault(node["LabelName"], set()).update(found)
        return found

    try:
        walk(tree, "the file")
    except RecursionError:
        raise SourceError(f"{path} is nested too deeply for a class hierarchy: copy it again") from None
    return below


def _class_names(path: epath.Path) -> dict[str, str]:
    """Class id to name, in the order of the file."""
    names: dict[str, str] = {}
    seen: dict[str, str] = {}
    for number, row in _lines(path):
        if len(row) != 2:
            raise SourceError(f"{path} line {number} has {len(row)} columns, expected 2: machine id, name")
        identity, name = row
        if (identity, name) == ("LabelName", "DisplayName"):
            continue
        if identity in names or name in seen:
            raise SourceError(f"{path} line {number}: {identity}, {name!r} occurs twice: ids and names must be unique")
        if not any(character.isalnum() for character in clean_name(name)):
            raise SourceError(
                f"{path} line {number} names {identity} {name!r}, which has no letter or digit after cleaning"
            )
        names[identity], seen[name] = name, identity
    if not names:
        raise SourceError(f"{path} is empty: expected lines of machine id, name")
    return names


def _lines(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a CSV with their number from 1."""
    number = 0
    try:
        with gcs.open_file(path) as raw:
            text = io.TextIOWrapper(cast(Any, raw), encoding="utf-8-sig", newline="")
            for number, row in enumerate(csv.reader(text), 1):
                if row:
                    yield number, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} is not a CSV that can be used after line {number} ({error!s:.80}): copy it"
        ) from None


def _rows(path: epath.Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows below the header as dictionaries; SourceError if a column is missing or a row has another length."""
    lines = _lines(path)
    _, header = next(lines, (0, []))
    missing = [column for column in columns if column not in header]
    if missing:
        raise SourceError(f"{path}: the header lacks {', '.join(missing)}; found {','.join(header)!r:.80}")
    for number, row in lines:
        if len(row) != len(header):
            raise SourceError(f"{path} line {number} has {len(row)} columns, the header {len(header)}: copy it again")
        yield number, dict(zip(header, row))


def _entries(
    join: Join, names: dict[str, str], below: dict[str, set[str]], provenance: str, report: Report
) -> Iterator[Entry]:
    order = {identity: i for i, identity in enumerate(names)}
    for image, _, notes in join:
        boxes, labels, ids, groups, negative = [], [], [], [], set()
        for _, (line, label, *rest) in notes:
            where = f"line {line} of image {image}"
            if len(rest) == 1:
                if rest[0] in ("0", "0.0"):
                    negative |= {label} | below.get(label, set())
            elif label not in order:
                report.drop("box: category not listed", f"{where}, label {label!r}")
            elif (box := _edges(rest[0])) is None:
                report.drop("box: not four numbers", f"{where}, {','.join(rest[0])!r:.60}")
            elif rest[1]:
                report.drop("box: group", where)
                groups.append(label)
            else:
                boxes.append(box)
                labels.append(order[label])
                ids.append(f"in line {line}")
        present = (
            {identity for identity in order if order[identity] in set(labels)} | set(groups) if negative else set()
        )
        both = {identity for identity in negative if identity in present or below.get(identity, set()) & present}
        report.note("name: known absent but boxed, not kept as absent", f"image {image}", len(both & set(order)))
        yield Entry(
            id=image, image=f"{image}.jpg", kind="detection", boxes=tuple(boxes), relative=True, labels=tuple(labels),
            known_absent=tuple(name for identity, name in names.items() if identity in negative - both),
            not_exhaustive=tuple(dict.fromkeys(names[label] for label in groups)), ids=tuple(ids),
            provenance=provenance,
        )  # fmt: skip


def _edges(texts: list[str]) -> tuple[float, float, float, float] | None:
    """XMin, XMax, YMin, YMax as xyxy."""
    try:
        left, right, top, bottom = map(float, texts)
    except ValueError:
        return None
    return left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Openimages(BuildOptions):
    """Import boxes of OpenImages from the published CSV files.

    example: python -m glip_jax data openimages oidv6-train-annotations-bbox.csv --images=train
    --classes=class-descriptions-boxable.csv --hierarchy=bbox_labels_600_hierarchy.json
    --labels=train-annotations-human-imagelabels-boxable.csv --out=shards/openimages
    """

    annotations: tyro.conf.Positional[PathArgument]
    """The CSV of boxes."""
    images: PathArgument
    """Folder of the images, ImageID.jpg."""
    classes: PathArgument
    """The CSV of class ids and names."""
    hierarchy: PathArgument | None = None
    """The JSON of the class hierarchy: if a class is absent, all classes below it are."""
    labels: PathArgument | None = None
    """The CSV of verified image-level labels, which say what is known to be absent."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The CSV files and the hierarchy."""
        given = (self.annotations, self.classes, self.hierarchy, self.labels)
        return tuple(path for path in given if path is not None)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_openimages(
            self.annotations, self.images, classes=self.classes, hierarchy=self.hierarchy, labels=self.labels,
            strict=self.strict, scratch=scratch,
        )  # fmt: skip
