"""Precision at 1, 5 and 10 of referring expressions: RefCOCO, RefCOCO+ and RefCOCOg.

An expression is found at k if one of its k best boxes overlaps its one true box by at least 0.5. The official evaluator measures
the overlap by GIoU (MDETR, arXiv 2104.12763; `datasets/refexp.py` of its repository), others by IoU, which gives higher numbers.
"""

from collections import defaultdict
from typing import Any

from glip_jax.evaluation.metrics.expressions import read_expressions
from glip_jax.evaluation.metrics.files import MetricError
from glip_jax.evaluation.metrics.matching import Overlap, overlaps

__all__ = ["RANKS", "score"]

RANKS = (1, 5, 10)
_MIN_OVERLAP = 0.5


def score(annotations: str, predictions: str, overlap: Overlap = "giou") -> dict[str, Any]:
    """Precision of the `RANKS` for each data set (`dataset_name`) of the annotations, and `counts`, their numbers.

    `annotations`, `predictions`: paths of files as `expressions` reads them. An expression with no predicted box is missed.
    Only data sets that have expressions are in the result.

    Raises:
        MetricError: what `read_expressions` refuses, or an expression that has not one true box or no `dataset_name`.
    """
    hits = defaultdict[str, list[list[bool]]](list)
    for each in read_expressions(annotations, predictions):
        check_expression(annotations, each.id, each.dataset, len(each.targets))
        # An overlap of two boxes without an area is nan, which is no hit.
        hit = overlaps(each.boxes, each.targets, overlap)[:, 0] >= _MIN_OVERLAP
        hits[each.dataset].append([bool(hit[:rank].any()) for rank in RANKS])
    precision = {name: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for name, rows in hits.items()}
    counts = {name: len(rows) for name, rows in hits.items()}
    return {**precision, "counts": counts}


def check_expression(annotations: str, key: Any, dataset: str, targets: int) -> None:
    """Raises MetricError for an expression that has no data set, or not one true box."""
    if not dataset:
        raise MetricError(
            f"{annotations}, image {key!r:.40} has no dataset_name: expected refcoco, refcoco+ or refcocog"
        )
    if targets != 1:
        raise MetricError(
            f"{annotations}, image {key!r:.40} has {targets} true boxes: expected one for each expression; the metric grefcoco takes "
            "several and none"
        )
