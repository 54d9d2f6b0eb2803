"""Decoding of image files: orientation, color modes, bits, and whatever a damaged file makes a decoder raise."""

import contextlib
import io
import os
import random
import threading
import warnings

import numpy as np
import pytest
from etils import epath
from PIL import Image, ImageOps

from glip_jax.data import images
from glip_jax.data.records import Record, RecordError, boxes_array, decode_image, validate
from glip_jax.io.image_files import ImageFileError, decode, listed, measured, read_upright, turn, upright

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
GRAY16 = np.arange(0, 64000, 8000, dtype=np.uint16)[None]


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _record(data, pixels, orientation=1):
    return Record("x", "detection", data, pixels.shape[0], pixels.shape[1], boxes_array([]), orientation=orientation)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _rgba(alpha):
    image = Image.new("RGBA", (2, 1), (0, 200, 0, 255))
    image.putpixel((1, 0), (0, 200, 0, alpha))
    return image


def _palette():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 1, 2, 3])
    image.putpixel((1, 0), 1)
    return image


CASES = [
    (encoded(Image.fromarray(GRAY16)), [0, 31, 62, 93, 125, 156, 187, 218], "gray of 16 bits, of which 16 are used"),
    (encoded(Image.fromarray(GRAY16 // 16)), [0, 31, 62, 93, 125, 156, 187, 218], "of which 12 are used"),
    (encoded(Image.fromarray(GRAY16 // 256)), [0, 31, 62, 93, 125, 156, 187, 218], "of which 8 are used"),
    (encoded(Image.fromarray(GRAY16.astype(np.int32) * 40 - 9), "TIFF"), [0, 36, 73, 109, 146, 182, 219, 255], "32 bits"),
    (encoded(Image.fromarray(np.array([[0, 0.5, 1, np.nan]], np.float32)), "TIFF"), [0, 128, 255, 0], "floating point"),
    (encoded(Image.fromarray(GRAY16), transparency=0), [255, 31, 62, 93, 125, 156, 187, 218], "16 bits"),
    (encoded(Image.fromarray(np.array([[3, 3]], np.float32)), "TIFF"), [0, 0], "floating point"),
    (encoded(Image.new("1", (2, 1), 1)), [255, 255], ""),
    (encoded(Image.merge("LA", [Image.new("L", (2, 1), 7), Image.new("L", (2, 1))])), [255, 255], "over white"),
    (encoded(_rgba(0)), [[0, 200, 0], [255, 255, 255]], "transparent parts, shown over white"),
    (encoded(_rgba(255)), [[0, 200, 0], [0, 200, 0]], ""),
    (encoded(_palette(), transparency=0), [[255, 255, 255], [1, 2, 3]], "over white"),
    (encoded(_palette(), transparency=b"\x00\xff"), [[255, 255, 255], [1, 2, 3]], "over white"),
    (encoded(_palette()), [[9, 9, 9], [1, 2, 3]], ""),
    (encoded(Image.new("CMYK", (2, 1), (255, 0, 0, 0)), "TIFF"), [[0, 255, 255]] * 2, ""),
    (encoded(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"), [[254, 255, 254]], ""),
    (encoded(Image.new("L", (2, 1), 5), "GIF", save_all=True, append_images=[Image.new("L", (2, 1))]), [5, 5], "several frames"),
]  # fmt: skip
"""A file, its values in RGB or gray, and what is noted of it."""


@pytest.mark.parametrize(("data", "gray", "note"), CASES)
def test_every_mode_becomes_eight_bits(data, gray, note):
    found = decode(data)
    expected = np.asarray(gray) if np.ndim(gray) == 2 else np.repeat(np.asarray(gray)[:, None], 3, 1)
    assert found.pixels[0].tolist() == expected.tolist()
    assert note in "".join(found.notes) and bool(note) == bool(found.notes)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(upright(image), found.pixels), "so does a Detector that is given a picture of Pillow"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_that_of_pillow(form, orientation, tmp_path):
    data = encoded(RGB, form, exif=_exif(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = decode(data)
    assert np.array_equal(turn(found.pixels, found.orientation), expected)
    path = epath.Path(tmp_path / "x")
    path.write_bytes(data)
    assert measured(path) == (*expected.shape[:2], orientation > 1 and form != "TIFF")
    assert np.array_equal(read_upright(path)[0], expected)
    record = _record(data, expected, found.orientation)
    for codec in ("fast", "pillow"):
        assert np.array_equal(images.decode(record, codec), expected)
    assert images.decode(record, "fast", (6, 8)).shape[:2] <= expected.shape[:2]


HTML = b"\n<!DOCTYPE html><html><head><title>404</title></head></html>"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (HTML, "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS, not the file itself: fetch"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC: convert it"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "that macOS writes beside others"),
        (b"%PDF-1.4", "a PDF document"),
        (bytes(900), "zero bytes alone"),
        (b'{"error": "no such key"}', "a text, '{\"error\""),
        (b"", "the file is empty"),
        (b"\x01\x02\x03\x04", "it begins with the bytes 01 02 03 04"),
        (encoded(RGB, "JPEG")[:-300], "bytes end before the image does"),
        (encoded(RGB, "AVIF")[:96] + bytes(16) + encoded(RGB, "AVIF")[112:], "bytes are damaged"),
        (encoded(RGB, "DDS")[:80] + b"\x04\x00\x00\x00DX99" + encoded(RGB, "DDS")[88:], "bytes are damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "EPS is a drawing"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_said_in_own_words(data, words, tmp_path):
    with pytest.raises(ImageFileError) as found:
        decode(data)
    assert words in found.value.reason and "0x" not in found.value.reason and "Bytes" not in found.value.reason
    path = epath.Path(tmp_path / "x.jpg")
    path.write_bytes(data)
    with pytest.raises(ImageFileError, match=r"x\.jpg (is no image that can be read|cannot be decoded)"):
        read_upright(path)


_TRIES = int(os.environ.get("GLIP_JAX_FUZZ", "8"))
"""Damaged files of each kind; thousands by hand."""
_KINDS = {
    "JPEG": {}, "JPEG progressive": {"progressive": True}, "JPEG EXIF": {"exif": _exif(6)}, "PNG": {}, "PNG 16": {}, "PNG P": {},
    "PNG RGBA": {}, "PNG frames": {"save_all": True, "append_images": [RGB]}, "GIF": {"save_all": True, "append_images": [RGB]},
    "WEBP": {}, "WEBP lossless": {"lossless": True}, "AVIF": {}, "TIFF": {}, "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF jpeg": {"compression": "jpeg"}, "TIFF 16": {}, "TIFF F": {}, "BMP": {}, "JPEG2000": {}, "PPM": {}, "TGA": {}, "DDS": {},
    "ICO": {"sizes": [(24, 24)]}, "PCX": {}, "SGI": {}, "QOI": {}, "JPEG CMYK": {},
}  # fmt: skip
_MODES = {
    "16": Image.fromarray(np.random.default_rng(1).integers(0, 2**16, (24, 32), np.uint16)), "P": RGB.convert("P"),
    "RGBA": RGB.convert("RGBA"), "F": RGB.convert("F"), "CMYK": RGB.convert("CMYK"),
}  # fmt: skip


def _damaged(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(min(len(changed), rng.choice([64, 400, 10**9])))] = rng.choice(
            [0, 255, rng.randrange(256)]
        )
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.2 else changed)


@pytest.mark.parametrize("kind", _KINDS)
def test_damaged_files_are_decoded_or_refused_in_silence(kind, capfd):
    form, _, mode = kind.partition(" ")
    data, rng = encoded(_MODES.get(mode, RGB), form, **_KINDS[kind]), random.Random(kind)
    assert decode(data).pixels.shape[2] == 3
    for _ in range(_TRIES):
        file = _damaged(data, rng)
        try:
            found = decode(file)
            shape, reason = found.pixels.shape[:2], ""
        except ImageFileError as error:
            shape, reason = (24, 32), error.reason
        assert reason.isprintable() and "0x" not in reason
        record = _record(file, np.zeros(shape))
        # What an import keeps the fast codec of training reads alike; what it drops no codec reads.
        results = []
        for codec in ("pillow", "fast"):
            try:
                results.append(images.decode(record, codec).tobytes())
            except RecordError:
                results.append(None)
        assert results[0] == results[1]
    assert capfd.readouterr() == ("", "")


def test_libraries_say_nothing_in_any_thread(recwarn, capfd):
    """`warnings.catch_warnings` in several threads lets warnings through, and may restore the wrong filters."""
    odd = encoded(_palette(), transparency=b"\x00\xff")
    exif = bytearray(encoded(RGB, "JPEG", exif=_exif(6)))
    exif[exif.index(b"\x01\x12") + 4] = 200  # the tag is longer than the file
    tiff = encoded(RGB, "TIFF", compression="tiff_lzw")
    broken = tiff[:200] + bytes(300) + tiff[500:]

    def work():
        for data in (odd, bytes(exif), broken) * 5:
            with contextlib.suppress(ImageFileError):
                decode(data)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not recwarn.list and capfd.readouterr() == ("", "")
    assert decode(bytes(exif)).notes == ("image: EXIF cannot be read, so its orientation is not known",)
    with pytest.warns(UserWarning, match="of others"):
        warnings.warn("of others", stacklevel=1)


def test_what_a_folder_lists(tmp_path):
    for name in ("b.jpg", "a.PNG", "._a.PNG", "c.heic", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found, others = listed(epath.Path(tmp_path))
    assert [path.name for path in found] == ["a.PNG", "b.jpg", "c.heic"] and others == 2


def test_a_record_keeps_the_file_and_its_orientation():
    data = encoded(RGB, "JPEG", exif=_exif(6))
    record = Record("x", "detection", data, 32, 24, boxes_array([[0, 0, 3, 3]]), (0,), orientation=6)
    assert decode_image(record).shape == (32, 24, 3)
    with pytest.raises(RecordError, match="field orientation: is 9, expected 1 to 8"):
        validate(Record("x", "detection", data, 32, 24, boxes_array([]), orientation=9))
