"""The record: one stored example, of the same type for detection, grounding, pseudo-labelled and caption data.

Boxes are xyxy in pixels of the decoded image with inclusive corners, as in the original GLIP: a box of w x h pixels has
x2 = x + w - 1. Targets, flips and clipping use such boxes (glip-reference 0.5).

On disk a record is a MessagePack map; boxes are little-endian float32.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import msgpack
import numpy as np
from jaxtyping import Float32, UInt8

from glip_jax import UserError
from glip_jax.io import image_files

__all__ = [
    "FORMAT", "Kind", "Record", "RecordError", "boxes_array", "content_hash", "decode", "decode_image",
    "encode", "validate",
]  # fmt: skip

FORMAT = 1
"""Version of the encoding, stored in every record and manifest."""


Kind = Literal["detection", "grounding", "pseudo", "caption"]
"""Kind of annotation of a record.

detection: boxes with category names; grounding: a caption whose phrases have boxes, annotated by people; pseudo: the same,
labelled by a teacher; caption: a caption without boxes. Caption records are not for training, where every word would count as
absent: the job `label` turns them into pseudo records.
"""
Spans = tuple[tuple[int, int], ...]

_KEYS = ("format", "id", "kind", "image", "height", "width", "boxes", "categories", "caption", "spans", "scores")


class RecordError(UserError, ValueError):
    """An unreadable or invalid record; the message names the record and the field."""


@dataclass(frozen=True, eq=False)
class Record:
    """One image with its boxes and their names or phrases."""

    id: str
    """Identifies the image (or image and caption) in its source, also in error messages."""
    kind: Kind
    image: bytes
    """The unchanged image file, of any format that `image_files.decode` reads."""
    height: int
    width: int
    boxes: Any
    """Float32[N 4]: xyxy, inclusive pixels of the decoded image."""
    categories: tuple[int, ...] = ()
    """Detection: per box an index into the names of the manifest."""
    caption: str = ""
    """All kinds but detection: the unchanged text."""
    spans: tuple[Spans, ...] = ()
    """Grounding and pseudo: per box the (begin, end) character spans of its phrase, end exclusive."""
    scores: tuple[float, ...] = ()
    """Pseudo: per box the score of the teacher in (0, 1]."""
    known_absent: tuple[str, ...] | None = None
    """Names that are known to be absent from the image. None: for detection every name without a box is absent (exhaustive
    labels); for other kinds nothing is known."""
    not_exhaustive: tuple[str, ...] = ()
    """Names with instances in the image that have no box (a crowd, a group, incomplete annotation)."""
    unknown: tuple[Spans, ...] = ()
    """Grounding and pseudo: unlabelled phrases of the caption (not annotated, or not detected by a teacher). They give no loss
    at anchors without a box."""
    provenance: str = ""
    """Pseudo: the teacher that predicted the boxes; otherwise the annotation file."""
    file: str = ""
    """Captions: path of the image below its folder, with which detections of other tools are matched; "" if unknown."""
    image_id: str = ""
    """Captions: id of the image in an annotation file that numbers its images."""
    orientation: int = 1
    """EXIF orientation that decoding applies to `image`, 1: none. `height`, `width` and `boxes` are of the pixels after it."""


def validate(record: Record, names: int | None = None) -> Record:
    """Returns `record` if it is valid, otherwise raises RecordError. `names`: number of names of the source."""

    def need(fits: bool, field: str, message: str) -> None:
        if not fits:
            raise RecordError(f"record {record.id!r}, field {field}: {message}")

    boxes, kind, count = record.boxes, record.kind, len(record.boxes)
    need(
        record.height > 0 and record.width > 0, "height/width", f"is {record.height} x {record.width}, expected pixels"
    )
    need(len(record.image) > 0, "image", "is empty")
    need(record.orientation in range(1, 9), "orientation", f"is {record.orientation}, expected 1 to 8")
    shaped = isinstance(boxes, np.ndarray) and boxes.dtype == np.float32 and boxes.shape == (count, 4)
    # Formatting a dtype takes longer than all other checks, and every training example is validated.
    found = "" if shaped else f"{getattr(boxes, 'dtype', type(boxes))} of shape {np.shape(boxes)}"
    need(shaped, "boxes", f"is {found}, expected float32 [N, 4]")
    inside = bool(((boxes >= 0) & (boxes <= np.array([record.width, record.height] * 2) - 1)).all())
    need(inside or bool(np.isfinite(boxes).all()), "boxes", "has a value that is not finite")
    need(inside, "boxes", f"has a box outside the image of {record.height} x {record.width}")
    need(bool((boxes[:, 2:] > boxes[:, :2]).all()), "boxes", "has a box without area (x2 <= x1 or y2 <= y1)")
    if kind == "detection":
        need(len(record.categories) == count, "categories", f"has {len(record.categories)} entries for {count} boxes")
        need(not record.spans and not record.caption, "caption", "is set in a detection record, which has none")
        need(not record.unknown, "unknown", "is set in a detection record, which has no phrases")
        beyond = [c for c in record.categories if c < 0 or (names is not None and c >= names)]
        need(not beyond, "categories", f"has the index {beyond[:1]}, the source has {names} names")
    else:
        need(len(record.spans) == count, "spans", f"has {len(record.spans)} entries for {count} boxes")
        need(not record.categories, "categories", f"is set in a {kind} record, which has none")
        need(kind != "caption" or not count, "boxes", f"has {count} boxes in a caption record, which has none")
        need(kind != "caption" or bool(record.caption.strip()), "caption", "is empty in a caption record")
        phrases = [("spans", f"of box {box}", spans) for box, spans in enumerate(record.spans)]
        phrases += [("unknown", f"of phrase {number}", spans) for number, spans in enumerate(record.unknown)]
        for field, whose, spans in phrases:
            need(len(spans) > 0, field, f"{whose} is empty")
            for begin, end in spans:
                fits = 0 <= begin < end <= len(record.caption)
                need(fits, field, f"{whose} has ({begin}, {end}) in a caption of {len(record.caption)} characters")
    need(
        len(record.scores) == (count if kind == "pseudo" else 0),
        "scores", f"has {len(record.scores)} entries for {count} boxes of a {kind} record",
    )  # fmt: skip
    need(all(0 < score <= 1 for score in record.scores), "scores", "has a value outside (0, 1]")
    return record


def encode(record: Record) -> bytes:
    """Validates the record and encodes it."""
    validate(record)
    fields = msgpack.packb(
        {
            "format": FORMAT,
            "id": record.id,
            "kind": record.kind,
            "image": record.image,
            "height": record.height,
            "width": record.width,
            "boxes": np.ascontiguousarray(record.boxes, "<f4").tobytes(),
            "categories": list(record.categories),
            "caption": record.caption,
            "spans": [[list(span) for span in spans] for spans in record.spans],
            "scores": list(record.scores),
            "known_absent": None if record.known_absent is None else list(record.known_absent),
            "not_exhaustive": list(record.not_exhaustive),
            "unknown": [[list(span) for span in spans] for spans in record.unknown],
            "provenance": record.provenance,
            **{key: value for key in ("file", "image_id") if (value := getattr(record, key))},
        }
        | ({} if record.orientation == 1 else {"orientation": record.orientation})
    )
    return cast(bytes, fields)


def decode(data: bytes, names: int | None = None) -> Record:
    """Decodes and validates a record; raises RecordError."""
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise RecordError(f"a record of {len(data)} bytes is not MessagePack ({error})") from None
    if not isinstance(fields, dict):
        raise RecordError(f"a record holds a {type(fields).__name__}, expected a map of fields")
    identity = fields.get("id", "(no id)")
    missing = [key for key in _KEYS if key not in fields]
    if missing:
        raise RecordError(f"record {identity!r} lacks the fields {', '.join(missing)}")
    if fields["format"] != FORMAT:
        raise RecordError(
            f"record {identity!r} has format {fields['format']}, this version reads {FORMAT}: import again"
        )
    if fields["kind"] not in get_args(Kind):
        kinds = ", ".join(get_args(Kind))
        raise RecordError(f"record {identity!r}, field kind: is {fields['kind']!r}, expected one of {kinds}")
    try:
        absent = fields.get("known_absent")
        record = Record(
            id=str(identity),
            kind=cast(Kind, fields["kind"]),
            image=bytes(fields["image"]),
            height=int(fields["height"]),
            width=int(fields["width"]),
            boxes=np.frombuffer(fields["boxes"], "<f4").reshape(-1, 4).astype(np.float32),
            categories=tuple(int(c) for c in fields["categories"]),
            caption=str(fields["caption"]),
            spans=_phrases(fields["spans"]),
            scores=tuple(float(s) for s in fields["scores"]),
            known_absent=None if absent is None else tuple(str(name) for name in absent),
            not_exhaustive=tuple(str(name) for name in fields.get("not_exhaustive", ())),
            unknown=_phrases(fields.get("unknown", ())),
            provenance=str(fields.get("provenance", "")),
            file=str(fields.get("file", "")),
            image_id=str(fields.get("image_id", "")),
            orientation=int(fields.get("orientation", 1)),
        )
    except (TypeError, ValueError) as error:
        raise RecordError(f"record {identity!r} has a field of the wrong type ({error})") from None
    return validate(record, names)


def _phrases(raw: Any) -> tuple[Spans, ...]:
    """Spans as nested tuples, from the lists that MessagePack returns."""
    return tuple(tuple((int(begin), int(end)) for begin, end in spans) for spans in raw)


def decode_image(record: Record) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels that the boxes refer to: as stored, unless the record has an orientation.

    Raises RecordError if the bytes are not a readable image of the size that the record states.
    """
    try:
        pixels = image_files.turn(image_files.decode(record.image).pixels, record.orientation)
    except image_files.ImageFileError as error:
        raise RecordError(f"record {record.id!r}, field image: {error.reason}") from None
    if pixels.shape != (record.height, record.width, 3):
        raise RecordError(
            f"record {record.id!r}, field image: is {pixels.shape[0]} x {pixels.shape[1]}, "
            f"height and width say {record.height} x {record.width}"
        )
    return pixels


def content_hash(image: bytes) -> int:
    """First eight bytes of the SHA-256 of the image file as an unsigned integer; identifies duplicates and excluded images."""
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "big")


def boxes_array(boxes: Sequence[Sequence[float | int]]) -> Float32[np.ndarray, "N 4"]:
    """Boxes as an array, also for an empty list."""
    return np.asarray(boxes, np.float32).reshape(-1, 4)
