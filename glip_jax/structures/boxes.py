"""Box geometry: xyxy, float32, pixels. Functions take numpy and jax arrays.

The original code uses inclusive corners: a box from x1 to x2 is x2 - x1 + 1 wide (glip-reference, fact 5). So do the functions
here, except `giou`, where the original uses exclusive corners.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

__all__ = [
    "area", "anchors", "centers", "clip", "decode", "encode", "from_coco_xywh", "giou", "iou", "level_shape",
    "pairwise_iou", "to_coco_xywh",
]  # fmt: skip

_CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_LARGEST_LOG_SIDE = 4.135166556742356
"""ln(1000 / 16): a decoded side is at most 62.5 times the side of its anchor."""


def area(boxes: Float[Any, "*#n 4"], plus_one: bool = True) -> Float[Any, "*_"]:
    """Width times height, inclusive corners if `plus_one`. Negative sides are not clamped."""
    extra = 1 if plus_one else 0
    return (boxes[..., 2] - boxes[..., 0] + extra) * (boxes[..., 3] - boxes[..., 1] + extra)


def iou(a: Float[Any, "*#n 4"], b: Float[Any, "*#n 4"], plus_one: bool = True) -> Float[Any, "*_"]:
    """Intersection over union of boxes with broadcastable shapes, inclusive corners; exclusive ones without `plus_one`."""
    xp = a.__array_namespace__()
    sides = xp.minimum(a[..., 2:], b[..., 2:]) - xp.maximum(a[..., :2], b[..., :2]) + (1 if plus_one else 0)
    sides = xp.maximum(sides, xp.zeros_like(sides))
    overlap = sides[..., 0] * sides[..., 1]
    return overlap / (area(a, plus_one) + area(b, plus_one) - overlap)


def pairwise_iou(a: Float[Any, "n 4"], b: Float[Any, "m 4"]) -> Float[Any, "n m"]:
    """`iou` of all pairs."""
    return iou(a[:, None], b[None])


def giou(a: Float[Any, "*#n 4"], b: Float[Any, "*#n 4"]) -> Float[Any, "*_"]:
    """Generalized IoU (arXiv 1902.09630), exclusive corners. The sides of `a` are clamped at 0.

    1e-7 is added to both denominators, as in the original (glip-reference 3.5).
    """
    xp = a.__array_namespace__()
    a = xp.concatenate([a[..., :2], xp.maximum(a[..., :2], a[..., 2:])], axis=-1)
    sides = xp.minimum(a[..., 2:], b[..., 2:]) - xp.maximum(a[..., :2], b[..., :2])
    sides = xp.maximum(sides, xp.zeros_like(sides))
    overlap = sides[..., 0] * sides[..., 1]
    union = area(a, plus_one=False) + area(b, plus_one=False) - overlap + 1e-7
    hull = xp.maximum(a[..., 2:], b[..., 2:]) - xp.minimum(a[..., :2], b[..., :2])
    enclosing = hull[..., 0] * hull[..., 1] + 1e-7
    return overlap / union - (enclosing - union) / enclosing


def centers(boxes: Float[Any, "*#n 4"]) -> Float[Any, "*_ 2"]:
    """Centers (x, y) of boxes."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def clip(boxes: Float[Any, "*#n 4"], size: Float[Any, "*#n 2"]) -> Float[Any, "*_ 4"]:
    """Boxes clipped to [0, width - 1] x [0, height - 1]; `size` is (height, width)."""
    xp = boxes.__array_namespace__()
    limit = xp.stack([size[..., 1], size[..., 0], size[..., 1], size[..., 0]], axis=-1) - 1
    return xp.minimum(xp.maximum(boxes, xp.zeros_like(boxes)), limit)


def encode(boxes: Float[Any, "*#n 4"], anchor: Float[Any, "*#n 4"]) -> Float[Any, "*_ 4"]:
    """Deltas (dx, dy, dw, dh) from anchors to boxes, inclusive corners (glip-reference 3.2)."""
    xp = boxes.__array_namespace__()
    sides, anchor_sides = boxes[..., 2:] - boxes[..., :2] + 1, anchor[..., 2:] - anchor[..., :2] + 1
    shift = (centers(boxes) - centers(anchor)) / anchor_sides * _CODER_WEIGHTS[0]
    return xp.concatenate([shift, xp.log(sides / anchor_sides) * _CODER_WEIGHTS[2]], axis=-1)


def decode(deltas: Float[Any, "*#n 4"], anchor: Float[Any, "*#n 4"]) -> Float[Any, "*_ 4"]:
    """Inverse of `encode`; log sides are bounded from above (glip-reference 2.10)."""
    xp = deltas.__array_namespace__()
    anchor_sides = anchor[..., 2:] - anchor[..., :2] + 1
    center = deltas[..., :2] / _CODER_WEIGHTS[0] * anchor_sides + centers(anchor)
    log_sides = deltas[..., 2:] / _CODER_WEIGHTS[2]
    half = (xp.exp(xp.minimum(log_sides, xp.full_like(log_sides, _LARGEST_LOG_SIDE))) * anchor_sides - 1) / 2
    return xp.concatenate([center - half, center + half], axis=-1)


def from_coco_xywh(boxes: Float[Any, "*#n 4"]) -> Float[Any, "*_ 4"]:
    """COCO (x, y, width, height) to inclusive corners: x2 = x + max(width - 1, 0)."""
    xp = boxes.__array_namespace__()
    sides = boxes[..., 2:] - 1
    return xp.concatenate([boxes[..., :2], boxes[..., :2] + xp.maximum(sides, xp.zeros_like(sides))], axis=-1)


def to_coco_xywh(boxes: Float[Any, "*#n 4"]) -> Float[Any, "*_ 4"]:
    """Inclusive corners to COCO (x, y, width, height): width = x2 - x1 + 1."""
    xp = boxes.__array_namespace__()
    return xp.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2] + 1], axis=-1)


def level_shape(canvas: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) of a pyramid level in cells, rounded up, for a canvas (height, width) in pixels."""
    return -(-canvas[0] // stride), -(-canvas[1] // stride)


def anchors(canvas: tuple[int, int], strides: Sequence[int], sizes: Sequence[int]) -> Float32[np.ndarray, "A 4"]:
    """One square anchor per location, ordered by level, then row-major (glip-reference 2.10).

    The anchor of the first cell is centered at (stride - 1) / 2 and extends (size - 1) / 2 to each side, so that its inclusive
    side is `size`: [-28, -28, 35, 35] for stride 8 and size 64.
    """
    parts = []
    for stride, size in zip(strides, sizes, strict=True):
        height, width = level_shape(canvas, stride)
        middle, reach = (stride - 1) / 2, (size - 1) / 2
        y, x = np.meshgrid(np.arange(height) * stride, np.arange(width) * stride, indexing="ij")
        corner = np.stack([x, y, x, y], -1).reshape(-1, 4) + middle
        parts.append(corner + np.array([-reach, -reach, reach, reach]))
    return np.concatenate(parts).astype(np.float32)
