"""Annotations in COCO's form as arrays: what an official file holds, without the guards of the imports.

Images, boxes and categories are taken as they are listed. No image folder is looked at, no box is cut or dropped for its size,
and segmentations are not kept. Boxes of images or categories that are not listed are left out, as pycocotools and the LVIS API do,
and counted.
"""

import functools
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float64, Int32

from glip_jax.data.importers.coco_json import BoxFormatCheck
from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.readers import as_integer
from glip_jax.evaluation.metrics.files import Ids, MetricError, Results, box_array, id_of, objects

__all__ = ["Annotations", "ResultCheck", "read_annotations"]

logger = logging.getLogger(__name__)

_RELATIVE = 1.5
"""Largest value of boxes in fractions of their image."""
_SURE = 100
"""Least number of detections that are refused because they seem to be corners."""


@dataclass(frozen=True)
class Annotations:
    """Ground truth of boxes with categories. Rows keep the order of the file."""

    path: str
    images: Ids
    categories: Ids
    image_fields: tuple[dict[str, Any], ...]
    """Per image, in the order of `images`: the other fields of the file."""
    category_fields: tuple[dict[str, Any], ...]
    """Per category, in the order of `categories`."""
    image: Int32[np.ndarray, " G"]
    """Index into `images`."""
    category: Int32[np.ndarray, " G"]
    """Index into `categories`."""
    boxes: Float64[np.ndarray, "G 4"]
    """x, y, width, height."""
    areas: Float64[np.ndarray, " G"]
    """In pixels, by the file; width x height where it has none."""
    crowds: Bool[np.ndarray, " G"]
    """`iscrowd`: COCO's regions in which nothing counts."""
    ignored: Bool[np.ndarray, " G"]
    """`ignore`, which the LVIS API reads and pycocotools does not."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Counts of boxes that are left out or completed, by reason."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the categories, with the id where two share one."""
        names = [str(fields.get("name", key)) for key, fields in zip(self.categories.keys, self.category_fields)]
        shared = {name for name, count in Counter(names).items() if count > 1}
        return tuple(
            f"{name} (id {key})" if name in shared else name
            for name, key in zip(names, self.categories.keys, strict=True)
        )

    def of_categories(self, keep: Bool[np.ndarray, " K"]) -> "Annotations":
        """The same images with the chosen categories and their boxes."""
        ids = Ids([key for key, kept in zip(self.categories.keys, keep, strict=True) if kept], "categories", self.path)
        place = np.array([ids.find(key) if kept else -1 for key, kept in zip(self.categories.keys, keep)], np.int32)
        rows = keep[self.category]
        return Annotations(
            self.path, self.images, ids, self.image_fields,
            tuple(self.category_fields[self.categories.find(key)] for key in ids.keys), self.image[rows],
            place[self.category[rows]], self.boxes[rows], self.areas[rows], self.crowds[rows], self.ignored[rows], self.left_out,
        )  # fmt: skip


def read_annotations(path: str, notes: bool = True) -> Annotations:
    """Reads a file in COCO's form (COCO, LVIS, D3, Objects365, V3Det, Roboflow).

    `notes`: log what is odd in the file, once however often it is read.

    Raises:
        MetricError: the file does not exist, is not JSON, lacks images, annotations or categories, an id occurs twice, or a
            box is not four finite numbers.
    """
    images, image_fields = _listed(path, "images")
    categories, category_fields = _listed(path, "categories")
    if not len(images) or not len(categories):
        empty = "images" if not len(images) else "categories"
        raise MetricError(f"the annotations {path} list no {empty}: there is nothing to score")
    left_out: Counter[str] = Counter()
    seen: set[Any] = set()
    rows: list[tuple[int, int, Any, float, bool, bool]] = []
    zero = False
    for i, item in enumerate(objects(path, "annotations", "annotations")):
        where = f"annotations {path}: annotations[{i}]"
        if item.get("id") is not None:
            key = id_of(item, where)
            if key in seen:
                raise MetricError(f"{path}: the id {key!r:.40} occurs twice in annotations: ids must be unique")
            seen.add(key)
            zero |= key == 0
        missing = [key for key in ("image_id", "category_id", "bbox") if key not in item]
        if missing:
            raise MetricError(f"{where} lacks {', '.join(missing)}: expected annotations of boxes in COCO's form")
        image, category = images.find(item["image_id"]), categories.find(item["category_id"])
        if image < 0 or category < 0:
            left_out["box of an image that is not listed" if image < 0 else "box of a category that is not listed"] += 1
            continue
        area = item.get("area")
        if not isinstance(area, int | float) or isinstance(area, bool) or not math.isfinite(area):
            area = math.nan
        rows.append((
            image, category, item["bbox"], area, _flag(item, "iscrowd", where),
            bool(as_integer(item.get("ignore")) or item.get("ignore") is True),
        ))  # fmt: skip
    columns = list(zip(*rows)) or [()] * 6
    boxes, areas = box_array(list(columns[2]), f"annotations {path}", "bbox"), np.array(columns[3], np.float64)
    without = np.isnan(areas)
    if without.any():
        left_out["box without an area, width x height taken"] += int(without.sum())
        areas = np.where(without, boxes[:, 2] * boxes[:, 3], areas)
    if notes:
        for reason, count in left_out.items():
            _note(f"note: {path}: {count} x {reason}")
        if zero:
            _note(f"note: {path}: an annotation has the id 0, which pycocotools takes for no match; it is matched here")
    return Annotations(
        path, images, categories, image_fields, category_fields, np.array(columns[0], np.int32), np.array(columns[1], np.int32),
        boxes, areas, np.array(columns[4], bool), np.array(columns[5], bool), dict(left_out),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _note(text: str) -> None:
    """Logs a note, the same one once in a process: a job reads a file before the detection and for each metric."""
    logger.warning(text)


def _listed(path: str, what: str) -> tuple[Ids, tuple[dict[str, Any], ...]]:
    """The ids of images or categories, and the other fields of each in the order of `Ids`."""
    listed = []
    for i, item in enumerate(objects(path, what, "annotations")):
        where = f"annotations {path}: {what}[{i}]"
        listed.append((id_of(item, where), item))
    ids = Ids([key for key, _ in listed], what, path)
    fields: dict[Any, dict[str, Any]] = dict(listed)
    return ids, tuple(fields[key] for key in ids.keys)


def _flag(item: dict[str, Any], key: str, where: str) -> bool:
    """A field that is 0 or 1; a missing one is 0."""
    value = item.get(key)
    if value is None or value == "":
        return False
    number = int(value) if isinstance(value, bool) else as_integer(value)
    if number not in (0, 1):
        raise MetricError(f"{where} has {key} {value!r:.40}, expected 0 or 1")
    return bool(number)


class ResultCheck:
    """Counts what predictions in COCO's results form hold, and refuses those that are of another category list or box format."""

    def __init__(self, predictions: str, truth: Annotations) -> None:
        """`predictions`: their path, for messages."""
        self._path, self._truth, self._format = predictions, truth, BoxFormatCheck()
        sizes = [[_side(fields.get(side)) for side in ("width", "height")] for fields in truth.image_fields]
        self._sizes: Float64[np.ndarray, "I 2"] = np.array(sizes, np.float64)
        self._seen = np.zeros(len(truth.images), bool)
        self.given = self.unlisted = 0

    @property
    def counts(self) -> dict[str, int]:
        """What was scored and what does not count, for the result."""
        truth = self._truth
        return {
            "images": len(truth.images), "categories": len(truth.categories), "boxes": len(truth.image), "detections": self.given,
            "not_listed_category": self.unlisted, "images_without_detection": int((~self._seen).sum()),
        }  # fmt: skip

    def add(self, block: Results) -> None:
        """Counts rows."""
        self.given += len(block.categories)
        self.unlisted += int((block.categories < 0).sum())
        self._seen[block.images] = True
        # Detectors that do not clip their boxes reach a little beyond the image, so this is laxer than for annotations.
        begin, size, room = block.boxes[:, :2], block.boxes[:, 2:], 1.1 * self._sizes[block.images] + 1
        beyond = (begin + size > room).any(axis=1)
        check = self._format
        check.boxes += len(begin)
        check.shares += int((np.abs(block.boxes) <= _RELATIVE).all(axis=1).sum())
        check.sized += int(np.isfinite(room).all(axis=1).sum())
        check.beyond += int(beyond.sum())
        check.corners += int(((size > begin) & (size <= room)).all(axis=1).sum())
        if beyond.any() and not check.first:
            row = int(np.flatnonzero(beyond)[0])
            check.first = (
                f"image {self._truth.images.keys[block.images[row]]}, {' '.join(f'{v:g}' for v in block.boxes[row])}"
            )

    def finish(self) -> None:
        """Notes that nothing was found, or that categories are not listed.

        Raises MetricError if no detection is of a listed category, or if the boxes seem to be corners or relative.
        """
        keys = self._truth.categories.keys
        ids = ", ".join(map(str, keys[:5])) + (f" ... {keys[-1]}" if len(keys) > 5 else "")
        if self.unlisted == self.given > 0:
            raise MetricError(
                f"{self._path}: none of the {self.given} detections has a category of {self._truth.path}, whose ids are {ids}: write "
                "the annotations' ids, not their indices"
            )
        try:
            self._format.raise_if_wrong(epath.Path(self._path), "write x, y, width, height")
        except SourceError as error:
            # A few large boxes that reach beyond their images look the same: then the numbers are given.
            check = self._format
            relative = check.shares == check.boxes
            if relative or (check.sized >= _SURE and check.beyond > 0.3 * check.sized):
                raise MetricError(str(error)) from None
            logger.warning(f"note: {error}")
        if self.unlisted:
            logger.warning(
                f"note: {self._path}: {self.unlisted} of {self.given} detections are of categories that {self._truth.path} does not "
                f"list (its ids: {ids}); they count for nothing"
            )
        without = self.counts["images_without_detection"]
        if self.given and without > len(self._seen) / 2:
            logger.warning(
                f"note: {self._path}: {without} of the {len(self._seen)} images of {self._truth.path} have no detection; their boxes "
                "are missed (are the predictions complete, and of this set?)"
            )
        if not self.given:
            logger.warning(f"note: {self._path} hold no detection: the numbers are those of finding nothing")


def _side(value: Any) -> float:
    """A side of an image in pixels; nan where none is listed."""
    number = as_integer(value)
    return float(number) if number is not None and number > 0 else math.nan
