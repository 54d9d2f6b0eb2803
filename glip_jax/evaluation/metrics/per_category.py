"""COCO's curves of precision over recall by category and size of boxes, as COCOeval and LVISEval accumulate them.

Equal to pycocotools and to the LVIS API in every bit, but only pairs of an image and a category that have boxes cost memory or
time, so that 13,000 categories on 30,000 images can be scored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32
from pycocotools import mask

from glip_jax.evaluation.metrics.matching import RECALLS, THRESHOLDS, Matches, curve, match

__all__ = ["AREAS", "Curves", "Found", "Truth", "by_group", "category_curves", "mean_of", "no_curves", "ranks"]

AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Areas of boxes in pixels: all, small, medium, large; both ends inclusive."""


class Truth(NamedTuple):
    """The true boxes of one category."""

    image: Int32[np.ndarray, " G"]
    boxes: Float64[np.ndarray, "G 4"]
    """x, y, width, height."""
    areas: Float64[np.ndarray, " G"]
    crowds: Bool[np.ndarray, " G"]
    """Regions that any number of detections match."""
    ignored: Bool[np.ndarray, " G"]
    """Boxes that are neither found nor missed."""


class Found(NamedTuple):
    """The detections of one category. Those of one image with equal scores rank in the order of the rows."""

    image: Int32[np.ndarray, " N"]
    boxes: Float64[np.ndarray, "N 4"]
    """x, y, width, height."""
    scores: Float64[np.ndarray, " N"]
    unfinished: Bool[np.ndarray, " N"]
    """Of an image that is not exhaustively annotated for the category: not counted unless matched."""


class Curves(NamedTuple):
    """What COCOeval accumulates; -1 where there is no true box. T thresholds, R recalls, K categories, A areas, M caps."""

    precision: Float64[np.ndarray, "T R K A"]
    """At the cap of AP."""
    recall: Float64[np.ndarray, "T K A M"]


def no_curves(categories: int, caps: int) -> Curves:
    """Curves that are -1 everywhere."""
    shape = (len(THRESHOLDS), len(RECALLS), categories, len(AREAS))
    return Curves(-np.ones(shape), -np.ones((shape[0], *shape[2:], caps)))


def category_curves(truth: Truth, found: Found, caps: Sequence[int], top: int, curves: Curves, category: int) -> None:
    """Writes the curves of one category into `curves`.

    `caps`: maximum numbers of detections per image, ascending; detections beyond the last one are not matched at all. `top`: the
    one of them for AP.
    """
    low, high = np.array(AREAS).T
    gt_ignored = truth.ignored | (truth.areas < low[:, None]) | (truth.areas > high[:, None])
    counted = (~gt_ignored).sum(axis=1)
    if not counted.any():
        return
    order = np.lexsort((-found.scores, found.image))
    rank = ranks(found.image[order])
    order, rank = order[rank < caps[-1]], rank[rank < caps[-1]]
    boxes, scores = found.boxes[order], found.scores[order]
    matches = _matched(truth, gt_ignored, found.image[order], boxes)
    areas = boxes[:, 2] * boxes[:, 3]
    for a in np.flatnonzero(counted):
        matched, ignored = matches[a]
        outside = (areas < low[a]) | (areas > high[a]) | found.unfinished[order]
        ignored = ignored | (~matched & outside)
        for m, cap in enumerate(caps):
            within = rank < cap
            each = curve(scores[within], matched[:, within], ignored[:, within], int(counted[a]))
            curves.recall[:, category, a, m] = each.recall
            if cap == top:
                curves.precision[:, :, category, a] = each.precision


def _matched(
    truth: Truth, gt_ignored: Bool[np.ndarray, "A G"], image: Int32[np.ndarray, " N"], boxes: Float64[np.ndarray, "N 4"]
) -> list[Matches]:
    """The matches of all detections at each of the areas; rows are sorted by image."""
    matches = [Matches(*np.zeros((2, len(THRESHOLDS), len(image)), bool)) for _ in AREAS]
    gt_order = np.argsort(truth.image, kind="stable")
    gt_image = truth.image[gt_order]
    for each in np.intersect1d(gt_image, image):
        begin, end = np.searchsorted(image, [each, each + 1])
        rows = gt_order[slice(*np.searchsorted(gt_image, [each, each + 1]))]
        crowds = truth.crowds[rows]
        overlap = np.asarray(mask.iou(boxes[begin:end], truth.boxes[rows], crowds.astype(np.uint8)))
        if overlap.max() < THRESHOLDS[0]:
            continue
        for a, (matched, ignored) in enumerate(matches):
            matched[:, begin:end], ignored[:, begin:end] = match(overlap, gt_ignored[a, rows], crowds)
    return matches


def ranks(groups: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """The position of each row within its run of equal values."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, np.intp)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def by_group(groups: Int[np.ndarray, " N"], count: int) -> list[Int[np.ndarray, " n"]]:
    """The rows of each of the groups 0 ... count - 1, in ascending order."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.searchsorted(groups[order], np.arange(1, count)))


def mean_of(values: Float[np.ndarray, "..."]) -> float:
    """The mean of what is defined (more than -1), or -1."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0
