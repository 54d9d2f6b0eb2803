"""What a detector gets wrong on a set: threshold of the best F1 by name, kinds of errors, confused names, recall by size, worst images.

A detection is right if it overlaps a true box of its name by one half that no better one has met. Of each name only the detections
from its threshold on count: that of the best F1 on the same set, or on another one (`operating_points`). Kinds of errors as in TIDE (arXiv 2008.08115), with its
overlaps of 0.5 and 0.1.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from glip_jax.evaluation.average_precision import GroundTruth, labels
from glip_jax.evaluation.benchmark.mistakes import Mistake
from glip_jax.evaluation.metrics.per_category import AREAS
from glip_jax.evaluation.recall import MIN_IOU, match, overlaps

__all__ = [
    "KINDS", "SIZES", "DetectionErrors", "OperatingPoint", "detection_errors", "operating_point", "operating_points",
]  # fmt: skip

KINDS = ("other name", "found twice", "badly placed", "background", "missed")
"""Kinds of errors: a true box of another name; a box that a better detection has met; a true box of the name that overlaps by 0.1 to
0.5; none of these; and true boxes that nothing has found."""
SIZES = ("small", "medium", "large")
"""COCO's areas: up to 32², up to 96² and beyond, in pixels of the image."""
_NEAR = 0.1


class OperatingPoint(NamedTuple):
    """A score, and what the detections of a set are worth from there on."""

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class DetectionErrors:
    """The errors of a detector on a set. Names are `average_precision.labels`, in the order of the prompt."""

    points: dict[str, OperatingPoint]
    """By name; without a true box recall and F1 are 0."""
    kinds: dict[str, dict[str, int]]
    """By name: number of right detections ("right") and of each of `KINDS`."""
    confused: tuple[tuple[str, str, int], ...]
    """(true name, found name, detections), most frequent first."""
    sizes: dict[str, tuple[int, int]]
    """By `SIZES`: (true boxes that are found, true boxes)."""
    false_alarms: list[Mistake]
    """Images with the most confident wrong detections, worst first."""
    misses: list[Mistake]
    """Images with the largest true boxes, relative to the image, that nothing has found; largest first."""


class _Image(NamedTuple):
    """Boxes of one image, xyxy; detections best first."""

    file: str
    area: float
    true: Float64[np.ndarray, "N 4"]
    true_numbers: Int[np.ndarray, " N"]
    areas: Float64[np.ndarray, " N"]
    found: Float64[np.ndarray, "D 4"]
    numbers: Int[np.ndarray, " D"]
    scores: Float64[np.ndarray, " D"]
    met: Int[np.ndarray, " D"]
    """The true box of each detection, -1 for none."""

    def kept(self, rows: Bool[np.ndarray, " D"]) -> "_Image":
        """With these detections only. Matches stay true: a name loses its detections of lowest score."""
        return self._replace(
            found=self.found[rows], numbers=self.numbers[rows], scores=self.scores[rows], met=self.met[rows]
        )


def operating_point(scores: Float[np.ndarray, " D"], right: Bool[np.ndarray, " D"], true: int) -> OperatingPoint:
    """The point of the highest F1, the higher threshold of equals; 0.5 where no detection is right.

    `right`: whether each box met a true one, of which there are `true`.
    """
    if not right.any():
        return OperatingPoint(0.5, 0.0, 0.0, 0.0)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + true)
    # Detections of equal score are kept or left together.
    last = np.append(np.diff(scores[order]) != 0, True)
    best = int(np.where(last, f1, -1.0).argmax())
    return OperatingPoint(
        float(scores[order][best]), float(hits[best] / (best + 1)), float(hits[best] / true), float(f1[best])
    )


def operating_points(truth: GroundTruth, results: Sequence[Mapping[str, Any]]) -> dict[str, OperatingPoint]:
    """Of each name the point of the highest F1 of `results` (COCO's results format).

    A name of which nothing is right has the threshold of all names together.
    """
    return _points([*_images(truth, results)], labels(truth), None)


def _points(
    images: Sequence["_Image"], names: Sequence[str], thresholds: Mapping[str, float] | None
) -> dict[str, OperatingPoint]:
    """At the `thresholds`, or those of the highest F1."""
    numbers = np.concatenate([image.numbers for image in images])
    scores = np.concatenate([image.scores for image in images])
    right = np.concatenate([image.met for image in images]) >= 0
    true = np.bincount(np.concatenate([image.true_numbers for image in images]), minlength=len(names))
    every = operating_point(scores, right, int(true.sum())).threshold
    result = {}
    for k, name in enumerate(names):
        own = numbers == k
        point = operating_point(scores[own], right[own], int(true[k]))
        if thresholds is not None or not point.recall:
            least = every if thresholds is None else thresholds.get(name, every)
            kept = own & (scores >= least)
            hits, found = int(right[kept].sum()), int(kept.sum())
            total = found + int(true[k])
            point = OperatingPoint(least, hits / max(found, 1), hits / max(int(true[k]), 1), 2 * hits / max(total, 1))
        result[name] = point
    return result


def detection_errors(
    truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    thresholds: Mapping[str, float] | None = None,
    count: int = 8,
) -> DetectionErrors:
    """The errors of `results` (COCO's results format) on all images of `truth`.

    `thresholds`: by name, from `operating_points` of a validation set; None: those of this set. `count`: the most images of `false_alarms` and of `misses`. Regions with iscrowd are neither found nor missed, and detections of their
    name of which at least half lies in one are left out, as in COCO's protocol.
    """
    names = labels(truth)
    images = list(_images(truth, results))
    points = _points(images, names, thresholds)
    limits = np.array([point.threshold for point in points.values()])
    kinds: list[dict[str, int]] = [dict.fromkeys(("right", *KINDS), 0) for _ in names]
    confused: Counter[tuple[int, int]] = Counter()
    sizes = np.zeros((len(SIZES), 2), int)
    worst: list[tuple[float, int, Mistake]] = []
    missing: list[tuple[float, int, Mistake]] = []
    for place, image in enumerate(images):
        kept = image.kept(image.scores >= limits[image.numbers])
        missed = np.ones(len(kept.true), bool)
        missed[kept.met[kept.met >= 0]] = False
        for row, kind, other in _errors(kept):
            kinds[kept.numbers[row]][kind] += 1
            if kind == KINDS[0]:
                confused[other, int(kept.numbers[row])] += 1
        for number in kept.true_numbers[missed]:
            kinds[number]["missed"] += 1
        size = np.searchsorted([high for _, high in AREAS[1:-1]], kept.areas, side="left")
        for column, each in enumerate((size[~missed], size)):
            sizes[:, column] += np.bincount(each, minlength=len(SIZES))
        wrong = kept.scores[kept.met < 0]
        share = (kept.areas[missed] / kept.area).max(initial=0.0)
        for chosen, badness in ((worst, wrong.max(initial=0.0)), (missing, share)):
            if badness > 0 and len(chosen) < count:
                heapq.heappush(chosen, (float(badness), -place, _mistake(kept, missed, names)))
            elif badness > 0 and count and badness > chosen[0][0]:
                heapq.heapreplace(chosen, (float(badness), -place, _mistake(kept, missed, names)))
    return DetectionErrors(
        points,
        dict(zip(names, kinds, strict=True)),
        tuple((names[true], names[found], n) for (true, found), n in confused.most_common()),
        {name: (int(found), int(every)) for name, (found, every) in zip(SIZES, sizes.tolist(), strict=True)},
        [mistake for *_, mistake in sorted(worst, key=lambda each: each[:2], reverse=True)],
        [mistake for *_, mistake in sorted(missing, key=lambda each: each[:2], reverse=True)],
    )


def _images(truth: GroundTruth, results: Sequence[Mapping[str, Any]]) -> Iterator[_Image]:
    number = {key: i for i, key in enumerate(truth.category_ids)}
    noted, found = defaultdict[Any, list[Any]](list), defaultdict[Any, list[Any]](list)
    for entry in truth.content["annotations"]:
        noted[entry["image_id"]].append(entry)
    for row in results:
        found[row["image_id"]].append(row)
    for entry in truth.content["images"]:
        own, rows = noted[entry["id"]], found[entry["id"]]
        boxes, numbers = _corners(own), np.array([number[each["category_id"]] for each in own], np.int64)
        crowd = np.array([bool(each["iscrowd"]) for each in own], bool)
        areas = np.array([each["area"] for each in own], np.float64)
        scores = np.array([row["score"] for row in rows], np.float64)
        order = np.argsort(-scores, kind="stable")
        each = _corners(rows)[order]
        classes = np.array([number[row["category_id"]] for row in rows], np.int64)[order]
        met = match(each, classes, boxes[~crowd], numbers[~crowd])
        image = _Image(
            entry["file_name"], _area(entry, boxes), boxes[~crowd], numbers[~crowd], areas[~crowd], each, classes, scores[order], met
        )  # fmt: skip
        inside = _inside(each, boxes[crowd]) & (classes[:, None] == numbers[crowd])
        yield image.kept((met >= 0) | ~inside.any(1))


def _area(entry: Mapping[str, Any], boxes: Float64[np.ndarray, "N 4"]) -> float:
    """Pixels of the image; without a listed size those up to the last box."""
    if entry.get("height") and entry.get("width"):
        return float(entry["height"] * entry["width"])
    return float(max(boxes[:, 2].max(initial=1.0) * boxes[:, 3].max(initial=1.0), 1.0))


def _corners(rows: Sequence[Mapping[str, Any]]) -> Float64[np.ndarray, "n 4"]:
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _inside(boxes: Float64[np.ndarray, "D 4"], regions: Float64[np.ndarray, "R 4"]) -> Bool[np.ndarray, "D R"]:
    """Whether at least half of each box lies in each region."""
    sides = np.minimum(boxes[:, None, 2:], regions[None, :, 2:]) - np.maximum(boxes[:, None, :2], regions[None, :, :2])
    return np.maximum(sides, 0).prod(-1) >= MIN_IOU * (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]


def _errors(image: _Image) -> Iterator[tuple[int, str, int]]:
    """Per detection (row, "right" or one of `KINDS`, number of the true box of another name or -1)."""
    shared = overlaps(image.found.astype(np.float32), image.true.astype(np.float32))
    for row, met in enumerate(image.met):
        if met >= 0:
            yield row, "right", -1
            continue
        best = int(shared[row].argmax()) if len(image.true) else -1
        same = shared[row][image.true_numbers == image.numbers[row]].max(initial=0.0)
        if best >= 0 and shared[row, best] >= MIN_IOU and image.true_numbers[best] != image.numbers[row]:
            yield row, "other name", int(image.true_numbers[best])
        else:
            kind = "found twice" if same >= MIN_IOU else "badly placed" if same >= _NEAR else "background"
            yield row, kind, -1


def _mistake(image: _Image, missed: Bool[np.ndarray, " N"], names: Sequence[str]) -> Mistake:
    return Mistake(
        image.file, "", image.true, tuple(names[int(i)] for i in image.true_numbers), image.found,
        tuple(names[int(i)] for i in image.numbers), tuple(image.scores.tolist()), tuple((image.met >= 0).tolist()), tuple(missed.tolist()),
    )  # fmt: skip
