"""Overlaps of boxes, COCO's greedy matching, and its precision over recall: what the evaluators share.

Corners are plain here: a box from x1 to x2 is x2 - x1 wide, as in the official evaluators of these benchmarks.
`structures.boxes` has the inclusive corners of the detector.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

__all__ = ["RECALLS", "THRESHOLDS", "Curve", "Matches", "Overlap", "curve", "giou", "iou", "match", "overlaps"]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps at which COCO's AP is averaged."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which COCO reads the precision."""

Overlap = Literal["iou", "giou"]


def iou(a: Float[Any, "n 4"], b: Float[Any, "m 4"]) -> Float[Any, "n m"]:
    """Intersection over union of all pairs of boxes xyxy, in the precision of the inputs; nan where both have no area."""
    return _iou(a, b)[0]


def giou(a: Float[Any, "n 4"], b: Float[Any, "m 4"]) -> Float[Any, "n m"]:
    """Generalized IoU (arXiv 1902.09630) of all pairs of boxes xyxy, in the precision of the inputs; nan without any area.

    Without the epsilon of `structures.boxes.giou`: an IoU of exactly 0.5 of nested boxes stays 0.5.
    """
    overlap, union = _iou(a, b)
    with np.errstate(all="ignore"):
        sides = np.maximum(a[:, None, 2:], b[None, :, 2:]) - np.minimum(a[:, None, :2], b[None, :, :2])
        enclosing = sides[..., 0] * sides[..., 1]
        return overlap - (enclosing - union) / enclosing


def overlaps(a: Float[Any, "n 4"], b: Float[Any, "m 4"], measure: Overlap) -> Float[Any, "n m"]:
    """`iou` or `giou`."""
    return giou(a, b) if measure == "giou" else iou(a, b)


def _iou(a: Float[Any, "n 4"], b: Float[Any, "m 4"]) -> tuple[Any, Any]:
    """The IoU and the area of the union."""
    with np.errstate(all="ignore"):
        areas = [(each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1]) for each in (a, b)]
        sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
        sides = np.maximum(sides, 0)
        common = sides[..., 0] * sides[..., 1]
        union = areas[0][:, None] + areas[1] - common
        return common / union, union


class Matches(NamedTuple):
    """What the detections of one image and class are at each threshold."""

    matched: Bool[np.ndarray, "T D"]
    """Whether a detection has a true box."""
    ignored: Bool[np.ndarray, "T D"]
    """Whether that box is one that does not count, so that the detection does not count either."""


def match(
    overlap: Float[np.ndarray, "D G"],
    ignored: Bool[np.ndarray, " G"],
    crowd: Bool[np.ndarray, " G"],
    thresholds: Float64[np.ndarray, " T"] = THRESHOLDS,
) -> Matches:
    """COCO's matching of detections, highest score first, to the true boxes of one image and class.

    A detection takes the box of highest overlap that is still free, the later one of equals, if the overlap reaches the
    threshold. Boxes that are `ignored` are taken only where no other is; those that are `crowd` stay free. Equal to
    `COCOeval.evaluateImg` of pycocotools, and without crowd to `LVISEval.evaluate_img`.
    """
    detections, boxes = overlap.shape
    matched, without = np.zeros((2, len(thresholds), detections), bool)
    limits = np.minimum(thresholds, 1 - 1e-10)
    if not boxes:
        return Matches(matched, without)
    order = np.argsort(ignored, kind="stable")
    overlap, ignored, crowd = overlap[:, order], ignored[order], crowd[order]
    counted = int((~ignored).sum())
    free = np.ones((len(thresholds), boxes), bool)
    every = np.arange(len(thresholds))
    for index in np.flatnonzero(overlap.max(1) >= limits.min()):
        row = np.where(free & (overlap[index] >= limits[:, None]), overlap[index], -1.0)
        # argmax returns the first of equals, so the columns are reversed.
        best = boxes - 1 - row[:, ::-1].argmax(1)
        if counted < boxes:
            regular = row[:, :counted]
            has_regular = (regular >= 0).any(1)
            if counted:
                best = np.where(has_regular, counted - 1 - regular[:, ::-1].argmax(1), best)
        found = row[every, best] >= 0
        matched[:, index] = found
        without[:, index] = found & ignored[best]
        free[every[found], best[found]] = crowd[best[found]]
    return Matches(matched, without)


class Curve(NamedTuple):
    """Precision over recall at each threshold."""

    precision: Float64[np.ndarray, "T R"]
    """Highest precision at this recall or a higher one, 0 beyond the highest recall."""
    recall: Float64[np.ndarray, " T"]
    """Recall of all detections."""
    scores: Float64[np.ndarray, "T R"]
    """Score at which the recall is reached, 0 beyond the highest recall."""


def curve(
    scores: Float[np.ndarray, " D"],
    matched: Bool[np.ndarray, "T D"],
    ignored: Bool[np.ndarray, "T D"],
    positives: int,
    recalls: Float64[np.ndarray, " R"] = RECALLS,
) -> Curve:
    """COCO's precision over recall of the detections of all images together.

    `positives`: number of true boxes that count, at least 1. Detections of equal score stay in their order. Equal to
    `COCOeval.accumulate` of pycocotools.
    """
    order = np.argsort(-scores, kind="stable")
    scores = np.asarray(scores[order], np.float64)
    right = np.cumsum(matched[:, order] & ~ignored[:, order], axis=1, dtype=np.float64)
    wrong = np.cumsum(~matched[:, order] & ~ignored[:, order], axis=1, dtype=np.float64)
    recall = right / positives
    precision = right / (wrong + right + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at = np.stack([np.searchsorted(each, recalls, side="left") for each in recall])
    reached = at < len(scores)
    at = np.minimum(at, max(len(scores) - 1, 0))
    if not len(scores):
        return Curve(np.zeros(at.shape), np.zeros(len(recall)), np.zeros(at.shape))
    return Curve(
        np.where(reached, np.take_along_axis(precision, at, axis=1), 0.0), recall[:, -1],
        np.where(reached, scores[at], 0.0),
    )  # fmt: skip
