"""Records of images with an EXIF orientation, and of files that no decoder reads."""

import io

import numpy as np
import pytest
from PIL import Image

from glip_jax.config import Orientation
from glip_jax.data.importers.entry import Entry, Report, make_record
from glip_jax.data.records import decode, decode_image, encode

TURNED = "image: turned upright by its EXIF orientation"
STORED = "image: EXIF orientation not applied, as its listed size is that of the stored pixels"
UNKNOWN = "image: EXIF orientation not applied, as no listed size says what boxes refer to (set orientation)"


def _phone(orientation, height=60, width=100):
    """A picture whose stored pixels have a white square at the top left, 20 pixels wide."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:20, :20] = 255
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    return stream.getvalue()


UPRIGHT_BOX = (40.0, 0.0, 59.0, 19.0)
"""The square of `_phone(6)` as shown: 100 high, 60 wide."""
STORED_BOX = (0.0, 0.0, 19.0, 19.0)


@pytest.mark.parametrize(
    ("listed", "rule", "boxes", "size", "note"),
    [
        ((100, 60), "auto", (UPRIGHT_BOX,), (100, 60), TURNED),
        ((60, 100), "auto", (STORED_BOX,), (60, 100), STORED),
        ((None, None), "auto", (STORED_BOX,), (60, 100), UNKNOWN),
        ((None, None), "auto", (), (100, 60), TURNED),
        ((60, 100), "auto", (), (60, 100), STORED),
        ((None, None), "upright", (UPRIGHT_BOX,), (100, 60), TURNED),
        ((None, None), "stored", (STORED_BOX,), (60, 100), None),
        ((100, 60), "upright", (UPRIGHT_BOX,), (100, 60), TURNED),
    ],
)
def test_boxes_lie_on_what_they_were_drawn_on(listed, rule, boxes, size, note):
    entry, report = Entry("7", "a.png", "detection", *listed, boxes=boxes, labels=(0,) * len(boxes)), Report()
    record = make_record(entry, lambda _: _phone(6), report, orientation=rule)
    assert record is not None and (record.height, record.width) == size
    assert report.noted == ({note: 1} if note else {}) and not report.dropped
    again = decode(encode(record), 1)
    assert again.orientation == (6 if note == TURNED else 1) and again.image == _phone(6), "the file is kept as it is"
    for x1, y1, x2, y2 in again.boxes.astype(int):
        assert decode_image(again)[y1 : y2 + 1, x1 : x2 + 1].min() == 255


@pytest.mark.parametrize(("orientation", "shape"), [(6, (80, 80)), (3, (60, 100)), (2, (60, 100))])
def test_a_listed_size_that_fits_both_is_noted_and_an_option_decides(orientation, shape):
    entry = Entry("7", "a.png", "detection", *shape, boxes=((0.0, 0.0, 19.0, 19.0),), labels=(0,))
    rules: list[tuple[Orientation, str | None, int]] = [
        ("auto", UNKNOWN, 1), ("upright", TURNED, orientation), ("stored", None, 1)
    ]  # fmt: skip
    for rule, note, applied in rules:
        report = Report()
        record = make_record(entry, lambda _: _phone(orientation, *shape), report, orientation=rule)
        assert record is not None and record.orientation == applied
        assert report.noted == ({note: 1} if note else {})


@pytest.mark.parametrize(("rule", "words"), [("stored", "does not apply"), ("upright", "applies")])
def test_a_size_that_fits_neither_names_the_orientation(rule, words):
    report = Report()
    listed = (100, 60) if rule == "stored" else (60, 100)
    assert make_record(Entry("7", "a.png", "detection", *listed), lambda _: _phone(6), report, orientation=rule) is None
    found = report.first["image: size differs"]
    assert f"EXIF orientation 6, which --orientation={rule} {words}" in found and f"listed {listed}" in found


def test_records_without_an_orientation_have_the_bytes_of_before():
    entry = Entry("7", "a.png", "detection", 60, 100)
    record = make_record(entry, lambda _: _phone(1), Report())
    assert record is not None and b"orientation" not in encode(record)


def test_what_a_decoder_raises_is_a_drop_with_the_same_text_every_time():
    broken = io.BytesIO()
    Image.new("RGB", (320, 240), "red").save(broken, "AVIF")
    files = {"a": broken.getvalue()[:96] + bytes(16) + broken.getvalue()[112:], "b": b"<html>no</html>", "c": b""}
    texts = []
    for _ in range(2):
        read = {f"{name}.jpg": data for name, data in files.items()}.__getitem__
        report = Report()
        assert [make_record(Entry(n, f"{n}.jpg", "detection"), read, report) for n in files] == [None] * 3
        assert report.dropped == {"image: cannot be decoded": 2, "image: file empty": 1}
        texts.append(report.first)
    assert texts[0] == texts[1] and not any("0x" in text or "BytesIO" in text for text in texts[0].values())
