"""Absent names of an evaluated detection set: the measures of `metrics.absence` of its detections."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glip_jax.evaluation.average_precision import GroundTruth, coco_results
from glip_jax.evaluation.metrics.absence import RATES, Found, Pairs, coco_ap, measure, rate_key
from glip_jax.structures.batch import Detections

__all__ = ["absence", "absence_scalars", "found_in", "pairs_of", "scalar_names"]

_THRESHOLDS = ("0.3", "0.5")
"""Thresholds whose measures are metrics of an evaluation."""

_MEASURES = ("false_alarms", "alarmed_pairs", "presence_MCC")


def absence(
    truth: GroundTruth, detections: Mapping[Any, Detections], image_ids: Sequence[Any], rates: Sequence[float] = RATES
) -> dict[str, Any] | None:
    """`metrics.absence.measure` of the detections by image id; None if no image lists names that are known to be absent.

    Names are those of the prompts, boxes have widths as in `coco_results`.
    """
    pairs = pairs_of(truth, image_ids)
    if not len(pairs.absent):
        return None
    found = found_in(truth, detections, image_ids)
    return measure(pairs, found, coco_ap(pairs, found), rates=sorted({*RATES, *rates}))


def absence_scalars(measured: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation by name: those of `scalar_names` that are defined."""
    values: list[float | None] = [
        measured["thresholds"][threshold][name] for threshold in _THRESHOLDS for name in _MEASURES
    ]
    values += [measured["rates"][rate_key(rate)]["AP"] for rate in RATES]
    values.append(measured["absent_pairs"])
    return {
        name: float(v)
        for name, v in zip(scalar_names(), values, strict=True)
        if v is not None and (v >= 0 or "MCC" in name)
    }


def scalar_names(boxes: bool = True) -> list[str]:
    """Names of the metrics; `boxes`: whether the set has true boxes, without which there is no AP."""
    at = [f"{name}@{threshold}" for threshold in _THRESHOLDS for name in _MEASURES]
    return [*at, *(f"AP_at_false_alarms_{rate_key(rate)}" for rate in RATES if boxes), "absent_pairs"]


def pairs_of(truth: GroundTruth, image_ids: Sequence[Any]) -> Pairs:
    """The pairs of the evaluated images and the names of the prompts."""
    count, place = len(truth.prompts), {key: i for i, key in enumerate(image_ids)}
    category = {key: i for i, key in enumerate(truth.category_ids)}
    notes = [note for note in truth.content["annotations"] if note["image_id"] in place]

    def listed(field: str) -> np.ndarray:
        numbers = [
            place[key] * count + name
            for key, own in truth.listed.items()
            if key in place
            for name in getattr(own, field)
        ]
        return np.unique(np.array(numbers, np.int64))

    return Pairs(
        truth.prompts, len(image_ids), listed("known_absent"),
        np.array([note["bbox"] for note in notes], np.float64).reshape(-1, 4),
        np.array([place[note["image_id"]] * count + category[note["category_id"]] for note in notes], np.int64),
        np.array([note["iscrowd"] for note in notes], bool), listed("not_exhaustive"), listed("look_alikes"),
    )  # fmt: skip


def found_in(truth: GroundTruth, detections: Mapping[Any, Detections], image_ids: Sequence[Any]) -> Found:
    """The detections of the evaluated images as numbers of pairs."""
    count, place = len(truth.prompts), {key: i for i, key in enumerate(image_ids)}
    category = {key: i for i, key in enumerate(truth.category_ids)}
    rows = coco_results(truth, detections)
    return Found(
        np.array([place[row["image_id"]] * count + category[row["category_id"]] for row in rows], np.int64),
        np.array([row["score"] for row in rows], np.float64),
        np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
    )
