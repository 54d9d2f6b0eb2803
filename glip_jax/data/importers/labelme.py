"""Imports LabelMe: a JSON file per image, with its shapes; the box of a shape is the smallest that holds it.

    photo1.json   {"imagePath": "photo1.jpg", "imageHeight": ..., "imageWidth": ..., "shapes": [{"label", "shape_type", "points"}]}
    photo1.jpg

Rectangles, polygons, circles, masks and lines become boxes; points have no area and are dropped and counted.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.data.importers.coco import NamedOptions, open_converted
from glip_jax.data.importers.coco_folders import read_json
from glip_jax.data.importers.entry import ImportSource, Report, SourceError, as_numbers
from glip_jax.data.importers.options import PathArgument
from glip_jax.data.importers.sources import (
    ANNOTATIONS,
    Source,
    coco_form,
    files_with,
    folders_below,
    image_folders,
    split_of,
)
from glip_jax.io import gcs
from glip_jax.io.formats import recognize

__all__ = ["Labelme", "open_labelme", "read_labelme", "sources"]


def open_labelme(annotations: epath.PathLike, images: epath.PathLike, **options: Any) -> ImportSource:
    """Opens a folder of LabelMe's JSON files. Options and errors as for `coco.open_converted`."""
    folder = epath.Path(annotations)
    return open_converted(lambda report: read_labelme(json_files(folder), report), folder, images, **options)


def json_files(folder: epath.Path) -> list[epath.Path]:
    """The JSON files in a folder; SourceError if there is none."""
    if gcs.kind(folder) != "folder":
        raise SourceError(f"{folder} is no folder: expected the folder of LabelMe's JSON files")
    files = files_with(folder, ".json")
    if not files:
        raise SourceError(f"{folder} has no JSON file: expected one for each image")
    return files


def read_labelme(files: Iterable[epath.Path], report: Report) -> dict[str, Any]:
    """The shapes of JSON files in COCO's form; files that are not of LabelMe are dropped and counted."""
    listed, notes = [], []
    for number, file in enumerate(files, 1):
        try:
            data = read_json(file)
        except SourceError as error:
            report.drop("image: annotation is no JSON", str(error))
            continue
        if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
            report.drop("image: annotation is not of LabelMe", f"{file}, expected an object with shapes")
            continue
        path = data.get("imagePath")
        name = path if isinstance(path, str) and path.strip() else f"{file.stem}.jpg"
        size = {"height": data.get("imageHeight"), "width": data.get("imageWidth")}
        listed.append({"id": number, "file_name": name, "names": [f"{file.stem}{epath.Path(name).suffix}"], **size})
        for label, box in _boxes(data["shapes"], file.name, report):
            notes.append({"image_id": number, "category_id": label, "bbox": box})
    if not listed:
        raise SourceError(
            f"none of the JSON files is of LabelMe (first: {next(iter(report.first.values()), 'no file')})"
        )
    return coco_form(listed, notes)


def _boxes(shapes: list[Any], file: str, report: Report) -> Iterator[tuple[str, list[float]]]:
    for index, shape in enumerate(shapes):
        where = f"shape {index} of {file}"
        label = shape.get("label") if isinstance(shape, dict) else None
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        if not isinstance(label, str) or not label.strip():
            report.drop("box: shape without a label", where)
            continue
        raw = shape.get("points")
        points = [as_numbers(point, 2) for point in raw] if isinstance(raw, list) else []
        known = [point for point in points if point is not None]
        kind = shape.get("shape_type") or "polygon"
        if len(known) < len(points) or not known or not all(math.isfinite(value) for point in known for value in point):
            report.drop("box: shape whose points are no numbers", f"{where}, {raw!r:.60}")
        elif len(known) == 1 or kind in ("point", "points"):
            report.drop("box: a point has no area", f"{where}, {label!r}")
        else:
            if kind == "circle":
                (x, y), (x2, y2) = known[:2]
                radius = math.hypot(x2 - x, y2 - y)
                known = [(x - radius, y - radius), (x + radius, y + radius)]
            if kind not in ("rectangle", "polygon", "circle"):
                report.note("box: of another shape than rectangle, polygon or circle", f"{where}, {kind!r:.20}")
            left, top = min(x for x, _ in known), min(y for _, y in known)
            yield label.strip(), [left, top, max(x for x, _ in known) - left, max(y for _, y in known) - top]


def sources(folder: epath.Path) -> list[Source]:
    """The splits of a folder of LabelMe: JSON files in folders of their names, or in one folder, which is no split."""
    splits = [(below, split) for below in folders_below(folder) if (split := split_of(below.name))]
    others = [below for below in folders_below(folder) if below.name.lower() in ANNOTATIONS]
    inner = [(place, split_of(place.name)) for below in others for place in folders_below(below)]
    found = [_source(place, split, folder) for place, split in (*splits, *inner) if split and _is_labelme(place)]
    return found or [_source(place, "", folder) for place in (folder, *others) if _is_labelme(place)][:1]


def _is_labelme(folder: epath.Path) -> bool:
    files = files_with(folder, ".json")
    form = recognize(files[0]) if files else None
    return form is not None and form.reader == "labelme"


def _source(place: epath.Path, split: str, folder: epath.Path) -> Source:
    images = image_folders(place / "x.json", split, folder)
    return Source(split, place, images, lambda report: read_labelme(json_files(place), report))


@dataclass(frozen=True, kw_only=True)
class Labelme(NamedOptions):
    """Import LabelMe: a folder of JSON files, one for each image.

    example: python -m glip_jax data labelme annotated --images=annotated --out=shards/mine
    """

    annotations: tyro.conf.Positional[PathArgument]
    """Folder of the JSON files."""
    images: PathArgument
    """Folder of the images."""

    @property
    def source(self) -> epath.Path:
        """The folder of the JSON files."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The folder of the JSON files."""
        return (self.annotations,)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_labelme(self.annotations, self.images, **self.naming(scratch))
