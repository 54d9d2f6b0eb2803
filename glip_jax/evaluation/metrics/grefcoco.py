"""Generalized referring expressions with no, one or several targets: Pr@(F1=1), N-acc and T-acc of gRefCOCO.

Of the predicted boxes those are kept whose score reaches the threshold. Kept and true boxes are matched one to one, the pair of
highest overlap first, while that is at least 0.5. An expression is right if every kept box and every true box has a partner; one
without a target, if nothing is kept. As in the official evaluator (`mdetr/datasets/refexp.py` of gRefCOCO's repository; GREC,
arXiv 2308.16182), which measures the overlap by GIoU. A duplicate of a right box is a false one.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from glip_jax.evaluation.metrics.expressions import read_expressions
from glip_jax.evaluation.metrics.files import MetricError
from glip_jax.evaluation.metrics.matching import Overlap, overlaps

__all__ = ["score"]

_MIN_OVERLAP = 0.5


def score(annotations: str, predictions: str, overlap: Overlap = "giou", threshold: float = 0.7) -> dict[str, Any]:
    """`F1_score`: share of the expressions that are right, Pr@(F1=1, overlap >= 0.5). `N_acc`: share of those without a target
    for which nothing is kept. `T_acc`: share of the others for which something is kept. And `counts`.

    `annotations`, `predictions`: paths of files as `expressions` reads them. `threshold`: least score of a box that is kept,
    compared with float32 scores. A share of no expressions is None.

    Raises:
        MetricError: what `read_expressions` refuses, or a threshold that is not finite.
    """
    if not math.isfinite(threshold):
        raise MetricError(f"threshold is {threshold}: expected a finite score")
    read = read_expressions(annotations, predictions)
    right, silent, answered = [], [], []
    for each in read.expressions:
        kept = each.boxes[each.scores.astype(np.float64) >= threshold]
        if len(each.targets):
            pairs = _pairs(overlaps(kept, each.targets, overlap))
            right.append(pairs == len(kept) == len(each.targets))
            answered.append(len(kept) > 0)
        else:
            right.append(not len(kept))
            silent.append(not len(kept))
    return {
        "F1_score": sum(right) / len(right),
        "T_acc": sum(answered) / len(answered) if answered else None,
        "N_acc": sum(silent) / len(silent) if silent else None,
        "counts": {
            "expressions": len(right), "without_target": len(silent), "unlisted_predictions": read.unlisted,
        },
    }  # fmt: skip


def _pairs(overlap: Float[np.ndarray, "P T"]) -> int:
    """Number of pairs: greedy, highest overlap first; of equals the box of higher score, then the earlier true box."""
    overlap = np.nan_to_num(overlap, nan=0.0)
    for count in range(min(overlap.shape)):
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        if overlap[row, column] < _MIN_OVERLAP:
            return count
        overlap[row], overlap[:, column] = 0.0, 0.0
    return min(overlap.shape)
