"""Fast pixels beside Pillow's: equal where nothing is resized, close where it is, and refused alike where broken."""

import io

import numpy as np
import pytest
from PIL import Image

from glip_jax.data import images as codec
from glip_jax.data.records import Record, RecordError, boxes_array, decode_image
from glip_jax.data.scenes.backgrounds import background


def picture(height=120, width=160, seed=3):
    """As smooth as a photograph, without its noise."""
    small = background(np.random.default_rng(seed), height // 4, width // 4).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def record(image, form="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return Record("x", "detection", stream.getvalue(), image.height, image.width, boxes_array([]))


def placed(image, size, canvas, mirrored, kind):
    """On a canvas that was something else before."""
    pixels = np.full((*canvas, 3), 99, np.uint8)
    codec.resize_to_canvas(image, size, pixels, mirrored, kind)
    return pixels


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_gives_pillows_pixels(form, mode):
    made = record(picture().convert(mode), form)
    assert np.array_equal(codec.decode(made, "fast"), decode_image(made))
    assert np.array_equal(codec.decode(made, "pillow"), decode_image(made))


def test_orientation_is_not_regarded():
    exif = Image.Exif()
    exif[0x0112] = 6
    made = record(picture(), exif=exif)
    assert codec.decode(made, "fast").shape == (120, 160, 3)


def test_other_colours_go_through_pillow():
    made = record(picture().convert("CMYK"))
    assert np.abs(codec.decode(made, "fast").astype(int) - decode_image(made)).max() <= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_what_is_damaged_or_of_another_size_is_refused(form):
    made = record(picture(), form)
    for image in (made.image[: len(made.image) // 2], b"\xff\xd8\xffnothing", b"<html>"):
        with pytest.raises(RecordError, match="field image"):
            codec.decode(Record("x", "detection", image, 120, 160, boxes_array([])), "fast")
    with pytest.raises(RecordError, match="height and width say 120 x 161"):
        codec.decode(Record("x", "detection", made.image, 120, 161, boxes_array([])), "fast")


@pytest.mark.parametrize(
    ("least", "expected"), [((121, 10), (240, 320)), ((120, 160), (120, 160)), ((50, 70), (60, 80))]
)
def test_a_smaller_decoding_is_never_too_small(least, expected):
    assert codec.decode(record(picture(240, 320)), "fast", least).shape[:2] == expected
    assert codec.decode(record(picture(240, 320)), "pillow", least).shape[:2] == (240, 320)


@pytest.mark.parametrize(
    ("size", "mean", "most"), [((200, 267), 0.3, 2), ((120, 160), 0, 0), ((100, 133), 0.5, 24), ((50, 67), 1.0, 40)]
)
def test_resized_pixels_are_close_to_pillows(size, mean, most):
    made = record(picture())
    fast = placed(codec.decode(made, "fast", size), size, (224, 288), False, "fast")
    exact = placed(decode_image(made), size, (224, 288), False, "pillow")
    difference = np.abs(fast.astype(int) - exact)[: size[0], : size[1]]
    assert difference.mean() <= mean
    assert difference.max() <= most
    assert not fast[size[0] :].any() and not fast[:, size[1] :].any()
    turned = placed(codec.decode(made, "fast", size), size, (224, 288), True, "fast")
    assert np.abs(turned[:, : size[1]][:, ::-1].astype(int) - fast[:, : size[1]]).max() <= 1


def test_a_canvas_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="does not fit on a canvas"):
        placed(np.zeros((10, 10, 3), np.uint8), (33, 10), (32, 32), False, "fast")
