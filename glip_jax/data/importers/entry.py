"""The common representation of annotations, `Entry`, and its conversion to records with the checks that all formats share.

An importer streams `Entry` objects: ids, boxes and texts without the image. `make_record` reads the image, compares it with
the entry, clips the boxes and creates the `Record`. Invalid images, boxes and spans are dropped and counted by reason; only
an error of the whole file stops the import, or, in strict mode, the first drop.

Boxes are converted from xywh to xyxy as in the original GLIP: x2 = x + max(w - 1, 0), y2 = y + max(h - 1, 0), clipped to
[0, W - 1] x [0, H - 1], and dropped if x2 <= x1 or y2 <= y1. A box with a side of at most one pixel therefore has no area.
"""

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any

from etils import epath

from glip_jax import UserError
from glip_jax.config import Orientation
from glip_jax.data.records import Kind, Record, Spans, boxes_array, content_hash
from glip_jax.io import gcs
from glip_jax.io.formats import explain
from glip_jax.io.image_files import PIXEL_LIMIT, ImageFileError, applied_orientation, decode, turn
from glip_jax.io.paths import OutsideError, within

__all__ = [
    "Box",
    "Entry",
    "ImageFolder",
    "ImportSource",
    "Report",
    "SourceError",
    "checked_spans",
    "make_record",
    "from_xywh",
    "image_folder",
    "as_numbers",
    "one_line",
    "pack",
    "unpack",
]

Box = tuple[float, float, float, float]

_PART = re.compile(r"(.+)#(\d+)\+(\d+)(;base64)?", re.DOTALL)


class SourceError(UserError, ValueError):
    """An error of a whole annotation file, or any drop in strict mode. The message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, 1000))


def one_line(text: str, max_length: int = 500) -> str:
    """`text` as one printable line: escapes line breaks, control characters and lone surrogates, and shortens the middle."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= max_length else f"{text[: max_length // 2]} ... {text[-max_length // 2 :]}"


@dataclass(frozen=True)
class Report:
    """Counts of an import by reason; filled while entries and records are produced."""

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """Dropped items by 'item: reason', e.g. 'box: no area'."""
    first: dict[str, str] = field(default_factory=dict)
    """The first example of each reason."""
    noted: Counter[str] = field(default_factory=Counter)
    """Remarks on kept items, e.g. 'box: cut at the edge of the image'; the first example is in `first`."""
    strict: bool = False

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Counts dropped items; with `strict` raises SourceError instead. A count of 0 does nothing."""
        if not count:
            return
        if self.strict:
            raise SourceError(f"{reason} ({example}); without --strict it would be dropped and counted")
        self.dropped[reason] += count
        self.first.setdefault(reason, one_line(example))

    def note(self, what: str, example: str, count: int = 1) -> None:
        """Counts kept items that the report should mention."""
        if count:
            self.noted[what] += count
            self.first.setdefault(what, one_line(example))

    def merge(self, other: "Report") -> None:
        """Adds the counts of a later part of the import."""
        self.kept.update(other.kept)
        self.dropped.update(other.dropped)
        self.noted.update(other.noted)
        for reason, example in other.first.items():
            self.first.setdefault(reason, example)


@dataclass(frozen=True)
class Entry:
    """The annotations of one example, before its image is read."""

    id: str
    """Id of the image (or image and caption) in its source; used in messages."""
    image: str
    """What `ImportSource.images` reads: a path below the image folder, or `FILE#offset+length` for a part of a file there (tar),
    or `FILE#offset+length;base64` (a column of a TSV row)."""
    kind: Kind
    height: int | None = None
    """Height in pixels as listed; None if the format does not list it."""
    width: int | None = None
    boxes: tuple[Box, ...] = ()
    """xyxy in inclusive pixels, not clipped; with `relative` fractions of width and height, x2 and y2 exclusive."""
    relative: bool = False
    labels: tuple[int, ...] = ()
    """Detection: for each box an index into `ImportSource.names`."""
    caption: str = ""
    """Grounding and pseudo: the unmodified text."""
    spans: tuple[Spans, ...] = ()
    """Grounding and pseudo: for each box the validated (begin, end) character spans of its phrase."""
    scores: tuple[float, ...] = ()
    """Pseudo: for each box the teacher's score."""
    known_absent: tuple[str, ...] | None = None
    """Names of categories that are known to be absent from the image; None: see `Record.known_absent`."""
    not_exhaustive: tuple[str, ...] = ()
    """Names of categories with instances that have no box (crowds, groups, incomplete annotation)."""
    unknown: tuple[Spans, ...] = ()
    """Grounding: validated spans of phrases that are listed without a box."""
    ids: tuple[str, ...] = ()
    """Per box the annotation's id, for messages; empty: boxes are numbered."""
    provenance: str = ""
    file: str = ""
    """`Record.file`."""
    image_id: str = ""
    """`Record.image_id`."""

    def where(self, box: int | None = None) -> str:
        """Description of the image or box, for messages."""
        if box is None:
            return f"image {self.id}, {self.image}"
        return f"annotation {self.ids[box] if self.ids else f'{box} (counted from 0)'} of image {self.id}"


@dataclass(frozen=True)
class ImportSource:
    """A validated annotation file; its entries can be iterated once."""

    entries: Iterator[Entry]
    images: Callable[[str], bytes]
    """Returns the bytes of `Entry.image`; raises OSError. Must be picklable, as it is sent to worker processes."""
    report: Report
    """Filled while the entries are iterated."""
    names: tuple[str, ...] = ()
    """Category names; empty for grounding."""
    count: int | None = None
    """Number of entries, if known, for the estimate of the time left."""
    inputs: tuple[epath.Path, ...] = ()
    """The annotation files (or folders of small files); their hashes are recorded in the report."""
    expected: str = ""
    """Name of the published data set in gcs/manifests, if the format implies it."""


@dataclass(frozen=True)
class ImageFolder:
    """Reads images below a folder, also from files that contain several: see `Entry.image`."""

    path: epath.Path

    def __call__(self, image: str) -> bytes:
        """The bytes of an image; OSError if the file or the part of it does not exist, OutsideError if it is not below the folder."""
        part = _PART.fullmatch(image)
        if part is None:
            path = within(self.path, image)
            return gcs.read(path) if gcs.is_remote(path) else path.read_bytes()
        begin, length = int(part[2]), int(part[3])
        with gcs.open_file(within(self.path, part[1]), max(1, length)) as file:
            if begin + length > file.seek(0, 2):
                raise OSError(f"{part[1]} ends within the image")
            file.seek(begin)
            data = file.read(length)
        if part[4] is None:
            return data
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise OSError(f"not base64: {error}") from None


def image_folder(images: epath.PathLike) -> ImageFolder:
    """The reader of an image folder; SourceError if the folder is missing or empty."""
    folder = epath.Path(images)
    kind = gcs.kind(images)
    if kind == "file":
        found = explain(images)
        raise SourceError(
            f"the image folder {folder} is a file{f', it {found}' if found else ''}: set --images to a folder"
        )
    if not kind:
        raise SourceError(f"the image folder {folder} does not exist or is not a folder: set --images")
    if not gcs.is_remote(images) and next(iter(folder.iterdir()), None) is None:
        raise SourceError(f"the image folder {folder} is empty: set --images to the folder of the images")
    return ImageFolder(folder)


def as_numbers(raw: Any, count: int) -> tuple[float, ...] | None:
    """`raw` as floats if it is a list of `count` numbers (booleans excluded), else None.

    Integers beyond the range of float become inf. The texts "NaN", "Infinity" and "-Infinity", as which `JsonFile` returns
    Python's numbers of that name, are converted.
    """
    if not isinstance(raw, list | tuple) or len(raw) != count:
        return None
    values = []
    for value in raw:
        if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            values.append(float(value))
        except OverflowError:
            values.append(math.inf)
    return tuple(values)


def from_xywh(raw: Any, report: Report, where: str) -> Box | None:
    """Converts [x, y, w, h] in pixels to inclusive xyxy, not clipped; None, counted in `report`, if the values are not four
    finite numbers or the box has no area.
    """
    values = as_numbers(raw, 4)
    if values is None:
        report.drop("box: not four numbers", f"{where}, {raw!r:.60}")
        return None
    x, y, w, h = values
    where = f"{where}, xywh {x:g} {y:g} {w:g} {h:g}"
    if not all(map(math.isfinite, values)):
        report.drop("box: not finite", where)
        return None
    if w <= 1 or h <= 1:
        report.drop("box: no area", where)
        return None
    return x, y, x + w - 1, y + h - 1


def checked_spans(raw: Any, caption: str, report: Report, where: str) -> Spans:
    """The valid (begin, end) character spans of a box, end exclusive, that cover text of `caption`.

    Invalid spans are dropped and counted. If none is left, the box is counted too, and the empty tuple is returned.
    """
    if not isinstance(raw, list | tuple) or not raw:
        report.drop("box: no span", where)
        return ()
    spans = []
    for span in raw:
        is_pair = isinstance(span, list | tuple) and len(span) == 2
        if not is_pair or not all(isinstance(v, int) and not isinstance(v, bool) for v in span):
            report.drop("span: not two integers", f"{where}, {span!r:.40}")
            continue
        begin, end = span
        found = f"{where}, ({begin}, {end}) in {len(caption)} characters"
        if begin < 0 or not 0 <= end <= len(caption):
            report.drop("span: beyond the caption", found)
        elif not caption[begin:end].strip():
            report.drop("span: to no token", found)
        else:
            spans.append((begin, end))
    if not spans:
        report.drop("box: no span left", where)
    return tuple(spans)


def pack(entry: Entry) -> str:
    """The entry as a line of JSON, which can represent all content of annotation files (MessagePack refuses integers beyond
    64 bits and lone surrogates).
    """
    return json.dumps([getattr(entry, name) for name in _FIELDS], separators=(",", ":"))


def unpack(line: str) -> Entry:
    """The entry that `pack` wrote."""
    return Entry(**dict(zip(_FIELDS, map(_as_tuples, json.loads(line)))))


_FIELDS = tuple(item.name for item in fields(Entry))


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def make_record(
    entry: Entry, read_image: Callable[[str], bytes], report: Report, excluded: Set[int] = frozenset(),
    orientation: Orientation = "auto",
) -> Record | None:  # fmt: skip
    """Creates the record of `entry`; returns None if it is dropped, with the reason and its boxes counted in `report`.

    Boxes are clipped; boxes without area, outside the image or duplicated (same text, same coordinates) are dropped and
    counted. `excluded`: content hashes of images that must not become records. `orientation`: what boxes refer to in an image
    with an EXIF orientation; see `image_files.applied_orientation`.
    """
    image = None
    if entry.kind != "detection" and not entry.caption.strip():
        report.drop("image: caption empty", entry.where())
    elif not _is_text(entry.caption):
        report.drop("image: caption is no Unicode", entry.where())
    elif _size_fits(entry, report):
        image = _load_image(entry, read_image, report, orientation)
        if image is not None and content_hash(image[0]) in excluded:
            report.drop("image: excluded", entry.where())
            image = None
    if image is None:
        report.drop("box: image dropped", entry.where(), len(entry.boxes))
        return None
    data, height, width, turned = image
    boxes, kept = _kept_boxes(entry, height, width, report)

    def of_kept(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[i] for i in kept) if values else ()

    report.kept.update(images=1, boxes=len(kept))
    if entry.kind != "detection":
        report.kept["phrases"] += len(set(of_kept(entry.spans)))
    return Record(
        id=_printable(entry.id), kind=entry.kind, image=data, height=height, width=width,
        boxes=boxes_array(boxes), categories=of_kept(entry.labels), caption=entry.caption,
        spans=of_kept(entry.spans), scores=of_kept(entry.scores), known_absent=entry.known_absent,
        not_exhaustive=entry.not_exhaustive, unknown=_without_box(entry, kept), provenance=entry.provenance,
        file=_printable(entry.file), image_id=_printable(entry.image_id), orientation=turned,
    )  # fmt: skip


def _printable(text: str) -> str:
    """The text with lone surrogates, which cannot be stored, escaped."""
    return text.encode(errors="backslashreplace").decode()


def _without_box(entry: Entry, kept: Sequence[int]) -> tuple[Spans, ...]:
    """Phrases without a box: those listed without one, and those whose boxes were all dropped."""
    boxed = {entry.spans[i] for i in kept} if entry.spans else set()
    return tuple(dict.fromkeys(spans for spans in (*entry.unknown, *entry.spans) if spans not in boxed))


def _is_text(text: str) -> bool:
    """Whether the text can be encoded: JSON may contain lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size_fits(entry: Entry, report: Report) -> bool:
    """Whether the listed size, if any, is one that an image may have; counts a drop otherwise."""
    if entry.height is None or entry.width is None:
        return True
    where = f"{entry.where()}, listed {entry.height} x {entry.width}"
    if entry.height <= 0 or entry.width <= 0:
        report.drop("image: no size", where)
    elif entry.height * entry.width > PIXEL_LIMIT:
        report.drop("image: too large", f"{where}: more than {PIXEL_LIMIT:,} pixels")
    else:
        return True
    return False


def _load_image(
    entry: Entry, read_image: Callable[[str], bytes], report: Report, rule: Orientation
) -> tuple[bytes, int, int, int] | None:
    """Bytes, height and width of the image, and the orientation to apply (1: none); None, counted, if it cannot be decoded or
    does not have the listed size.
    """
    where = entry.where()
    try:
        data = read_image(entry.image)
    except gcs.StorageError:
        raise  # not an error of the image
    except OutsideError:
        report.drop("image: path leads out of the image folder", where)
        return None
    except FileNotFoundError:
        report.drop("image: file missing", where)
        return None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        report.drop("image: file unreadable", f"{where}, {getattr(error, 'strerror', None) or error}")
        return None
    try:
        image = decode(data)
    except ImageFileError as error:
        reason = {"empty": "image: file empty", "large": "image: too large"}.get(error.kind, "image: cannot be decoded")
        report.drop(reason, f"{where} {error.reason}")
        return None
    listed = (entry.height, entry.width)
    orientation, note = applied_orientation(image, listed, rule, bool(entry.boxes))
    height, width = turn(image.pixels, orientation).shape[:2]
    if None not in listed and (height, width) != listed:
        exif = (
            f" and EXIF orientation {image.orientation}, which --orientation={rule} " if image.orientation != 1 else ""
        )
        exif += "applies" if exif and orientation != 1 else "does not apply" if exif else ""
        report.drop("image: size differs", f"{where} is {image.pixels.shape[:2]}{exif}, listed {listed}")
        return None
    for what in (*image.notes, *([note] if note else [])):
        report.note(what, where)
    return data, height, width, orientation


def _kept_boxes(entry: Entry, height: int, width: int, report: Report) -> tuple[list[Box], list[int]]:
    """The clipped boxes that are kept, and their indices in the entry; the others are counted."""
    boxes: list[Box] = []
    kept: list[int] = []
    seen = set()
    for i, box in enumerate(entry.boxes):
        if entry.relative:
            box = (box[0] * width, box[1] * height, box[2] * width - 1, box[3] * height - 1)
        where = f"{entry.where(i)}, xyxy {' '.join(f'{v:g}' for v in box)}"
        score = entry.scores[i] if entry.scores else 1
        if not all(map(math.isfinite, box)):
            report.drop("box: not finite", where)
        elif not 0 < score <= 1:
            report.drop("box: score outside (0, 1]", f"{where}, score {score!r}")
        elif box[2] <= box[0] or box[3] <= box[1]:
            report.drop("box: no area", where)
        else:
            x1, x2 = (min(max(v, 0.0), width - 1.0) for v in box[::2])
            y1, y2 = (min(max(v, 0.0), height - 1.0) for v in box[1::2])
            # Converted to float32 as stored: a very thin box may lose its area.
            stored = tuple(boxes_array([(x1, y1, x2, y2)])[0].tolist())
            key = (stored, entry.labels[i] if entry.labels else entry.spans[i] if entry.spans else None)
            if stored[2] <= stored[0] or stored[3] <= stored[1]:
                report.drop("box: outside the image", f"{where} in {height} x {width}")
            elif key in seen:
                report.drop("box: there twice", where)
            else:
                # Up to a pixel is considered rounding of the annotation tool.
                if box[0] < -1 or box[1] < -1 or box[2] > width or box[3] > height:
                    report.note("box: cut at the edge of the image", f"{where} in {height} x {width}")
                seen.add(key)
                boxes.append((x1, y1, x2, y2))
                kept.append(i)
    return boxes, kept
