"""Detections of names that are not in the image: false alarms, thresholds at a rate of false alarms, presence.

A pair is an image and a name. It is *present* if the image has a box of the name, *absent* if the name is known not to be in
the image; of other pairs nothing is known, and their detections are not judged. Sources of absent pairs:

- `known_absent` of an image of a COCO JSON: names of categories; `look_alikes`: those of them that resemble what the image shows;
- `neg_category_ids` of LVIS;
- expressions without a target of gRefCOCO, for `{"<image id>": {"boxes", "scores"}}` (each expression is an image there);
- with `exhaustive=True` every category without a box: COCO val2017, or D3 where every description is asked (inter-scenario).

Measures at a threshold t; a box counts if its score is at least t:

- `false_alarms`: boxes of absent pairs per absent pair (FPR-bg; a pair with two boxes counts two);
- `alarmed_pairs`: share of absent pairs with a box;
- `found_pairs`: share of present pairs with a box, wherever it lies;
- `presence_MCC`: Matthews correlation of "has a box" with "is present", over present and absent pairs; 0 where one side is empty;
- `positive_micro_F1`: F1 of boxes over all present pairs, mean over IoU .50:.05:.95; boxes are assigned to true boxes so that the
  sum of IoU is largest; null without true boxes;
- `cgF1`: the product of the last two, as SAM 3 defines it (arXiv 2511.16719; `sam3/eval/cgf1_eval.py`, without its 1e-4 in the
  denominators; its threshold is 0.5).

`rates` are bounds on `false_alarms`: each has the lowest threshold that keeps it, and the AP of the boxes from there on.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pycocotools import mask

from glip_jax.evaluation.metrics import d3, lvis, per_category
from glip_jax.evaluation.metrics.annotations import Annotations, ResultCheck, read_annotations
from glip_jax.evaluation.metrics.expressions import read_expressions
from glip_jax.evaluation.metrics.files import MetricError, objects, result_blocks
from glip_jax.evaluation.metrics.per_category import by_group, category_curves, mean_of, no_curves

__all__ = [
    "RATES",
    "THRESHOLDS",
    "Found",
    "Pairs",
    "coco_ap",
    "measure",
    "rate_key",
    "score",
    "threshold_at",
    "thresholds_of",
]

logger = logging.getLogger(__name__)

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds at which everything is reported."""

RATES = (0.01, 0.05, 0.25)
"""False alarms per absent pair for which a threshold is chosen."""

_OVERLAPS = np.linspace(0.5, 0.95, 10)
"""IoU from which a box is right, as COCO."""


@dataclass(frozen=True)
class Pairs:
    """What is known of a set of annotations. The pair of image i and name n has the number i * len(names) + n."""

    names: tuple[str, ...]
    images: int
    absent: Int64[np.ndarray, " A"]
    """Pairs whose name is known not to be in the image; ascending, each once."""
    boxes: Float64[np.ndarray, "N 4"]
    """True boxes: x, y, width, height in pixels."""
    of_boxes: Int64[np.ndarray, " N"]
    """The pair of each true box."""
    crowd: Bool[np.ndarray, " N"]
    """Regions in which nothing counts (COCO's iscrowd). A pair with crowds alone is neither present nor absent."""
    incomplete: Int64[np.ndarray, " I"]
    """Pairs not all of whose objects have a box. They and pairs with crowds are left out of F1."""
    look_alikes: Int64[np.ndarray, " L"]
    """Absent pairs whose name resembles what the image shows; ascending."""

    @property
    def present(self) -> Int64[np.ndarray, " P"]:
        """Pairs with a true box that is no crowd; ascending."""
        return np.unique(self.of_boxes[~self.crowd])


class Found(NamedTuple):
    """Detections of a set, in any order."""

    pairs: Int64[np.ndarray, " D"]
    scores: Float64[np.ndarray, " D"]
    boxes: Float64[np.ndarray, "D 4"]
    """x, y, width, height in pixels."""


def threshold_at(rate: float, scores: Float64[np.ndarray, " F"], pairs: int) -> float:
    """The lowest threshold that at most `rate` x `pairs` of the scores reach, in steps of float32.

    `scores`: of all boxes of the absent pairs. If all may pass, 0 (or the lowest score, if that is negative).
    """
    allowed = math.floor(rate * pairs + 1e-9)
    if len(scores) <= allowed:
        return float(min(0.0, scores.min(initial=0.0)))
    highest_refused = np.partition(scores, len(scores) - allowed - 1)[len(scores) - allowed - 1]
    # A step of float32, so that scores refused in float64 are refused in the detector's float32 too.
    return float(np.nextafter(np.float32(highest_refused), np.float32(np.inf)))


def rate_key(rate: float) -> str:
    """The key of a rate or threshold in results: 0.05 -> "0.05"."""
    return f"{rate:g}" if float(f"{rate:g}") == rate else repr(float(rate))


def measure(
    pairs: Pairs,
    found: Found,
    average_precision: Callable[[float], float | None] | None,
    thresholds: Sequence[float] = THRESHOLDS,
    rates: Sequence[float] = RATES,
) -> dict[str, Any]:
    """All measures of the module, as a dict that JSON can hold.

    `average_precision(t)`: AP of the detections with a score of at least t, -1 where not defined: `coco_ap`, or another evaluator's;
    None: the results have no AP.

    Returns `images`, `names`, `absent_pairs`, `present_pairs`, `boxes_not_judged` (detections of other pairs), `AP` (of all
    detections), `thresholds` (by threshold), `rates` (by rate, each with `threshold` and `AP`), `per_name` (names with absent pairs:
    their number, boxes at absent pairs from 0.3 and 0.5, and a threshold for each rate that at least one box may reach), and `look_alikes`
    (the first two measures, if there are such pairs). Raises ValueError without an absent pair.
    """
    if not len(pairs.absent):
        raise ValueError("there are no absent pairs: expected at least one")
    judged = _Judged(pairs, found)
    result: dict[str, Any] = {
        "images": pairs.images, "names": len(pairs.names), "absent_pairs": len(pairs.absent),
        "present_pairs": len(judged.present), "boxes_not_judged": int((~(judged.false | judged.claims)).sum()),
    }  # fmt: skip
    if average_precision is not None:
        result["AP"] = average_precision(-math.inf)
    result["thresholds"] = {rate_key(t): judged.at(t) for t in thresholds}
    result["rates"] = {}
    for rate in rates:
        threshold = threshold_at(rate, judged.false_scores, len(pairs.absent))
        own = {"threshold": threshold} | ({"AP": average_precision(threshold)} if average_precision else {})
        result["rates"][rate_key(rate)] = own | judged.at(threshold)
    result["per_name"] = _per_name(pairs, judged, rates)
    if len(pairs.look_alikes):
        alike = np.isin(judged.false_pairs, pairs.look_alikes)
        chosen = _FalseAlarms(judged.false_pairs[alike], judged.false_scores[alike], len(pairs.look_alikes))
        result["look_alikes"] = {
            "absent_pairs": len(pairs.look_alikes), "thresholds": {rate_key(t): chosen.at(t) for t in thresholds},
        }  # fmt: skip
    return result


def coco_ap(pairs: Pairs, found: Found) -> Callable[[float], float]:
    """COCO's AP of the detections with a score of at least t, as a function of t; at most 100 a pair, -1 without true boxes."""
    count = len(pairs.names)
    (true_images, true_names), (images, names) = (np.divmod(of, count) for of in (pairs.of_boxes, found.pairs))
    rows = list(zip(by_group(true_names, count), by_group(names, count)))
    areas = pairs.boxes[:, 2] * pairs.boxes[:, 3]

    def ap(threshold: float) -> float:
        curves = no_curves(count, 1)
        for name, (true, detected) in enumerate(rows):
            if len(true):
                kept = detected[found.scores[detected] >= threshold]
                crowd = pairs.crowd[true]
                category_curves(
                    per_category.Truth(true_images[true].astype(np.int32), pairs.boxes[true], areas[true], crowd, crowd),
                    per_category.Found(
                        images[kept].astype(np.int32), found.boxes[kept], found.scores[kept], np.zeros(len(kept), bool)
                    ),
                    (100,), 100, curves, name,
                )  # fmt: skip
        return mean_of(curves.precision[..., 0])

    return ap


@dataclass(frozen=True)
class _FalseAlarms:
    """Boxes at absent pairs."""

    pairs: Int64[np.ndarray, " F"]
    scores: Float64[np.ndarray, " F"]
    count: int
    """Number of absent pairs."""

    def at(self, threshold: float) -> dict[str, float]:
        kept = self.scores >= threshold
        alarmed = len(np.unique(self.pairs[kept]))
        return {"false_alarms": int(kept.sum()) / self.count, "alarmed_pairs": alarmed / self.count}


class _Judged:
    """Detections sorted into those of absent pairs and those of present pairs."""

    def __init__(self, pairs: Pairs, found: Found) -> None:
        self.present, self.absent = pairs.present, pairs.absent
        self.false: Bool[np.ndarray, " D"] = np.isin(found.pairs, pairs.absent)
        self.claims: Bool[np.ndarray, " D"] = np.isin(found.pairs, self.present)
        self.false_pairs, self.false_scores = found.pairs[self.false], found.scores[self.false]
        self._alarms = _FalseAlarms(self.false_pairs, self.false_scores, len(pairs.absent))
        best = np.full(len(self.present), -np.inf)
        np.maximum.at(best, np.searchsorted(self.present, found.pairs[self.claims]), found.scores[self.claims])
        self._best_of_present = best
        self._complete = _matchings(pairs, Found(*(field[self.claims] for field in found)))
        self._true_boxes = sum(each.true for each in self._complete)

    def at(self, threshold: float) -> dict[str, float | None]:
        """All measures at a threshold."""
        alarms = self._alarms.at(threshold)
        true_positives = int((self._best_of_present >= threshold).sum())
        false_positives = round(alarms["alarmed_pairs"] * len(self.absent))
        correlation = _correlation(
            true_positives, false_positives, len(self.absent) - false_positives, len(self.present) - true_positives
        )
        f1 = self._f1(threshold)
        return {
            **alarms,
            "found_pairs": true_positives / len(self.present) if len(self.present) else None,
            "presence_MCC": correlation,
            "positive_micro_F1": f1,
            "cgF1": None if f1 is None else f1 * correlation,
        }

    def _f1(self, threshold: float) -> float | None:
        if not self._true_boxes:
            return None
        right, kept = np.zeros(len(_OVERLAPS), np.int64), 0
        for each in self._complete:
            count = int(np.searchsorted(-each.scores, -threshold, side="right"))
            right += each.right(count)
            kept += count
        return float((2 * right / (kept + self._true_boxes)).mean())


class _Matching:
    """The detections of one present pair, best first, and its true boxes."""

    def __init__(self, scores: Float64[np.ndarray, " d"], overlaps: Float64[np.ndarray, "d t"]) -> None:
        self.scores, self.true = scores, overlaps.shape[1]
        self._overlaps, self._right = overlaps, {0: np.zeros(len(_OVERLAPS), np.int64)}

    def right(self, count: int) -> Int64[np.ndarray, " ious"]:
        """How many of the `count` best detections are right, at each IoU."""
        if count not in self._right:
            overlaps = self._overlaps[:count]
            if min(overlaps.shape) == 1:
                met = overlaps.max(keepdims=True).reshape(1)
            else:
                # Of JAX's requirements; imported where it is needed, because it is slow to load.
                from scipy.optimize import linear_sum_assignment

                met = overlaps[linear_sum_assignment(overlaps, maximize=True)]
            self._right[count] = (met[:, None] >= _OVERLAPS).sum(0)
        return self._right[count]


def _matchings(pairs: Pairs, claims: Found) -> list[_Matching]:
    """The present pairs that are annotated completely; `claims`: detections of present pairs."""
    by_score = np.argsort(-claims.scores, kind="stable")
    order = by_score[np.argsort(claims.pairs[by_score], kind="stable")]
    of_true = np.argsort(pairs.of_boxes, kind="stable")
    keys = np.setdiff1d(pairs.present, np.concatenate([pairs.incomplete, pairs.of_boxes[pairs.crowd]]))
    ends = [np.searchsorted(claims.pairs[order], keys, side) for side in ("left", "right")]
    true_ends = [np.searchsorted(pairs.of_boxes[of_true], keys, side) for side in ("left", "right")]
    matchings = []
    for begin, end, true_begin, true_end in zip(*ends, *true_ends, strict=True):
        rows, true = order[begin:end], pairs.boxes[of_true[true_begin:true_end]]
        if not len(rows):
            overlaps = np.zeros((0, len(true)))
        else:
            overlaps = np.asarray(mask.iou(claims.boxes[rows], true, [0] * len(true)), np.float64)
        matchings.append(_Matching(claims.scores[rows], overlaps))
    return matchings


def _correlation(tp: int, fp: int, tn: int, fn: int) -> float:
    """Matthews correlation coefficient; 0 where a row or a column is empty."""
    denominator = math.sqrt(float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn))
    return (tp * tn - fp * fn) / denominator if denominator else 0.0


def _per_name(pairs: Pairs, judged: _Judged, rates: Sequence[float]) -> dict[str, dict[str, Any]]:
    """By name, for names with absent pairs."""
    count = np.bincount(pairs.absent % len(pairs.names), minlength=len(pairs.names))
    rows = by_group(judged.false_pairs % len(pairs.names), len(pairs.names))
    result = {}
    for number in np.flatnonzero(count).tolist():
        scores, own = judged.false_scores[rows[number]], int(count[number])
        enough = [rate for rate in rates if rate * own >= 1 - 1e-9]
        result[pairs.names[number]] = {
            "absent_pairs": own,
            "false_alarms": {rate_key(t): int((scores >= t).sum()) / own for t in (0.3, 0.5)},
            "thresholds": {rate_key(rate): threshold_at(rate, scores, own) for rate in enough},
        }
    return result


def thresholds_of(result: Mapping[str, Any], rate: float) -> tuple[float, dict[str, float]]:
    """The threshold of a result of `measure` for a rate, and the thresholds of the names that have their own.

    Raises KeyError if the result has no such rate.
    """
    key = rate_key(rate)
    own = {name: entry["thresholds"][key] for name, entry in result["per_name"].items() if key in entry["thresholds"]}
    return float(result["rates"][key]["threshold"]), own


def score(
    annotations: str, predictions: str, threshold: float | None = None, exhaustive: bool = False
) -> dict[str, Any]:
    """Measures of a file of predictions: see the module for the sources of absent pairs, and `measure` for the results.

    Args:
        annotations: COCO JSON with `known_absent`, LVIS JSON, or gRefCOCO's JSON.
        predictions: COCO results, in one file or in a folder of files; for gRefCOCO boxes by image.
        threshold: reported beside `THRESHOLDS`.
        exhaustive: every category without a box is absent from its image (COCO val2017; D3 inter-scenario, with the boxes of all
            groups where d3_pkl lies beside the file).

    AP is COCO's, of LVIS files LVIS's with 300 boxes an image; gRefCOCO has none. Raises MetricError for files that cannot be
    read, annotations without an absent pair, names of no category, names that are both boxed and known to be absent, and a threshold
    that is not finite.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise MetricError(f"threshold is {threshold}: expected a finite score")
    thresholds: list[float] = sorted({*THRESHOLDS} | ({threshold} if threshold is not None else set()))
    if "caption" in next(objects(annotations, "images", "annotations"), {}):
        return measure(*_expressions(annotations, predictions), None, thresholds)
    truth = read_annotations(annotations)
    if exhaustive and (pickles := d3.pickles_beside(annotations)) is not None:
        # The released file has of each box the descriptions of its own group only.
        truth = d3.of_all_groups(truth, pickles)
    pairs = _pairs(truth, exhaustive)
    federated = any("neg_category_ids" in fields for fields in truth.image_fields)
    federated &= all("frequency" in fields for fields in truth.category_fields)
    check = ResultCheck(predictions, truth)
    judged, parts = np.union1d(pairs.absent, pairs.present), [_NONE]
    lvis_ap = lvis.StandardAP(truth) if federated else None
    not_judged = 0
    for block in result_blocks(predictions, truth.images, truth.categories, annotations):
        check.add(block)
        numbers, listed = block.images.astype(np.int64) * len(pairs.names) + block.categories, block.categories >= 0
        known = listed & np.isin(numbers, judged)
        not_judged += int((listed & ~known).sum())
        # LVIS's AP takes all rows, within its own bound of memory; for the rest the few rows that are judged are enough.
        if lvis_ap is not None:
            lvis_ap.add(block)
        kept = listed if lvis_ap is None else known
        parts.append(Found(numbers[kept], block.scores[kept], block.boxes[kept]))
    check.finish()
    found = Found(*(np.concatenate(columns) for columns in zip(*parts)))
    result = measure(pairs, found, coco_ap(pairs, found) if lvis_ap is None else lvis_ap.at, thresholds)
    return result | {"boxes_not_judged": not_judged, "counts": check.counts}


_NONE = Found(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4)))


def _pairs(truth: Annotations, exhaustive: bool) -> Pairs:
    """The pairs of annotations in COCO's form."""
    count = len(truth.categories)
    by_name: dict[Any, list[int]] = {}
    for number, fields in enumerate(truth.category_fields):
        by_name.setdefault(fields.get("name"), []).append(number)

    def of_name(name: Any) -> list[int]:
        return by_name.get(name, []) if isinstance(name, str) else []

    def of_id(key: Any) -> list[int]:
        return [number] if (number := truth.categories.find(key)) >= 0 else []

    finders: dict[str, Callable[[Any], list[int]]] = {
        "known_absent": of_name, "look_alikes": of_name, "neg_category_ids": of_id, "not_exhaustive_category_ids": of_id,
    }  # fmt: skip
    listed: dict[str, list[int]] = {key: [] for key in finders}
    for image, fields in enumerate(truth.image_fields):
        for key, find in finders.items():
            for item in _list(fields.get(key), f"{truth.path}: image {truth.images.keys[image]!r:.40}, {key}"):
                if not (found := find(item)):
                    raise MetricError(
                        f"{truth.path}: image {truth.images.keys[image]!r:.40} lists {item!r:.60} in {key}, which is "
                        f"{'the name' if find is of_name else 'the id'} of no category of the file"
                    )
                listed[key] += [image * count + category for category in found]
    of_boxes = truth.image.astype(np.int64) * count + truth.category
    everything = np.arange(len(truth.images) * count) if exhaustive else np.zeros(0, np.int64)
    negative = np.array(listed["neg_category_ids"], np.int64)
    if count_of_both := int(np.isin(negative, of_boxes).sum()):
        logger.warning(
            f"note: {truth.path}: {count_of_both} of {len(negative)} neg_category_ids have a box in their image: taken as present"
        )
    absent = np.array(listed["known_absent"], np.int64)
    if len(both := np.intersect1d(absent, of_boxes)):
        image, category = divmod(int(both[0]), count)
        raise MetricError(
            f"{truth.path}: image {truth.images.keys[image]!r:.40} has a box of {truth.names[category]!r:.60}, which it lists as "
            f"known to be absent ({len(both)} such cases): correct one of the two"
        )
    absent = np.union1d(absent, np.setdiff1d(np.concatenate([negative, everything]), of_boxes))
    if not len(absent):
        raise MetricError(
            f"the annotations {truth.path} list no absent name: expected `known_absent`, a list of names of categories, or LVIS's "
            "`neg_category_ids`, on at least one image"
        )
    return Pairs(
        truth.names, len(truth.images), absent, truth.boxes, of_boxes, truth.crowds,
        np.array(listed["not_exhaustive_category_ids"], np.int64),
        np.intersect1d(np.array(listed["look_alikes"], np.int64), absent),
    )  # fmt: skip


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise MetricError(f"{where} is {value!r:.60}: expected a list")
    return value


def _expressions(annotations: str, predictions: str) -> tuple[Pairs, Found]:
    """gRefCOCO: each expression is an image with one name, absent where it has no target."""
    read = read_expressions(annotations, predictions)
    targets, found = ([getattr(each, name) for each in read] for name in ("targets", "boxes"))
    absent = np.array([i for i, own in enumerate(targets) if not len(own)], np.int64)
    if not len(absent):
        raise MetricError(
            f"the annotations {annotations} have no expression without a target: nothing is known to be absent"
        )

    def rows(boxes: list[Any]) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "n 4"]]:
        corners = np.concatenate([np.zeros((0, 4)), *boxes])
        return np.repeat(np.arange(len(boxes)), [len(own) for own in boxes]), corners - corners[:, [0, 1, 0, 1]] * [
            0,
            0,
            1,
            1,
        ]

    of_boxes, true = rows(targets)
    of_found, boxes = rows(found)
    none, scores = np.zeros(0, np.int64), np.concatenate([each.scores for each in read]).astype(np.float64)
    pairs = Pairs(("expression",), len(targets), absent, true, of_boxes, np.zeros(len(true), bool), none, none)
    return pairs, Found(of_found, scores, boxes)
