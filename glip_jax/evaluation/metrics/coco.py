"""COCO's twelve numbers of predictions on any annotations of COCO's form.

Computed by pycocotools. Where images times categories are too many for it (V3Det: 13,204 categories on 29,821 images), by
`per_category`, which gives the same bits.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from glip_jax.evaluation.average_precision import GroundTruth, average_precision, coco_numbers
from glip_jax.evaluation.metrics.annotations import Annotations, ResultCheck, read_annotations
from glip_jax.evaluation.metrics.files import MetricError, Results, result_blocks
from glip_jax.evaluation.metrics.per_category import Found, Truth, by_group, category_curves, mean_of, no_curves, ranks

__all__ = ["Detected", "numbers", "read_detected", "score"]

_PAIRS = 2_000_000
"""Pairs of images and categories up to which pycocotools is used: it holds some kilobytes for each."""


class Detected(NamedTuple):
    """All detections that can count."""

    rows: Results
    """Those of listed categories, at most `top` per image and category; in the order of the files."""
    counts: dict[str, int]
    """`ResultCheck.counts`."""


def score(annotations: str, predictions: str, *, top: int = 100, per_class: bool = False) -> dict[str, Any]:
    """COCO's numbers of predictions in COCO's results form, a file or a folder of files.

    `top`: the most detections per image and category: 100 in COCO's protocol; RF100-VL is reported with 500, V3Det with 300.
    `per_class`: adds AP and AP50 by name of the category.

    Returns the twelve of `average_precision.NUMBERS` (with another `top`, "AR100" is named by it), "counts", and "per_class",
    "per_class_50". A number is -1 where the annotations have no boxes for it.

    Raises:
        MetricError: the files cannot be read, or the predictions are of other images.
    """
    truth = read_annotations(annotations)
    detected = read_detected(predictions, truth, top)
    found, per_class_ap, per_class_ap50 = numbers(truth, detected.rows, top)
    result: dict[str, Any] = dict(found)
    if per_class:
        result |= {"per_class": per_class_ap, "per_class_50": per_class_ap50}
    result["counts"] = detected.counts
    return result


def read_detected(predictions: str, truth: Annotations, top: int) -> Detected:
    """The detections of a file or folder. Those of categories that are not listed are left out, as pycocotools does, and said.

    Raises MetricError as `result_blocks` and `ResultCheck.finish`, and for a `top` below 1.
    """
    if top < 1:
        raise MetricError(f"top={top}: expected at least 1")
    check, blocks, K = ResultCheck(predictions, truth), [], len(truth.categories)
    for block in result_blocks(predictions, truth.images, truth.categories, truth.path):
        check.add(block)
        blocks.append(Results(*(part[block.categories >= 0] for part in block)))
    check.finish()
    nothing = Results(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0))
    rows = Results(*(np.concatenate(parts) for parts in zip(nothing, *blocks)))
    pair = rows.images.astype(np.int64) * K + rows.categories
    order = np.lexsort((-rows.scores, pair))
    keep = np.sort(order[ranks(pair[order]) < max(top, 10)])
    return Detected(Results(*(part[keep] for part in rows)), check.counts)


def numbers(truth: Annotations, rows: Results, top: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """COCO's twelve numbers, and AP and AP50 by name of the category."""
    if len(truth.images) * len(truth.categories) > _PAIRS:
        return _sparse(truth, rows, top)
    keys = range(len(truth.categories))
    content = {
        "images": [{"id": i} for i in range(len(truth.images))],
        "categories": [{"id": k, "name": name} for k, name in zip(keys, truth.names, strict=True)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for i, (image, category, box, area, crowd) in enumerate(zip(
                truth.image.tolist(), truth.category.tolist(), truth.boxes.tolist(), truth.areas.tolist(), truth.crowds.tolist()
            ), 1)
        ],
    }  # fmt: skip
    results = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(*(part.tolist() for part in rows))
    ]
    ground = GroundTruth(truth.path, content, tuple(keys), truth.names)
    return tuple(average_precision(ground, results, top=top))  # pyright: ignore[reportReturnType]


def _sparse(truth: Annotations, rows: Results, top: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The same without pycocotools."""
    caps, K = sorted({1, 10, top}), len(truth.categories)
    curves = no_curves(K, len(caps))
    for k, true, each in _by_category(truth, rows):
        category_curves(true, each, caps, top, curves, k)
    per = [[mean_of(curves.precision[chosen, :, k, 0]) for k in range(K)] for chosen in (slice(None), slice(1))]
    ap, ap50 = (dict(zip(truth.names, values, strict=True)) for values in per)
    return coco_numbers(*curves, caps, top), ap, ap50


def _by_category(truth: Annotations, rows: Results) -> Iterator[tuple[int, Truth, Found]]:
    K = len(truth.categories)
    for k, (g, d) in enumerate(zip(by_group(truth.category, K), by_group(rows.categories, K))):
        if len(g):
            yield (
                k,
                Truth(truth.image[g], truth.boxes[g], truth.areas[g], truth.crowds[g], truth.crowds[g]),
                Found(rows.images[d], rows.boxes[d], rows.scores[d], np.zeros(len(d), bool)),
            )
