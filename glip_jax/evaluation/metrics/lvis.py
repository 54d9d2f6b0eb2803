"""LVIS' box AP, standard and fixed, with groups of rare, common and frequent categories.

LVIS is annotated per image for some categories only: `neg_category_ids` are known to be absent, and of `not_exhaustive_category_ids`
not every object has a box. A detection counts on images where its category is annotated or known to be absent; an unmatched one
of a not exhaustive category does not count. There are no crowds.

- Standard AP (LVISEval): the 300 highest scores of each image, over all categories.
- Fixed AP (Dave et al., arXiv 2102.01066; `scripts/evaluate_ap_fixed.py` of large-vocab-devil): the 10,000 highest scores of each
  category over the whole set, and no cap per image.

Equal scores rank in the order of the files, at the cuts as well.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32

from glip_jax.evaluation.metrics.annotations import Annotations, ResultCheck, read_annotations
from glip_jax.evaluation.metrics.files import MetricError, Results, result_blocks
from glip_jax.evaluation.metrics.per_category import (
    Curves,
    Found,
    Truth,
    by_group,
    category_curves,
    mean_of,
    no_curves,
    ranks,
)

__all__ = ["StandardAP", "score"]

logger = logging.getLogger(__name__)

_GROUPS = ("r", "c", "f")

_PER_IMAGE = 300
"""Detections of an image that standard AP counts."""

_HELD = 2_000_000
"""Rows that are read before the cut, at least; then as many again as were kept."""


def score(
    annotations: str,
    predictions: str,
    *,
    fixed: bool = False,
    top: int | None = None,
    per_class: bool = False,
) -> dict[str, Any]:
    """LVIS' numbers of predictions in COCO's results form.

    `predictions`: a file or a folder of files, in any partition; memory holds the rows within the cut, and boxes only of those
    that count. `fixed`: fixed AP. `top`: detections per image (default 300), or with `fixed` per category (default 10,000).
    `per_class`: adds AP by name of the category.

    Returns "AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"; "AR@300" and "ARs@300", "ARm@300", "ARl@300" (by the
    cap), or with `fixed` "kept", the number of detections within the cut; and "counts". A number is -1 where the annotations
    have no boxes for it.

    Raises:
        MetricError: the files cannot be read, or the annotations are not those of LVIS.
    """
    top = (10_000 if fixed else _PER_IMAGE) if top is None else top
    if top < 1:
        raise MetricError(f"top={top}: expected at least 1")
    truth = read_annotations(annotations)
    groups, annotated, unfinished = _groups(truth), *_asked(truth)
    detections, check = _Detections(truth, annotated, fixed, top), ResultCheck(predictions, truth)
    for block in result_blocks(predictions, truth.images, truth.categories, annotations):
        detections.add(block)
        check.add(block)
    check.finish()
    found = detections.finish()
    K = len(truth.categories)
    curves = _curves(truth, found, unfinished)
    precision, recall = curves.precision, curves.recall[..., 0]
    numbers: dict[str, Any] = {"kept": found.kept} if fixed else {}
    numbers |= {
        "AP": mean_of(precision[..., 0]), "AP50": mean_of(precision[0, :, :, 0]), "AP75": mean_of(precision[5, :, :, 0]),
        **{f"AP{area}": mean_of(precision[..., i]) for i, area in enumerate("sml", 1)},
        **{f"AP{group}": mean_of(precision[:, :, groups == group, 0]) for group in _GROUPS},
    }  # fmt: skip
    if not fixed:
        numbers |= {f"AR{area}@{top}": mean_of(recall[..., i]) for i, area in enumerate(("", "s", "m", "l"))}
    if per_class:
        numbers["per_class"] = dict(zip(truth.names, (mean_of(precision[:, :, k, 0]) for k in range(K)), strict=True))
    few = int((found.per_category < top).sum()) if fixed else 0
    if few:
        logger.warning(
            f"note: {few} of {K} categories have fewer than {top} detections, so a lower threshold may give more AP"
        )
    numbers["counts"] = {**check.counts, "kept": found.kept, "counted": len(found.scores)}
    if fixed:
        numbers["counts"]["categories_below_top"] = few
    return numbers


class StandardAP:
    """Standard AP (300 detections an image) of the detections from a threshold on, for any number of thresholds.

    The predictions are read once, block by block: the highest 300 of an image from a threshold on are those of its highest 300 that
    reach it.
    """

    def __init__(self, truth: Annotations) -> None:
        """Raises MetricError if the annotations are not those of LVIS."""
        self._truth = truth
        _groups(truth)
        annotated, self._unfinished = _asked(truth)
        self._detections = _Detections(truth, annotated, False, _PER_IMAGE)
        self._found: _Kept | None = None

    def add(self, block: Results) -> None:
        """Adds rows of the predictions."""
        self._detections.add(block)

    def at(self, threshold: float) -> float:
        """AP of the detections with a score of at least `threshold`; -1 without true boxes. No rows can be added afterwards."""
        if self._found is None:
            self._found = self._detections.finish()
        found = self._found
        rows = found.scores >= threshold
        chosen = found._replace(
            image=found.image[rows], category=found.category[rows], boxes=found.boxes[rows], scores=found.scores[rows]
        )
        return mean_of(_curves(self._truth, chosen, self._unfinished).precision[..., 0])


def _curves(truth: Annotations, found: "_Kept", unfinished: Int[np.ndarray, " U"]) -> Curves:
    """Precision and recall of every category."""
    curves = no_curves(len(truth.categories), 1)
    for k, true, each in _by_category(truth, found, unfinished):
        every = max(1, len(each.scores))
        category_curves(true, each, [every], every, curves, k)
    return curves


def _groups(truth: Annotations) -> np.ndarray:
    """The frequency group of each category."""
    groups = [fields.get("frequency") for fields in truth.category_fields]
    wrong = next((i for i, group in enumerate(groups) if group not in _GROUPS), None)
    if wrong is not None:
        raise MetricError(
            f"{truth.path}: category {truth.categories.keys[wrong]} has the frequency {groups[wrong]!r:.40}, expected r, c or f: "
            "LVIS' metrics need LVIS' annotations; score COCO's form with `coco`"
        )
    return np.array(groups)


def _asked(truth: Annotations) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " U"]]:
    """Sorted pairs, image x K + category: those in which detections count, and those that are not exhaustive."""
    K = len(truth.categories)
    lists: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for i, fields in enumerate(truth.image_fields):
        for key, pairs in lists.items():
            ids = fields.get(key)
            if not isinstance(ids, list):
                raise MetricError(
                    f"{truth.path}: image {truth.images.keys[i]} has {key} {ids!r:.40}, expected a list of category ids: LVIS' "
                    "metrics need LVIS' annotations; score COCO's form with `coco`"
                )
            pairs += [i * K + k for k in map(truth.categories.find, ids) if k >= 0]
    # The LVIS API leaves out boxes without area before it looks which categories an image has.
    positive = truth.image.astype(np.int64) * K + truth.category
    pairs = np.r_[np.array(lists["neg_category_ids"], np.int64), positive[truth.areas > 0]]
    return np.unique(pairs), np.unique(np.array(lists["not_exhaustive_category_ids"], np.int64))


class _Kept(NamedTuple):
    """Detections that count, in the order of the files."""

    image: Int32[np.ndarray, " N"]
    category: Int32[np.ndarray, " N"]
    boxes: Float64[np.ndarray, "N 4"]
    scores: Float64[np.ndarray, " N"]
    kept: int
    """Detections within the cut, those that do not count included."""
    per_category: Int[np.ndarray, " K"]
    """The same by category."""


class _Detections:
    """Detections within the cut so far. Of those that do not count (some 99 % of a large vocabulary) only scores are held."""

    def __init__(self, truth: Annotations, asked: Int[np.ndarray, " P"], fixed: bool, top: int) -> None:
        self._asked, self._fixed, self._top, self._categories = asked, fixed, top, len(truth.categories)
        self._group, self._scores = [np.zeros(0, np.int64)], [np.zeros(0)]
        """Per row: what the cut is made within, and the score."""
        self._pair, self._boxes = [np.zeros(0, np.int64)], [np.zeros((0, 4))]
        """Per row: image x K + category, -1 where it does not count; per row that counts: its box."""
        self._held, self._limit = 0, _HELD

    def add(self, block: Results) -> None:
        """Adds rows; makes the cut where many are held."""
        pair = block.images.astype(np.int64) * self._categories + block.categories
        areas = block.boxes[:, 2] * block.boxes[:, 3]
        counts = (block.categories >= 0) & np.isin(pair, self._asked) & (areas > 0)
        # A category that is not listed counts for nothing, but takes its place among the boxes of an image.
        chosen = block.categories >= 0 if self._fixed else np.ones(len(pair), bool)
        self._group.append((block.categories if self._fixed else block.images)[chosen].astype(np.int64))
        self._scores.append(block.scores[chosen])
        self._pair.append(np.where(counts, pair, -1)[chosen])
        self._boxes.append(block.boxes[counts])
        self._held += int(chosen.sum())
        if self._held > self._limit:
            self._cut()
            self._limit = max(_HELD, 2 * self._held)

    def _cut(self) -> None:
        group, scores, pair = (np.concatenate(part) for part in (self._group, self._scores, self._pair))
        keep = _within(group, scores, self._top)
        boxes = np.concatenate(self._boxes)[keep[pair >= 0]]
        self._group, self._scores, self._pair, self._boxes = [group[keep]], [scores[keep]], [pair[keep]], [boxes]
        self._held = int(keep.sum())

    def finish(self) -> _Kept:
        """The detections that count after the last cut."""
        self._cut()
        (group,), (pair,), (scores,) = self._group, self._pair, self._scores
        rows = pair >= 0
        image, category = np.divmod(pair[rows], self._categories)
        per = np.bincount(group, minlength=self._categories) if self._fixed else np.zeros(self._categories, np.int64)
        return _Kept(image.astype(np.int32), category.astype(np.int32), self._boxes[0], scores[rows], len(pair), per)


def _within(group: Int[np.ndarray, " N"], scores: Float64[np.ndarray, " N"], top: int) -> Bool[np.ndarray, " N"]:
    """Whether a row is among the `top` highest scores of its group; of equal scores the first rows are."""
    order = np.lexsort((-scores, group))
    keep = np.zeros(len(group), bool)
    keep[order[ranks(group[order]) < top]] = True
    return keep


def _by_category(
    truth: Annotations, found: _Kept, unfinished: Int[np.ndarray, " U"]
) -> Iterator[tuple[int, Truth, Found]]:
    """Yields (index, true boxes, detections) of each category that has a true box."""
    K = len(truth.categories)
    area, no_crowds = truth.areas > 0, np.zeros(len(truth.image), bool)
    for k, (g, d) in enumerate(zip(by_group(truth.category, K), by_group(found.category, K))):
        if area[g].any():
            g, image = g[area[g]], found.image[d]
            yield (
                k,
                Truth(truth.image[g], truth.boxes[g], truth.areas[g], no_crowds[g], truth.ignored[g]),
                Found(image, found.boxes[d], found.scores[d], np.isin(image.astype(np.int64) * K + k, unfinished)),
            )
