"""ATSS equals a loop over boxes and levels, on random boxes of which several have the same positive anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import AnchorConfig, LossConfig, ModelConfig, PyramidConfig
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import Targets
from glip_jax.training import assignment
from glip_jax.training.assignment import assign

STRIDES, SIZES = (8, 16, 32, 64), (24, 48, 96, 192)
MODEL = ModelConfig(pyramid=PyramidConfig(strides=STRIDES), anchors=AnchorConfig(SIZES))


def _by_loops(boxes: np.ndarray, canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """glip-reference 3.1 for an image that fills its canvas: (positive [A], box index [A])."""
    anchors = box.anchors(canvas, STRIDES, SIZES).astype(np.float64)
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    best, owner = np.full(len(anchors), -1.0), np.zeros(len(anchors), int)
    for number, one in enumerate(boxes.astype(np.float64)):
        candidates, begin = [], 0
        for stride in STRIDES:
            h, w = box.level_shape(canvas, stride)
            distance = np.sqrt(np.square(middle[begin : begin + h * w] - (one[:2] + one[2:]) / 2).sum(1))
            order = np.argsort(distance.astype(np.float32), kind="stable")[: min(9, h * w)]
            candidates += (order + begin).tolist()
            begin += h * w
        overlap = box.iou(anchors[candidates], one[None])
        bound = overlap.mean() + overlap.std(ddof=1)
        for place, value in zip(candidates, overlap):
            x, y = middle[place]
            within = min(x - one[0], y - one[1], one[2] - x, one[3] - y) > 0.01
            if value >= bound and within and value > best[place]:
                best[place], owner[place] = value, number
    return best >= 0, owner


def _assign(
    boxes: np.ndarray, mask: np.ndarray, canvas: tuple[int, int], model: ModelConfig = MODEL,
    loss: LossConfig | None = None,
) -> Targets:  # fmt: skip
    settings = loss or LossConfig()
    return jax.jit(lambda b, m, e: assign(b, m, e, canvas, model, settings))(
        boxes, mask, np.array([canvas] * len(boxes), np.int32)
    )


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    canvas = (96, 128)
    corner = rng.uniform(0, 60, (7, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 60, (7, 2))], 1).astype(np.float32)
    mask = np.array([True] * 6 + [False])
    targets = _assign(boxes[None], mask[None], canvas)
    positive, owner = _by_loops(boxes[:6], canvas)
    assert positive.sum() > 3
    np.testing.assert_array_equal(targets.positive[0], positive)
    np.testing.assert_array_equal(np.asarray(targets.box_index[0])[positive], owner[positive])
    np.testing.assert_allclose(np.asarray(targets.boxes[0])[positive], boxes[owner[positive]], atol=1e-4)
    anchors = box.anchors(canvas, STRIDES, SIZES)
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).T
    x1, y1, x2, y2 = boxes[owner].T
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.sqrt(
            np.minimum(left, right) / np.maximum(left, right) * np.minimum(top, bottom) / np.maximum(top, bottom)
        )
    np.testing.assert_allclose(np.asarray(targets.centerness[0])[positive], wanted[positive], atol=1e-4)


def test_the_nearest_one_by_one_are_those_of_the_sort() -> None:
    """With many ties, and rows in which fewer than asked are inside the extent."""
    distance = jnp.asarray(np.random.default_rng(0).integers(0, 40, (20, 300)), jnp.float32)
    distance = distance.at[:3, 5:].set(assignment._OUTSIDE)
    found = jax.jit(assignment._smallest_one_by_one, static_argnums=1)(distance, 9)
    np.testing.assert_array_equal(found, jax.lax.top_k(-distance, 9)[1])


def test_without_boxes_nothing_is_positive() -> None:
    targets = _assign(np.zeros((1, 3, 4), np.float32), np.zeros((1, 3), bool), (64, 64))
    assert not np.asarray(targets.positive).any()
    assert np.isfinite(np.asarray(targets.boxes)).all() and not np.asarray(targets.centerness).any()


def test_equal_distances_go_to_the_upper_left_anchor() -> None:
    """A box centred between four anchors of one level: with one candidate a level, the first of them is taken."""
    model = ModelConfig(pyramid=PyramidConfig(strides=(16,)), anchors=AnchorConfig((16,)))
    cell = 7.5  # centre of the first anchor of stride 16
    boxes = np.array([[[cell - 8, cell - 8, cell + 24, cell + 24]]], np.float32)  # centred at (15.5, 15.5)
    targets = _assign(boxes, np.ones((1, 1), bool), (64, 64), model, LossConfig(atss_candidates=1))
    assert np.flatnonzero(np.asarray(targets.positive[0])).tolist() == [0]
