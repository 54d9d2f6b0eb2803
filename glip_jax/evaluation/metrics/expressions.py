"""Referring expressions with their true boxes and the boxes that were predicted for them, for `refexp` and `grefcoco`.

Annotations are in the layout of MDETR: an entry of `images` is one expression, and `annotations` hold its boxes [x, y, w, h]. An
expression without a target has one annotation of category -1 (gRefCOCO). Predictions are `files.boxes_by_image`, by the id of
the expression.
"""

import logging
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from glip_jax.data.importers.readers import as_integer
from glip_jax.evaluation.metrics.files import (
    Ids,
    MetricError,
    ScoredBoxes,
    box_array,
    boxes_by_image,
    id_of,
    objects,
    required,
)

__all__ = ["Expression", "read_expressions", "read_targets"]

logger = logging.getLogger(__name__)

_ENOUGH = 10
"""Expressions with boxes from which on their format is judged."""
_NO_TARGET = -1
"""Category of the annotation of an expression without a target."""
_RELATIVE = 1.5
"""Largest value of boxes in fractions of their image."""
_LARGEST = 1e9
"""Pixels that no box reaches."""


class Expression(NamedTuple):
    """An expression, its true boxes and the predicted ones, xyxy in pixels.

    Boxes and scores are float32, as in the official evaluators, which compute with PyTorch's default type. A score of 0.7 in a
    file is 0.69999999 in float32, and below a threshold of 0.7.
    """

    id: Any
    dataset: str
    """`dataset_name` of the entry, such as refcoco+; "" if it has none."""
    targets: Float32[np.ndarray, "T 4"]
    """Without rows for an expression without a target."""
    boxes: Float32[np.ndarray, "P 4"]
    """By descending score; boxes of equal score by descending x1, y1, x2, y2."""
    scores: Float32[np.ndarray, " P"]


def read_expressions(annotations: str, predictions: str) -> list[Expression]:
    """Reads the annotations and the predictions of their expressions.

    Raises:
        MetricError: a file cannot be used, an id occurs twice, an expression has no annotation or no prediction, predictions
            are of others, or the corners of a box are not in order.
    """
    names, keys = {}, []
    for entry in objects(annotations, "images", "annotations"):
        key = id_of(entry, f"{annotations}, an entry of images")
        names[key] = str(entry.get("dataset_name") or "")
        keys.append(key)
    ids = Ids(keys, "images", annotations)
    if not keys:
        raise MetricError(f"{annotations}: images is empty, expected at least one expression")
    targets = read_targets(annotations, ids)
    predicted: dict[int, tuple[str, ScoredBoxes]] = {}
    others = []
    for key, found in boxes_by_image(predictions).items():
        index = ids.find(key)
        if index in predicted:
            raise MetricError(f"the predictions {predictions} have the expression {predicted[index][0]} again as {key}")
        if index < 0:
            others.append(key)
        else:
            predicted[index] = key, found
    missing = [str(key) for index, key in enumerate(ids.keys) if index not in predicted]
    if missing or others:
        found = [f"lack {len(missing)} (first {missing[0]:.40})"] if missing else []
        found += [f"have {len(others)} others (first {others[0]:.40})"] if others else []
        raise MetricError(
            f"the predictions {predictions} are of another list: of the {len(ids)} expressions of {annotations} they "
            f"{' and '.join(found)}; expected an entry for each, with empty lists where nothing was found"
        )
    expressions = []
    for index, key in enumerate(ids.keys):
        name, found = predicted[index]
        boxes, scores = _ranked(found, f"the predictions {predictions}, image {name:.40}")
        expressions.append(Expression(key, names[key], targets[index], boxes, scores))
    largest = [float(np.abs(each.boxes).max()) for each in expressions if len(each.boxes)]
    if not largest:
        logger.warning(f"note: {predictions} hold no box: the numbers are those of finding nothing")
    elif max(largest) <= _RELATIVE and len(largest) >= _ENOUGH:
        raise MetricError(
            f"the predictions {predictions}: no value of a box is above {max(largest):g}, so boxes seem to be relative: expected "
            "x1, y1, x2, y2 in pixels"
        )
    return expressions


def read_targets(path: str, ids: Ids) -> list[Float32[np.ndarray, "T 4"]]:
    """The true boxes of each expression; `ids`: of the entries of `images`. Raises MetricError as `read_expressions`."""
    boxes, absent, seen = defaultdict[int, list[list[float]]](list), set[int](), set[str]()
    for entry in objects(path, "annotations", "annotations"):
        key = str(entry.get("id"))
        where = f"{path}, annotation {key:.40}"
        if key in seen and "id" in entry:
            raise MetricError(f"{where} occurs twice: ids must be unique")
        seen.add(key)
        image, box = required(entry, "image_id", where), required(entry, "bbox", where)
        index = ids.find(image)
        if index < 0:
            raise MetricError(f"{where} is of image {image!r:.40}, which is not in images")
        x, y, width, height = box_array([box], where, "bbox")[0].tolist()
        if width < 0 or height < 0 or max(abs(x), abs(y), width, height) > _LARGEST:
            raise MetricError(f"{where} has the bbox {box!r:.60}, expected [x, y, width, height]")
        boxes[index].append([x, y, x + width, y + height])
        if as_integer(entry.get("category_id")) == _NO_TARGET:
            absent.add(index)
    if without := [key for index, key in enumerate(ids.keys) if index not in boxes]:
        raise MetricError(
            f"{path}: {len(without)} of {len(ids)} expressions have no annotation, first {without[0]!r:.40}: expected its boxes, "
            "or one annotation of category -1 for an expression without a target"
        )
    found = []
    for index in range(len(ids)):
        rows = [] if index in absent else boxes[index]
        found.append(np.array(rows, np.float32).reshape(-1, 4))
    return found


def _ranked(found: ScoredBoxes, where: str) -> tuple[Float32[np.ndarray, "P 4"], Float32[np.ndarray, " P"]]:
    """Boxes and scores in the order of `Expression.boxes`."""
    with np.errstate(over="ignore"):
        boxes, scores = found.boxes.astype(np.float32), found.scores.astype(np.float32)
    if (abs(boxes) > _LARGEST).any() or np.isinf(scores).any():
        raise MetricError(f"{where}: a box or a score is too large, expected pixels and a probability")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        first = int(np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(1))[0])
        raise MetricError(f"{where}: boxes[{first}] is {found.boxes[first].tolist()}, expected x1 <= x2 and y1 <= y2")
    order = np.lexsort((*boxes.T[::-1], scores))[::-1]
    return boxes[order], scores[order]
