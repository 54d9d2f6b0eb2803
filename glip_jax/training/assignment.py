"""Assignment of anchors to boxes: ATSS (arXiv 1912.02424) as in GLIP (glip-reference 3.1).

Per box, the nearest anchors of each level are candidates. Those whose IoU reaches the mean + standard deviation over the
candidates, and whose center is in the box, are positive. An anchor that is positive for several boxes goes to the box of
highest IoU. Ties go to the upper left anchor and the lower box slot. Anchors beyond the extent of an image are ignored.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import LossConfig, ModelConfig
from glip_jax.models.extents import level_size, valid_mask
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import Targets

__all__ = ["anchors_inside", "assign"]

_UNCLAIMED = -1e8
_OUTSIDE = 3e38
"""Distance of an anchor beyond the extent, in pixels: larger than any, and finite."""
_MARGIN = 0.01
"""Minimum distance in pixels of an anchor's center from the sides of the box."""


def anchors_inside(extent: Int[Array, "B 2"], canvas: tuple[int, int], strides: tuple[int, ...]) -> Bool[Array, "B A"]:
    """Anchors whose cell is in the extent of the image."""
    parts = [
        valid_mask(level_size(extent, stride), *box.level_shape(canvas, stride)).reshape(extent.shape[0], -1)
        for stride in strides
    ]
    return jnp.concatenate(parts, 1)


def _smallest(x: Float[Array, "N A"], count: int) -> Int[Array, "N K"]:
    """Indices of the `count` smallest of each row, in their order; of equal ones the first. Values are finite."""
    # A TPU sorts a whole level for nine anchors, which takes twenty times as long.
    return jax.lax.platform_dependent(
        x, tpu=partial(_smallest_one_by_one, count=count), default=lambda x: jax.lax.top_k(-x, count)[1]
    )


def _smallest_one_by_one(x: Float[Array, "N A"], count: int) -> Int[Array, "N K"]:
    places = jnp.arange(x.shape[1])[None]

    def take(x: Array, _: None) -> tuple[Array, Array]:
        first = jnp.where(x == x.min(1, keepdims=True), places, x.shape[1]).min(1)
        return jnp.where(places == first[:, None], jnp.inf, x), first

    return jax.lax.scan(take, x, None, length=count)[1].T


def _candidates(
    boxes: Float[Array, "N 4"], inside: Bool[Array, " A"], anchors: Float[Array, "A 4"], ends: list[int], count: int
) -> tuple[Int[Array, "N K"], Bool[Array, "N K"]]:
    """Indices of the nearest anchors per level, and which of them are inside the extent."""
    offset = box.centers(boxes)[:, None] - box.centers(anchors)[None]
    distance = jnp.where(inside[None], jnp.sqrt(jnp.square(offset).sum(-1)), _OUTSIDE)
    candidates, begin = [], 0
    for end in ends:
        candidates.append(_smallest(distance[:, begin:end], min(count, end - begin)) + begin)
        begin = end
    indices = jnp.concatenate(candidates, 1)
    return indices, inside[indices]


def _assign_one(
    boxes: Float[Array, "N 4"], mask: Bool[Array, " N"], inside: Bool[Array, " A"], anchors: Float[Array, "A 4"],
    ends: list[int], count: int,
) -> Targets:  # fmt: skip
    # Empty slots get a box of positive size, so that nothing is divided by zero; the mask excludes them below.
    safe = jnp.where(mask[:, None], boxes, jnp.array([0.0, 0.0, 1.0, 1.0]))
    indices, valid = _candidates(safe, inside, anchors, ends, count)
    near = anchors[indices]
    overlap = box.iou(near, safe[:, None])
    number = valid.sum(1)
    mean = jnp.where(valid, overlap, 0.0).sum(1) / number
    variance = jnp.where(valid, jnp.square(overlap - mean[:, None]), 0.0).sum(1)
    threshold = mean + jnp.sqrt(variance / jnp.maximum(number - 1, 1))
    x, y = jnp.moveaxis(box.centers(near), -1, 0)
    x1, y1, x2, y2 = jnp.moveaxis(safe[:, None], -1, 0)
    within = jnp.minimum(jnp.minimum(x - x1, y - y1), jnp.minimum(x2 - x, y2 - y)) > _MARGIN
    claims = valid & within & (overlap >= threshold[:, None]) & mask[:, None]

    claimed = jnp.full((boxes.shape[0], anchors.shape[0]), _UNCLAIMED)
    slots = jnp.arange(boxes.shape[0])[:, None]
    claimed = claimed.at[slots, indices].max(jnp.where(claims, overlap, _UNCLAIMED))
    index = jnp.argmax(claimed, 0)
    positive = claimed.max(0) > _UNCLAIMED
    index = jnp.where(positive, index, 0)
    target = box.decode(box.encode(safe[index], anchors), anchors)
    sides = jnp.concatenate([box.centers(anchors) - target[:, :2], target[:, 2:] - box.centers(anchors)], 1)
    low = jnp.minimum(sides[:, :2], sides[:, 2:])
    ratio = jnp.where(positive[:, None], low / jnp.maximum(sides[:, :2], sides[:, 2:]), 0.0)
    centerness = jnp.sqrt(jnp.maximum(ratio[:, 0] * ratio[:, 1], 0.0))
    return Targets(positive, index.astype(jnp.int32), jnp.where(positive[:, None], target, 0.0), centerness)


def assign(
    boxes: Float[Array, "B N 4"],
    box_mask: Bool[Array, "B N"],
    extent: Int[Array, "B 2"],
    canvas: tuple[int, int],
    model: ModelConfig,
    loss: LossConfig,
) -> Targets:
    """Targets of every anchor on `canvas` (height, width), per image. An image may have no boxes."""
    strides = model.pyramid.strides
    anchors = box.anchors(canvas, strides, model.anchors.sizes)
    ends = np.cumsum([np.prod(box.level_shape(canvas, stride)) for stride in strides]).tolist()
    inside = anchors_inside(extent, canvas, strides)
    each = jax.vmap(lambda b, m, o: _assign_one(b, m, o, jnp.asarray(anchors), ends, loss.atss_candidates))
    return jax.lax.stop_gradient(each(boxes, box_mask, inside))
