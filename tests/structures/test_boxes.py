"""Box geometry against values by hand, for numpy and jax arrays."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glip_jax.structures import boxes as box

A = np.array([0.0, 0.0, 9.0, 9.0], np.float32)
B = np.array([5.0, 0.0, 14.0, 9.0], np.float32)

_side = st.floats(1, 200, width=32)
_corner = st.floats(-100, 100, width=32)


def test_inclusive_and_exclusive_areas() -> None:
    assert box.area(A) == 100 and box.area(A, plus_one=False) == 81


def test_iou_has_inclusive_corners() -> None:
    assert box.iou(A, B) == np.float32(50 / 150)
    assert box.iou(A, A + 100) == 0
    np.testing.assert_allclose(box.pairwise_iou(np.stack([A, B]), B[None])[:, 0], [1 / 3, 1], rtol=1e-6)


def test_giou_has_exclusive_corners_and_is_negative_for_distant_boxes() -> None:
    np.testing.assert_allclose(box.giou(A, B), 36 / 126, rtol=1e-5)
    far = A + np.array([100, 0, 100, 0], np.float32)
    np.testing.assert_allclose(box.giou(A, far), -(109 * 9 - 162) / (109 * 9), rtol=1e-5)
    crossed = np.array([5.0, 5.0, 1.0, 1.0], np.float32)
    assert np.isfinite(box.giou(crossed, A))


@given(st.tuples(_corner, _corner, _side, _side, _corner, _corner, _side, _side))
def test_decode_inverts_encode(values: tuple[float, ...]) -> None:
    x, y, w, h, ax, ay, aw, ah = values
    target, anchor = np.array([x, y, x + w, y + h], np.float32), np.array([ax, ay, ax + aw, ay + ah], np.float32)
    if max((w + 1) / (aw + 1), (h + 1) / (ah + 1)) > 60:
        return
    for convert in (np.asarray, jnp.asarray):
        back = box.decode(box.encode(convert(target), convert(anchor)), convert(anchor))
        np.testing.assert_allclose(back, target, atol=2e-2)


def test_decoded_sides_are_bounded() -> None:
    wide = box.decode(np.array([0, 0, 100, 0], np.float32), A)
    np.testing.assert_allclose(wide[2] - wide[0] + 1, 10 * 62.5, rtol=1e-5)


def test_coco_conversion_is_inclusive_and_invertible() -> None:
    xyxy = box.from_coco_xywh(np.array([3, 4, 10, 20], np.float32))
    np.testing.assert_array_equal(xyxy, [3, 4, 12, 23])
    np.testing.assert_array_equal(box.to_coco_xywh(xyxy), [3, 4, 10, 20])


def test_clip_limits_corners_to_pixels() -> None:
    found = box.clip(np.array([-5, 3, 200, 300], np.float32), np.array([100, 50], np.float32))
    np.testing.assert_array_equal(found, [0, 3, 49, 99])


def test_anchors_equal_the_original() -> None:
    """glip-reference 2.10 lists the first cell of each level."""
    found = box.anchors((128, 128), (8, 16, 32, 64, 128), (64, 128, 256, 512, 1024))
    first = [0, 256, 320, 336, 340]
    np.testing.assert_array_equal(found[first, 0], [-28, -56, -112, -224, -448])
    np.testing.assert_array_equal(found[first, 2], [35, 71, 143, 287, 575])
    np.testing.assert_array_equal(found[1] - found[0], [8, 0, 8, 0])
    assert len(box.anchors((40, 72), (16,), (32,))) == 3 * 5
