"""Records: encoding round trip, and errors that name the record and the field."""

import dataclasses
import io

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glip_jax.data.records import Record, RecordError, boxes_array, content_hash, decode, decode_image, encode


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 77, np.uint8)).save(file, "PNG")
    return file.getvalue()


DETECTION = Record("17", "detection", png(8, 9), 8, 9, boxes_array([(0, 1, 8, 7)]), (2,), known_absent=("dog",))
GROUNDING = Record("g", "grounding", png(8, 9), 8, 9, boxes_array([(0, 1, 2, 3)]), caption="a cat", spans=(((2, 5),),))
PSEUDO = dataclasses.replace(
    GROUNDING, kind="pseudo", scores=(0.5,), unknown=(((0, 1), (2, 4)),), provenance="teacher 3"
)
CAPTION = Record("c", "caption", png(8, 9), 8, 9, boxes_array([]), caption="a cat")


def same(one: Record, other: Record) -> bool:
    left, right = dataclasses.asdict(one), dataclasses.asdict(other)
    return np.array_equal(left.pop("boxes"), right.pop("boxes")) and left == right


@pytest.mark.parametrize("record", [DETECTION, GROUNDING, PSEUDO, CAPTION], ids=lambda r: r.kind)
def test_round_trip(record: Record) -> None:
    back = decode(encode(record))
    assert same(back, record)
    assert back.boxes.dtype == np.float32
    assert decode_image(back).shape == (8, 9, 3)
    assert decode_image(back)[0, 0].tolist() == [77, 77, 77]


@given(st.integers(0, 6), st.text(min_size=1, max_size=20), st.data())
def test_round_trip_of_any_caption_and_number_of_boxes(count: int, caption: str, data: st.DataObject) -> None:
    spans = []
    for _ in range(count):
        begin = data.draw(st.integers(0, len(caption) - 1))
        spans.append(((begin, data.draw(st.integers(begin + 1, len(caption)))),))
    boxes = boxes_array([(i, 0, i + 1.5, 7) for i in range(count)])
    record = Record("x", "grounding", b"?", 8, 9, boxes, caption=caption, spans=tuple(spans))
    assert same(decode(encode(record)), record)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (DETECTION, {"height": 0}, r"'17', field height/width"),
        (DETECTION, {"image": b""}, r"image: is empty"),
        (DETECTION, {"unknown": (((0, 1),),)}, r"unknown: is set in a detection record"),
        (GROUNDING, {"unknown": (((0, 1),), ())}, r"unknown: of phrase 1 is empty"),
        (GROUNDING, {"unknown": (((0, 6),),)}, r"unknown: of phrase 0 has \(0, 6\) in a caption of 5"),
        (DETECTION, {"boxes": boxes_array([(0, 1, np.nan, 7)])}, r"boxes: has a value that is not finite"),
        (DETECTION, {"boxes": boxes_array([(0, 1, 9, 7)])}, r"boxes: has a box outside"),
        (DETECTION, {"boxes": boxes_array([(-1, 1, 8, 7)])}, r"boxes: has a box outside"),
        (DETECTION, {"boxes": boxes_array([(3, 1, 3, 7)])}, r"boxes: has a box without area"),
        (DETECTION, {"boxes": np.zeros((1, 4))}, r"boxes: is float64"),
        (DETECTION, {"categories": (1, 2)}, r"categories: has 2 entries for 1"),
        (DETECTION, {"categories": (9,)}, r"categories: has the index \[9\], the source has 3"),
        (DETECTION, {"caption": "x"}, r"caption: is set in a detection"),
        (GROUNDING, {"spans": ()}, r"spans: has 0 entries"),
        (GROUNDING, {"spans": ((),)}, r"spans: of box 0 is empty"),
        (GROUNDING, {"spans": (((2, 6),),)}, r"spans: of box 0 has \(2, 6\) in a caption of 5"),
        (GROUNDING, {"categories": (1,)}, r"categories: is set in a grounding"),
        (PSEUDO, {"scores": ()}, r"scores: has 0 entries"),
        (PSEUDO, {"scores": (1.5,)}, r"scores: has a value outside"),
        (CAPTION, {"boxes": GROUNDING.boxes, "spans": GROUNDING.spans}, r"boxes: has 1 boxes in a caption record"),
        (CAPTION, {"caption": " "}, r"caption: is empty in a caption record"),
    ],
)
def test_errors_name_record_and_field(base: Record, change: dict, message: str) -> None:
    from glip_jax.data.records import validate

    with pytest.raises(RecordError, match=message):
        validate(dataclasses.replace(base, **change), names=3)


def test_invalid_bytes_are_refused() -> None:
    good = msgpack.unpackb(encode(DETECTION))
    for data, message in [
        (b"\xc1", "not MessagePack"),
        (encode(DETECTION)[:-9], "not MessagePack"),
        (msgpack.packb([1]), "holds a list"),
        (msgpack.packb({"id": "17", "format": 1}), "'17' lacks the fields kind, image"),
        (msgpack.packb(good | {"format": 9}), "'17' has format 9, this version reads 1"),
        (msgpack.packb(good | {"kind": "box"}), "'17', field kind: is 'box', expected one of detection"),
        (msgpack.packb(good | {"boxes": b"123"}), "'17' has a field of the wrong type"),
        (msgpack.packb(good | {"spans": [[1]]}), "'17' has a field of the wrong type"),
    ]:
        with pytest.raises(RecordError, match=message):
            decode(data)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(RecordError, match=r"'17', field image: cannot be decoded"):
        decode_image(dataclasses.replace(DETECTION, image=DETECTION.image[:40]))
    with pytest.raises(RecordError, match=r"image: is 8 x 9, height and width say 8 x 10"):
        decode_image(dataclasses.replace(DETECTION, width=10))


def test_content_hash_is_of_the_bytes() -> None:
    # First 8 bytes of SHA-256("abc"), FIPS 180-2.
    assert content_hash(b"abc") == 0xBA7816BF8F01CFEA
