"""OpenImages (V4 to V7): boxes in a CSV, names by machine id, a hierarchy of names, and labels of whole images.

    *-annotations-bbox.csv                          ImageID, LabelName, XMin, XMax, YMin, YMax, IsGroupOf, ...
    class-descriptions-boxable.csv                  machine id, name; no header
    bbox_labels_600_hierarchy.json                  {"LabelName", "Subcategory": [...], "Part": [...]}
    *-annotations-human-imagelabels-boxable.csv     ImageID, LabelName, Confidence: 1 it is there, 0 it is not

Coordinates are shares of the image. An image is labelled only for names that someone asked about, so what is known to be
absent is what a label says, with all below it in the hierarchy; of all other names nothing is known. A box around a group
is dropped and counted, and its name is not exhaustive there. Pictures are ImageID.jpg below the folder of pictures.
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

from glip_jax.data.importers.entry import Entry, Opened, Report, SourceError, image_folder
from glip_jax.data.importers.options import BuildOptions, Place
from glip_jax.data.importers.readers import Join
from glip_jax.io import gcs
from glip_jax.structures.prompts import clean_name

__all__ = ["Openimages", "hierarchy_below", "open_openimages"]

_BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
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
) -> Opened:
    """Detection entries, one per image that has a box or a label, in the order in which the files name them.

    SourceError: a file that is missing or has other columns, class names that cannot be prompted or stand twice, a folder
    of pictures that is missing or empty.
    """
    folder, report = image_folder(images), Report(strict=strict)
    inputs = [epath.Path(path) for path in (boxes, classes, hierarchy, labels) if path is not None]
    for path in inputs:
        if not path.is_file():
            raise SourceError(f"the annotation file {path} does not exist")
    names = _class_names(epath.Path(classes))
    below = {} if hierarchy is None else hierarchy_below(epath.Path(hierarchy))
    join = Join(scratch)

    def notes() -> Iterator[tuple[str, None, list[Any]]]:
        for line, row in _rows(epath.Path(boxes), _BOX_COLUMNS):
            edges = [row[key] for key in _BOX_COLUMNS[2:]]
            yield row["ImageID"], None, [line, row["LabelName"], edges, row.get("IsGroupOf", "0") == "1"]
        if labels is not None:
            for line, row in _rows(epath.Path(labels), _LABEL_COLUMNS):
                yield row["ImageID"], None, [line, row["LabelName"], row["Confidence"]]

    join.add_notes(notes())
    join.images_of_notes()
    if not join.count:
        raise SourceError(f"{boxes} has no box: expected rows below the header")
    entries = _entries(join, names, below, epath.Path(boxes).name, report)
    return Opened(entries, folder, report, tuple(names.values()), join.count, tuple(inputs))


def hierarchy_below(path: epath.Path) -> dict[str, set[str]]:
    """Per machine id all ids below it as `Subcategory` (parts are no kinds); SourceError for another file."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON that can be used ({error!s:.100}): copy it again") from None
    below: dict[str, set[str]] = {}

    def walk(node: Any, place: str) -> set[str]:
        if not isinstance(node, dict) or not isinstance(node.get("LabelName"), str):
            raise SourceError(f"{path}: {place} is {node!r:.40}, expected an object with LabelName")
        children = node.get("Subcategory", [])
        if not isinstance(children, list):
            raise SourceError(f"{path}: Subcategory of {node['LabelName']} is {children!r:.40}, expected a list")
        found: set[str] = set()
        for i, child in enumerate(children):
            found |= walk(child, f"{place}.Subcategory[{i}]") | {child["LabelName"]}
        below.setdefault(node["LabelName"], set()).update(found)
        return found

    try:
        walk(tree, "the file")
    except RecursionError:
        raise SourceError(f"{path} nests deeper than any hierarchy of names: copy it again") from None
    return below


def _class_names(path: epath.Path) -> dict[str, str]:
    """Machine id to name, in the order of the file."""
    names: dict[str, str] = {}
    seen: dict[str, str] = {}
    for number, row in _lines(path):
        if len(row) != 2:
            raise SourceError(f"{path} line {number} has {len(row)} columns, expected 2: machine id, name")
        identity, name = row
        if (identity, name) == ("LabelName", "DisplayName"):
            continue
        if identity in names or name in seen:
            raise SourceError(f"{path} line {number}: {identity}, {name!r} stands twice: ids and names must be unique")
        if not any(character.isalnum() for character in clean_name(name)):
            raise SourceError(f"{path} line {number} names {identity} {name!r}, of which cleaning leaves no letter")
        names[identity], seen[name] = name, identity
    if not names:
        raise SourceError(f"{path} is empty: expected lines of machine id, name")
    return names


def _lines(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of a CSV with their number from 1."""
    number = 0
    try:
        with gcs.open_file(path) as raw:
            text = io.TextIOWrapper(cast(Any, raw), encoding="utf-8-sig", newline="")
            for number, row in enumerate(csv.reader(text), 1):
                if row:
                    yield number, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is no CSV that can be used after line {number} ({error!s:.80}): copy it") from None


def _rows(path: epath.Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows below the header as objects; SourceError if a column is missing or a row has another length."""
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
        here = {identity for identity in order if order[identity] in set(labels)} | set(groups) if negative else set()
        both = {identity for identity in negative if identity in here or below.get(identity, set()) & here}
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
    """Import OpenImages' boxes: CSV files as their owner publishes them.

    example: python -m glip_jax data openimages oidv6-train-annotations-bbox.csv --images=train
    --classes=class-descriptions-boxable.csv --hierarchy=bbox_labels_600_hierarchy.json
    --labels=train-annotations-human-imagelabels-boxable.csv --out=shards/openimages
    """

    annotations: tyro.conf.Positional[Place]
    """The CSV of boxes."""
    images: Place
    """Folder of the pictures, ImageID.jpg."""
    classes: Place
    """The CSV of machine ids and names."""
    hierarchy: Place | None = None
    """The JSON of names below names: what is absent is so with all below it."""
    labels: Place | None = None
    """The CSV of verified labels of whole images: which names are known to be absent."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_openimages(
            self.annotations, self.images, classes=self.classes, hierarchy=self.hierarchy, labels=self.labels,
            strict=self.strict, scratch=scratch,
        )  # fmt: skip
