"""Geometry: target sizes as in the original, canvases that hold every image, boxes that move with their pixels."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.padding import measure
from glip_jax.config import Codec, DataConfig
from glip_jax.data import transforms
from glip_jax.structures.canvas import canvas_size, fit, pad_to_canvas, resize, target_size
from tests.data.test_images import on_canvas

sides = st.integers(1, 900)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((500, 500), (800, 800)),
        ((800, 1333), (800, 1333)),
        ((400, 800), (666, 1332)),  # round(666.5) is 666: halves to even
        ((100, 2927), (46, 1346)),  # longer than 1333, because the short side is rounded first
        ((1, 5000), (1, 5000)),
    ],
)
def test_target_size_equals_the_original(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*size, 800, 1333) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((480, 0.75, 640), (480, 640)),
        ((480, 1.333333, 640), (640, 480)),
        ((320, 1.0, 999), (320, 320)),
        ((800, 0.75, 1333), (800, 1088)),
        ((800, 0.5, 1333), (672, 1344)),
        ((8, 1.0, 100), (32, 32)),
    ],
)
def test_canvas_sizes(arguments: tuple, expected: tuple[int, int]) -> None:
    assert canvas_size(*arguments) == expected


@given(sides, sides, st.integers(16, 200), st.sampled_from([0.5, 0.75, 1.0, 4 / 3, 2.0]), st.integers(200, 300))
def test_every_image_fits_its_canvas(height: int, width: int, short: int, aspect: float, long: int) -> None:
    canvas = canvas_size(short, aspect, long)
    assert canvas[0] % 32 == canvas[1] % 32 == 0
    h, w = fit(height, width, short, long, canvas)
    assert 1 <= h <= canvas[0]
    assert 1 <= w <= canvas[1]
    if target_size(height, width, short, long) <= canvas and h < canvas[0] and w < canvas[1]:
        assert (h, w) == target_size(height, width, short, long)


@settings(deadline=None)
@given(st.integers(4, 20), st.integers(4, 20), st.integers(0, 2**31))
def test_flip_moves_boxes_with_their_pixels_and_is_its_inverse(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x1, y1 = rng.integers(0, width - 1), rng.integers(0, height - 1)
    x2, y2 = rng.integers(x1 + 1, width), rng.integers(y1 + 1, height)
    image = np.zeros((height, width, 3), np.uint8)
    image[y1 : y2 + 1, x1 : x2 + 1] = 9
    boxes = np.array([[x1, y1, x2, y2]], np.float32)
    moved = transforms.mirror_boxes(boxes, width)
    for kind in get_args(Codec):
        mirrored = on_canvas(image, (height, width), (height + 3, width + 5), True, kind)
        ys, xs = np.nonzero(mirrored[:, :, 0])
        assert moved[0].tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]
    assert np.array_equal(transforms.mirror_boxes(moved, width), boxes)


def test_default_canvases_have_little_padding_for_coco() -> None:
    """The most frequent sizes of 100 images of val2014, and two of its most elongated ones."""
    common = {(480, 640): 24, (427, 640): 19, (375, 500): 6, (640, 480): 3, (640, 427): 6, (333, 500): 4, (640, 638): 1}
    sizes = [size for size, count in common.items() for _ in range(count)] + [(218, 640), (640, 359)]
    *rows, whole = measure(sizes, DataConfig())
    assert whole.padding < 0.08 and whole.resolution > 0.97 and whole.canvases == 25
    assert sum(row.images for row in rows) == whole.images == len(sizes)
    one = measure([(480, 640)], DataConfig(aspects=(1.0,), short_sides=(320,), long_side=640))
    assert one[0].canvases == 1 and one[0].padding == pytest.approx(0.25) and one[0].resolution == pytest.approx(0.75)


def test_resize_scales_image_and_boxes_together() -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, 10:] = 200
    larger = resize(image, (20, 60))
    assert larger.shape == (20, 60, 3)
    assert larger[:, :27].max() == 0
    assert larger[:, 33:].min() == 200
    boxes = transforms.scale_boxes(np.array([[2, 3, 10, 9]], np.float32), (10, 20), (20, 60))
    assert boxes.tolist() == [[6, 6, 30, 18]]
    assert boxes.dtype == np.float32
    assert resize(image, (10, 20)) is image


def test_pad_to_canvas_pads_with_zeros_below_and_right() -> None:
    canvas = pad_to_canvas(np.full((3, 4, 3), 5, np.uint8), (32, 64))
    assert canvas.shape == (32, 64, 3)
    assert canvas[:3, :4].min() == 5
    assert canvas.sum() == 3 * 4 * 3 * 5
    with pytest.raises(ValueError, match="33 x 4 does not fit on a canvas of 32 x 64"):
        pad_to_canvas(np.zeros((33, 4, 3), np.uint8), (32, 64))
