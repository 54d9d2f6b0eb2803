"""Imports Label Studio's JSON: a list of tasks with their annotations (JSON), or with their labels only (JSON-MIN).

    [{"id": 1, "data": {"image": "/data/upload/1/3f9a0c21-photo.jpg"}, "annotations": [{"result": [
        {"type": "rectanglelabels", "original_width": ..., "original_height": ...,
         "value": {"x": .., "y": .., "width": .., "height": .., "rotation": 0, "rectanglelabels": ["dog"]}}]}]}]

Coordinates are percent of the image. Rotated rectangles, ellipses and polygons become the smallest box that holds them; key
points and brushes are dropped and counted. Of several annotations of a task the one marked as ground truth is read, else the
first that is not canceled. An uploaded image is also looked for without the eight hexadecimal digits that Label Studio puts
before its name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.data.importers.coco import NamedOptions, open_converted
from glip_jax.data.importers.coco_folders import read_json
from glip_jax.data.importers.entry import ImportSource, Report, SourceError, as_numbers
from glip_jax.data.importers.options import PathArgument
from glip_jax.data.importers.readers import as_integer, require_file
from glip_jax.data.importers.sources import (
    ANNOTATIONS,
    Source,
    coco_form,
    files_with,
    folders_below,
    image_folders,
    one_per_split,
    split_of,
)
from glip_jax.io.formats import recognize
from glip_jax.io.image_files import ENDINGS

__all__ = ["LabelStudio", "open_label_studio", "read_label_studio", "sources"]

_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")


def open_label_studio(annotations: epath.PathLike, images: epath.PathLike, **options: Any) -> ImportSource:
    """Opens an export of Label Studio, JSON or JSON-MIN. Options and errors as for `coco.open_converted`."""
    file = epath.Path(annotations)
    require_file(file)
    return open_converted(lambda report: read_label_studio(file, report), file, images, **options)


def read_label_studio(file: epath.Path, report: Report) -> dict[str, Any]:
    """The regions of all tasks in COCO's form; SourceError if the file is no list of tasks."""
    tasks = read_json(file)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise SourceError(f"{file} holds no list of objects: expected an export of Label Studio as JSON or JSON-MIN")
    listed, notes = [], []
    for number, task in enumerate(tasks, 1):
        where = f"task {task.get('id', number)!r:.20}"
        name = _image(task)
        regions = _regions(task, where, report)
        if name is None:
            report.drop("image: task without an image", where)
        elif regions is not None:
            path = name.rpartition("?d=")[2]
            tail = path.replace("\\", "/").rpartition("/")[2]
            sizes = [
                (as_integer(item.get("original_height")), as_integer(item.get("original_width"))) for item in regions
            ]
            size = next((dict(zip(("height", "width"), size)) for size in sizes if all(size)), {})
            listed.append({"id": number, "file_name": name, "names": [_UPLOADED.sub("", tail, count=1)], **size})
            for label, box in _boxes(regions, where, report):
                notes.append({"image_id": number, "category_id": label, "bbox": box})
    return coco_form(listed, notes)


def _image(task: Mapping[str, Any]) -> str | None:
    """The image of a task: the value of `data` (in JSON-MIN: of the task) under `image`, else the first that names an image."""
    data = task["data"] if isinstance(task.get("data"), dict) else task
    values = [data.get("image"), *data.values()]
    texts = [value for value in values if isinstance(value, str)]
    named = [
        text for text in texts if text.partition("?")[0].lower().endswith(ENDINGS) or text.lower().endswith(ENDINGS)
    ]
    return next(iter(named), None)


def _regions(task: Mapping[str, Any], where: str, report: Report) -> list[dict[str, Any]] | None:
    """The regions of the annotation that counts, as in JSON; None, counted, for a task that nobody annotated."""
    if "data" not in task:
        lists = [value for value in task.values() if isinstance(value, list)]
        minimal = [item for value in lists for item in value if isinstance(item, dict)]
        return [{**item, "value": item} for item in minimal]
    raw = task.get("annotations", task.get("completions"))
    given = [item for item in raw if isinstance(item, dict)] if isinstance(raw, list) else []
    finished = [item for item in given if not item.get("was_cancelled")]
    if not finished:
        report.drop("image: task that is not annotated", where)
        return None
    chosen = next((item for item in finished if item.get("ground_truth")), finished[0])
    report.note("image: several annotations of a task, one is read", where, len(finished) - 1)
    result = chosen.get("result")
    return [item for item in result if isinstance(item, dict)] if isinstance(result, list) else []


def _boxes(regions: list[dict[str, Any]], where: str, report: Report) -> Iterator[tuple[str, list[float]]]:
    """Yields label and box in pixels of each region with an area."""
    labels_of: dict[str, str] = {}
    for item in regions:  # labels that are given beside a region without labels of its own have its id
        if (label := _label(item)) is not None:
            labels_of.setdefault(str(item.get("id")), label)
    for index, item in enumerate(regions):
        value, place = item.get("value"), f"region {item.get('id', index)!r:.20} of {where}"
        if not isinstance(value, dict) or not ({"x", "y", "points", "rle"} & value.keys()):
            continue  # a choice, a text, or the labels of another region
        label = _label(item) or labels_of.get(str(item.get("id")))
        size = as_numbers([item.get("original_width"), item.get("original_height")], 2)
        points = None if size is None else _points(value, size)
        if label is None:
            report.drop("box: region without a label", place)
        elif size is None:
            report.drop(
                "box: region without the size of its image", f"{place}, expected original_width and original_height"
            )
        elif points is None:
            report.drop("box: region that is no rectangle, polygon or ellipse", f"{place}, {item.get('type')!r:.30}")
        elif not all(math.isfinite(number) for point in points for number in point):
            report.drop("box: not finite", f"{place}, {value!r:.60}")
        else:
            shape = value.get("rotation") or "points" in value or "radiusX" in value
            report.note("box: of a rotated rectangle, polygon or ellipse", place, bool(shape))
            xs, ys = [x for x, _ in points], [y for _, y in points]
            yield label, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _label(item: Mapping[str, Any]) -> str | None:
    value = item.get("value")
    if not isinstance(value, dict):
        return None
    for key, labels in value.items():
        if (
            key.endswith("labels")
            and isinstance(labels, list)
            and labels
            and isinstance(labels[0], str)
            and labels[0].strip()
        ):
            return labels[0].strip()
    return None


def _points(value: Mapping[str, Any], size: tuple[float, ...]) -> list[tuple[float, float]] | None:
    """Points in pixels that span the box of a region in an image of `size` (width, height); None for another shape.

    A rectangle is rotated clockwise about its upper left corner, an ellipse about its center.
    """
    width, height = size
    if isinstance(value.get("points"), list):
        pairs = [as_numbers(point, 2) for point in value["points"]]
        known = [pair for pair in pairs if pair is not None]
        return [(x * width / 100, y * height / 100) for x, y in known] if known and len(known) == len(pairs) else None
    angle = as_numbers([value.get("rotation") or 0], 1)
    ellipse = as_numbers([value.get(key) for key in ("x", "y", "radiusX", "radiusY")], 4)
    box = as_numbers([value.get(key) for key in ("x", "y", "width", "height")], 4)
    if angle is None or (box is None and ellipse is None):
        return None
    turn = math.radians(angle[0])
    cos, sin = math.cos(turn), math.sin(turn)
    if ellipse is not None:
        x, y, a, b = (part * side / 100 for part, side in zip(ellipse, (width, height, width, height)))
        across, down = math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos)
        return [(x - across, y - down), (x + across, y + down)]
    assert box is not None
    x, y, w, h = (part * side / 100 for part, side in zip(box, (width, height, width, height)))
    return [(x + u * cos - v * sin, y + u * sin + v * cos) for u in (0.0, w) for v in (0.0, h)]


def sources(folder: epath.Path) -> list[Source]:
    """The exports of Label Studio in a folder, by the splits that their names say."""
    found = []
    for place in (folder, *(below for below in folders_below(folder) if below.name.lower() in ANNOTATIONS)):
        for file in files_with(place, ".json"):
            form = recognize(file)
            if form is not None and form.reader == "label-studio":
                found.append(_source(file, split_of(file.stem), folder))
    if any(source.split for source in found):
        found = [source for source in found if source.split]
    return one_per_split(found, folder)


def _source(file: epath.Path, split: str, folder: epath.Path) -> Source:
    return Source(split, file, image_folders(file, split, folder), lambda report: read_label_studio(file, report))


@dataclass(frozen=True, kw_only=True)
class LabelStudio(NamedOptions):
    """Import an export of Label Studio as JSON or JSON-MIN.

    example: python -m glip_jax data label-studio project-1.json --images=photographs --out=shards/mine
    """

    annotations: tyro.conf.Positional[PathArgument]
    """The exported JSON file."""
    images: PathArgument
    """Folder of the images, under the names that they have in Label Studio or had before the upload."""

    @property
    def source(self) -> epath.Path:
        """The exported file."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The exported file."""
        return (self.annotations,)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_label_studio(self.annotations, self.images, **self.naming(scratch))
