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
    right, silent, answered = [], [], []
    for each in read_expressions(annotations, predictions):
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
        "counts": {"expressions": len(right), "without_target": len(silent)},
    }  # fmt: skip


def _pairs(overlap: Float[np.ndarray, "P T"]) -> int:
    """Number of pairs of kept and true boxes."""
    overlap = np.nan_to_num(overlap, nan=0.0)
    for count in range(min(overlap.shape)):
        row, column = divmod(_largest(overlap.ravel().tolist()), overlap.shape[1])
        if overlap[row, column] < _MIN_OVERLAP:
            return count
        overlap[row], overlap[:, column] = 0.0, 0.0
    return min(overlap.shape)


def _largest(values: list[float]) -> int:
    """Index of the largest value; of several, the one that `torch.topk(values, 1)` of the official evaluator returns on a CPU.

    Which of them it is can decide whether another box finds a partner. From 64 values on it is the first. For fewer, PyTorch
    calls `std::nth_element`, of libstdc++ on Linux: a quickselect that moves the median of three to the front, partitions the
    rest by it, and continues with the greater part.
    """
    best = max(values)
    if values.count(best) == 1 or len(values) >= 64:
        return values.index(best)
    queue = [(value, -index) for index, value in enumerate(values)]
    last, depth = len(queue), 2 * (len(queue).bit_length() - 1)
    while last > 3 and depth:
        depth -= 1
        first, middle, final = (queue[at][0] for at in (1, last // 2, last - 1))
        if first > middle:
            median = last // 2 if middle > final else last - 1 if first > final else 1
        else:
            median = 1 if first > final else last - 1 if middle > final else last // 2
        queue[0], queue[median] = queue[median], queue[0]
        pivot, left, right = queue[0][0], 1, last - 1
        while True:
            while queue[left][0] > pivot:
                left += 1
            while pivot > queue[right][0]:
                right -= 1
            if left >= right:
                break
            queue[left], queue[right] = queue[right], queue[left]
            left, right = left + 1, right - 1
        last = left
    return -max(queue[:last], key=lambda entry: entry[0])[1]
