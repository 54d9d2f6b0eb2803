"""OmniLabel: AP of categories and of free-form descriptions, and their harmonic mean.

Each image has a label space: the descriptions whose `image_ids` list it, absent ones among them on purpose. Boxes are matched
within a pair of image and description as in COCO, at most 100 of them. The pairs of all images then share one precision-recall
curve, so scores must be comparable between descriptions. As in the official evaluator (OmniLabel, arXiv 2304.11463; eval.py of
omnilabeltools). True boxes with id 0 count like others here; there they are never found.
"""

import itertools
import logging
from array import array
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from pycocotools import mask

from glip_jax.evaluation.metrics.files import Ids, MetricError, box_array, id_of, number_array, objects, required
from glip_jax.evaluation.metrics.matching import THRESHOLDS, Curve, curve, match
from glip_jax.evaluation.metrics.per_category import ranks

__all__ = ["NUMBERS", "score"]

logger = logging.getLogger(__name__)

_FINAL = "harmonic mean of AP categ and AP descr"
_GROUPS = {
    "AP categ": ("categories", 0, 100_000),
    "AP descr": ("descriptions", 0, 100_000),
    "AP descr-pos": ("present", 0, 100_000),
    "AP descr short (<=3 words)": ("descriptions", 0, 3),
    "AP descr medium (4-8)": ("descriptions", 4, 8),
    "AP descr long (>=9)": ("descriptions", 9, 100_000),
}
"""By name of the AP: the pairs that share a curve, and the least and greatest number of words of their descriptions."""
_OTHERS = {
    "AP descr @IoU.5": "AP descr", "AP descr @IoU.75": "AP descr", "AP categ @IoU.5": "AP categ",
    "AP categ @IoU.75": "AP categ", "AR descr": "AP descr", "AR categ": "AP categ",
}  # fmt: skip
"""Further numbers, with the AP on whose curve they are read."""
NUMBERS = (_FINAL, *_GROUPS, *_OTHERS)
"""Names of the numbers in the order of the official evaluator."""

_MAX_DETECTIONS = 100
_BLOCK = 100_000
"""Rows of predictions that are in memory as objects at a time."""


class _Pairs(NamedTuple):
    """The pairs of image and description of all label spaces, ordered by image and then as the descriptions in the file."""

    images: Ids
    descriptions: Ids
    sorted_keys: Int64[np.ndarray, " pairs"]
    """Image index x number of descriptions + description index, ascending."""
    order: Int64[np.ndarray, " pairs"]
    """Number of the pair for each of the keys."""
    category: Bool[np.ndarray, " pairs"]
    words: Int32[np.ndarray, " pairs"]

    def find(self, images: Int32[np.ndarray, " n"], descriptions: Int32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The pairs of images and descriptions by index; -1 for a description (-1: unknown) outside the label space."""
        keys = images.astype(np.int64) * len(self.descriptions) + descriptions
        at = np.minimum(np.searchsorted(self.sorted_keys, keys), len(self.sorted_keys) - 1)
        return np.where((descriptions >= 0) & (self.sorted_keys[at] == keys), self.order[at], -1)


class _Boxes(NamedTuple):
    """Boxes, one for each pair that they belong to."""

    pair: Int64[np.ndarray, " n"]
    boxes: Float64[np.ndarray, "n 4"]
    """x, y, w, h."""
    values: Float64[np.ndarray, " n"]
    """Scores of predictions; 1 for true boxes that are crowds, else 0."""
    outside: int
    """Number of (box, description) that are left out because the image's label space lacks the description."""


def score(annotations: str, predictions: str) -> dict[str, Any]:
    """The thirteen `NUMBERS`, -1 where the annotations have no box for one; `boxes`: the number of true boxes of each, -1 where
    there are no pairs; and `counts`.

    `annotations`: file of OmniLabel with images, descriptions and annotations. `predictions`: JSON list of `{"image_id", "bbox":
    [x, y, w, h], "description_ids", "scores"}`. As in the official evaluator, predictions of descriptions outside the label space of
    their image do not count.

    Raises:
        MetricError: a file cannot be used, or predictions are of images that the annotations do not list.
    """
    pairs = _read_pairs(annotations)
    true, found = _read_true(annotations, pairs), _read_found(predictions, annotations, pairs)
    if found.outside and not len(found.pair):
        raise MetricError(
            f"the predictions {predictions}: all {found.outside} are of descriptions outside the label space of their image: write "
            f"the ids of descriptions as {annotations} has them"
        )
    if not len(found.pair):
        logger.warning(f"note: {predictions} hold no box: the numbers are those of finding nothing")
    if found.outside:
        logger.warning(
            f"note: {predictions}: {found.outside} predictions are of descriptions outside the label space of their image; they "
            "count for nothing"
        )
    true_order = np.argsort(true.pair, kind="stable")
    order = np.lexsort((-found.values, found.pair))
    order = order[ranks(found.pair[order]) < _MAX_DETECTIONS]
    true = true._replace(pair=true.pair[true_order], boxes=true.boxes[true_order], values=true.values[true_order])
    found = found._replace(pair=found.pair[order], boxes=found.boxes[order], values=found.values[order])
    matched, ignored = _match(true, found)

    present = np.zeros(len(pairs.order), bool)
    present[true.pair] = True
    kinds = {"categories": pairs.category, "descriptions": ~pairs.category, "present": ~pairs.category & present}
    curves: dict[str, Curve | None] = {}
    boxes: dict[str, int] = {}
    for name, (kind, least, greatest) in _GROUPS.items():
        chosen = kinds[kind] & (pairs.words >= least) & (pairs.words <= greatest)
        rows = chosen[found.pair]
        positives = int((chosen[true.pair] & (true.values == 0)).sum())
        boxes[name] = positives if rows.any() or chosen[true.pair].any() else -1
        curves[name] = curve(found.values[rows], matched[:, rows], ignored[:, rows], positives) if positives else None
    numbers = {name: _mean(each) for name, each in curves.items()}
    for name, of in _OTHERS.items():
        boxes[name], numbers[name] = boxes[of], _other(curves[of], name)
    categ, descr = numbers["AP categ"], numbers["AP descr"]
    both = boxes["AP categ"] > 0 and boxes["AP descr"] > 0
    numbers[_FINAL] = 2 * categ * descr / (categ + descr + 1e-5) if both else -1.0
    boxes[_FINAL] = boxes["AP categ"] + boxes["AP descr"]
    counts = {
        "images": len(pairs.images), "pairs": len(pairs.order), "predictions_outside_label_space": found.outside,
        "annotations_outside_label_space": true.outside,
    }  # fmt: skip
    return {name: numbers[name] for name in NUMBERS} | {
        "boxes": {name: boxes[name] for name in NUMBERS},
        "counts": counts,
    }


def _mean(of: Curve | None) -> float:
    return -1.0 if of is None else float(of.precision.ravel().mean())


def _other(of: Curve | None, name: str) -> float:
    """One of `_OTHERS` on its curve."""
    if of is None:
        return -1.0
    if name.startswith("AR"):
        return float(of.recall.mean())
    return float(of.precision[5 if name.endswith(".75") else 0].mean())


def _match(true: _Boxes, found: _Boxes) -> tuple[Bool[np.ndarray, "T n"], Bool[np.ndarray, "T n"]]:
    """Which predictions have a true box, and which of these boxes are crowds; both inputs are ordered by pair."""
    matched, ignored = np.zeros((2, len(THRESHOLDS), len(found.pair)), bool)
    numbers = np.unique(true.pair)
    ranges = [np.searchsorted(each, numbers, side) for each in (true.pair, found.pair) for side in ("left", "right")]
    for a, b, begin, end in np.stack(ranges, axis=1).tolist():
        if begin < end:
            crowd = true.values[a:b] == 1
            overlap = np.asarray(mask.iou(found.boxes[begin:end], true.boxes[a:b], crowd.astype(int).tolist()))
            matched[:, begin:end], ignored[:, begin:end] = match(overlap, crowd, crowd)
    return matched, ignored


def _read_pairs(path: str) -> _Pairs:
    """The label spaces of the annotations."""
    images = Ids(
        [id_of(entry, f"{path}, an image") for entry in objects(path, "images", "annotations")], "images", path
    )
    keys, category, words = [], array("b"), array("i")
    of_image, of_description = array("q"), array("q")
    for number, entry in enumerate(objects(path, "descriptions", "annotations")):
        where = f"{path}, description {entry.get('id')!r:.40}"
        keys.append(id_of(entry, where))
        info, text = required(entry, "anno_info", where), required(entry, "text", where)
        if not isinstance(info, dict) or not isinstance(text, str):
            raise MetricError(
                f"{where} has the anno_info {info!r:.60} and the text {text!r:.60}, expected an object and text"
            )
        category.append(required(info, "type", f"{where}, anno_info") != "object_description")
        words.append(len(text.split()))
        listed = required(entry, "image_ids", where)
        if not isinstance(listed, list):
            raise MetricError(f"{where} has the image_ids {listed!r:.60}, expected a list")
        for image in listed:
            index = images.find(image)
            if index >= 0:
                of_image.append(index)
                of_description.append(number)
    if not len(of_image):
        raise MetricError(f"{path}: no description lists an image of this file in image_ids")
    descriptions = Ids(keys, "descriptions", path)
    renumbered = np.array([descriptions.find(key) for key in keys], np.int64)
    image, number = np.array(of_image), np.array(of_description)
    order = np.argsort(image, kind="stable")
    image, number = image[order], number[order]
    pair_keys = image * len(keys) + renumbered[number]
    sorter = np.argsort(pair_keys, kind="stable")
    sorted_keys = pair_keys[sorter]
    if len(twice := sorted_keys[1:][sorted_keys[1:] == sorted_keys[:-1]]):
        image_index, index = divmod(int(twice[0]), len(keys))
        raise MetricError(
            f"{path}: the description {descriptions.keys[index]!r:.40} lists the image {images.keys[image_index]!r:.40} twice in "
            "image_ids"
        )
    return _Pairs(
        images, descriptions, sorted_keys, sorter, np.array(category, bool)[number], np.array(words, np.int32)[number]
    )


def _read_true(path: str, pairs: _Pairs) -> _Boxes:
    """The true boxes."""
    rows = list(objects(path, "annotations", "annotations"))
    for key, count in Counter(str(row["id"]) for row in rows if "id" in row).items():
        if count > 1:
            raise MetricError(f"{path}: the id {key:.40} occurs twice in annotations: ids must be unique")
    scores = [[float(bool(row.get("iscrowd")))] * len(_described(row, f"{path}, annotation")) for row in rows]
    return _joined([_block(rows, 0, scores, pairs, f"{path}, annotations", path)])


def _read_found(path: str, annotations: str, pairs: _Pairs) -> _Boxes:
    """The predicted boxes."""
    rows, parts, begin = objects(path), [], 0
    while block := list(itertools.islice(rows, _BLOCK)):
        scores = []
        for number, row in enumerate(block, begin):
            where = f"the predictions {path}, item [{number}]"
            values = required(row, "scores", where)
            if not isinstance(values, list) or len(values) != len(_described(row, where)):
                raise MetricError(
                    f"{where} has the scores {values!r:.60}, expected one for each of its description_ids"
                )
            scores.append(values)
        parts.append(_block(block, begin, scores, pairs, f"the predictions {path}", annotations))
        begin += len(block)
    return _joined(parts)


def _described(row: dict[str, Any], where: str) -> list[Any]:
    """The ids of the descriptions of a box."""
    ids = required(row, "description_ids", where)
    if not isinstance(ids, list):
        raise MetricError(f"{where} has the description_ids {ids!r:.60}, expected a list")
    return ids


def _block(
    rows: list[dict[str, Any]], begin: int, values: list[list[Any]], pairs: _Pairs, where: str, annotations: str
) -> _Boxes:
    """Some rows of a file as arrays, without what is outside the label spaces. `begin`: number of the first row."""
    image = np.array([pairs.images.find(required(row, "image_id", where)) for row in rows], np.int32)
    if len(unknown := np.flatnonzero(image < 0)):
        raise MetricError(
            f"{where}: {annotations} does not list the image {rows[unknown[0]]['image_id']!r:.40} (item [{begin + unknown[0]}], "
            f"first of {len(unknown)}): are they of another image list?"
        )
    boxes = box_array([required(row, "bbox", where) for row in rows], where, "bbox")
    counts = [len(row["description_ids"]) for row in rows]
    described = [pairs.descriptions.find(key) for row in rows for key in row["description_ids"]]
    source = np.repeat(np.arange(len(rows)), counts)
    pair = pairs.find(image[source], np.array(described, np.int32))
    flat = number_array(list(itertools.chain.from_iterable(values)), where)
    kept = pair >= 0
    return _Boxes(pair[kept], boxes[source][kept], flat[kept], int((~kept).sum()))


def _joined(parts: list[_Boxes]) -> _Boxes:
    if not parts:
        return _Boxes(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), 0)
    pair, boxes, values = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return _Boxes(pair, boxes, values, sum(part.outside for part in parts))
