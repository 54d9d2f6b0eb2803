"""The fast codec against Pillow: equal pixels without a resize, close ones with it, the same errors. Reuse of memory."""

import gc
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from glip_jax.data.images import BufferPool, decode, resize_to_canvas
from glip_jax.data.records import Record, RecordError, boxes_array, decode_image
from glip_jax.data.scenes.backgrounds import background


def photograph(height=120, width=160, seed=3):
    """A smooth image without noise."""
    small = background(np.random.default_rng(seed), height // 4, width // 4).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def record(image, image_format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return Record("x", "detection", stream.getvalue(), image.height, image.width, boxes_array([]))


def on_canvas(image, size, canvas, mirrored, kind):
    """The image on a canvas that held other pixels."""
    pixels = np.full((*canvas, 3), 99, np.uint8)
    resize_to_canvas(image, size, pixels, mirrored, kind)
    return pixels


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_equals_pillow(image_format, mode):
    made = record(photograph().convert(mode), image_format)
    assert np.array_equal(decode(made, "fast"), decode_image(made))
    assert np.array_equal(decode(made, "pillow"), decode_image(made))


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    made = record(photograph(), exif=exif)
    assert decode(made, "fast").shape == (120, 160, 3)


def test_other_color_modes_use_pillow():
    made = record(photograph().convert("CMYK"))
    assert np.abs(decode(made, "fast").astype(int) - decode_image(made)).max() <= 1


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_damaged_images_and_other_sizes_are_refused(image_format):
    made = record(photograph(), image_format)
    for image in (made.image[: len(made.image) // 2], b"\xff\xd8\xffnothing", b"<html>"):
        with pytest.raises(RecordError, match="field image"):
            decode(Record("x", "detection", image, 120, 160, boxes_array([])), "fast")
    with pytest.raises(RecordError, match="height and width say 120 x 161"):
        decode(Record("x", "detection", made.image, 120, 161, boxes_array([])), "fast")


@pytest.mark.parametrize(
    ("min_size", "expected"), [((121, 10), (240, 320)), ((120, 160), (120, 160)), ((50, 70), (60, 80))]
)
def test_decoding_is_never_smaller_than_asked(min_size, expected):
    assert decode(record(photograph(240, 320)), "fast", min_size).shape[:2] == expected
    assert decode(record(photograph(240, 320)), "pillow", min_size).shape[:2] == (240, 320)


@pytest.mark.parametrize(
    ("size", "mean", "largest"), [((200, 267), 0.3, 2), ((120, 160), 0, 0), ((100, 133), 0.5, 24), ((50, 67), 1.0, 40)]
)
def test_resized_pixels_are_close_to_pillow(size, mean, largest):
    made = record(photograph())
    fast = on_canvas(decode(made, "fast", size), size, (224, 288), False, "fast")
    exact = on_canvas(decode_image(made), size, (224, 288), False, "pillow")
    difference = np.abs(fast.astype(int) - exact)[: size[0], : size[1]]
    assert difference.mean() <= mean
    assert difference.max() <= largest
    assert not fast[size[0] :].any() and not fast[:, size[1] :].any()
    flipped = on_canvas(decode(made, "fast", size), size, (224, 288), True, "fast")
    assert np.abs(flipped[:, : size[1]][:, ::-1].astype(int) - fast[:, : size[1]]).max() <= 1


def test_a_canvas_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="does not fit on a canvas"):
        on_canvas(np.zeros((10, 10, 3), np.uint8), (33, 10), (32, 32), False, "fast")


def _address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.long
def test_a_buffer_returns_when_its_last_array_is_deleted():
    pool = BufferPool()
    first = pool.acquire((4, 100, 3))
    first[:] = 7
    address, part = _address(first), first[2:]
    del first
    gc.collect()
    second = pool.acquire((4, 100, 3))
    assert _address(second) != address, "a slice still refers to it"
    second[:] = 0
    assert (part == 7).all()
    del part
    gc.collect()
    assert _address(pool.acquire((4, 100, 3))) == address


@pytest.mark.slow
def test_smaller_and_larger_arrays_share_buffers():
    pool = BufferPool()
    large = pool.acquire((4096, 10))
    address = _address(large)
    del large
    gc.collect()
    small = pool.acquire((5, 3))
    assert _address(small) == address and small.shape == (5, 3) and small.dtype == np.uint8
    del small
    gc.collect()
    larger = pool.acquire((4096, 20))
    larger[:] = 1
    del larger
    gc.collect()
    assert pool.acquire((4096, 20)).sum() == 4096 * 20, "the buffer that was too small is gone, this one returned"


def test_a_pickled_pool_starts_empty():
    pool = BufferPool()
    first = pool.acquire((16,))
    first[:] = 1
    copy = pickle.loads(pickle.dumps(pool))
    other = copy.acquire((16,))
    other[:] = 2
    assert (first == 1).all()
