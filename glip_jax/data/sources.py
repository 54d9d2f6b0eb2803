"""Importers: foreign annotation files become records.

COCO detection JSON (also LVIS: `neg_category_ids` are kept as known absent) and MDETR-form grounding JSON
(glip-reference 4.3, 4.4). A single bad image, box or span is dropped and counted by reason; only a fault of the whole
file stops the import, or, with `strict`, the first drop.

Boxes: xywh becomes xyxy as in the original, x2 = x + max(w - 1, 0), y2 = y + max(h - 1, 0), clipped to
[0, W - 1] x [0, H - 1], dropped if x2 <= x1 or y2 <= y1. So a box less than a pixel beyond one in size has no area.
"""

import io
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from etils import epath
from PIL import Image

from glip_jax.data.records import PIXEL_LIMIT, Record, Spans, boxes_array
from glip_jax.prompts import clean_name

__all__ = ["Report", "Source", "SourceError", "coco", "mdetr"]


class SourceError(ValueError):
    """A fault of a whole annotation file, or any drop in strict mode."""


@dataclass(frozen=True)
class Report:
    """What an import kept and what it dropped, by reason; fills while the records are drawn."""

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """By 'thing: reason', e.g. 'box: no area'."""
    first: dict[str, str] = field(default_factory=dict)
    """The first example of each reason."""
    strict: bool = False

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Counts a drop; with `strict` raises SourceError instead."""
        if self.strict:
            raise SourceError(f"{reason} ({example}); without --strict it would be dropped and counted")
        self.dropped[reason] += count
        self.first.setdefault(reason, example)

    def table(self) -> str:
        """Kept and dropped as aligned lines."""
        rows = [("kept " + thing, count, "") for thing, count in self.kept.items()]
        rows += [("dropped " + reason, n, "first: " + self.first[reason]) for reason, n in sorted(self.dropped.items())]
        if not self.dropped:
            rows.append(("dropped", 0, ""))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:<{width}}  {count:>8}  {example}".rstrip() for name, count, example in rows)


class Source(NamedTuple):
    """An opened annotation file."""

    names: tuple[str, ...]
    """Category names, in order of category id; empty for grounding."""
    images: int
    """Entries of `images`: an upper bound of the records."""
    records: Iterator[Record]
    report: Report


def coco(
    annotations: epath.PathLike,
    images: epath.PathLike,
    *,
    rename: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Source:
    """Detection records of a COCO JSON, one per image, images without boxes included.

    `rename` gives prompt text for category names that mean nothing, e.g. {"RBC": "red blood cell"}. A category
    `__background__` is left out. Faults that raise SourceError: no JSON, a missing key, duplicated ids or names, a
    name that cannot be prompted, a folder of images that is missing or empty.
    """
    path, folder = epath.Path(annotations), _image_folder(images)
    data = _load(path, ("images", "annotations", "categories"))
    entries = _images(data["images"], path, ("id", "file_name", "height", "width"))
    categories = _by_id(data["categories"], path, "categories", ("id", "name"))
    named = {i: str(c["name"]) for i, c in sorted(categories.items()) if c["name"] != "__background__"}
    unknown = sorted(set(rename or {}) - set(named.values()))
    if unknown:
        raise SourceError(f"{path}: the rename map has {unknown[0]!r}, no category has that name")
    named = {i: (rename or {}).get(name, name) for i, name in named.items()}
    _check_names(named, path)
    index = {identity: i for i, identity in enumerate(named)}
    report = Report(strict=strict)
    by_image = _annotations(data["annotations"], path, entries, report)

    def records() -> Iterator[Record]:
        for identity, entry in entries.items():
            if not _sized(entry, report, len(by_image[identity])):
                continue
            boxes, labels = [], []
            for note in by_image[identity]:
                where = f"annotation {note.get('id', '(no id)')} of image {identity}"
                if note.get("iscrowd"):
                    report.drop("box: crowd", where)
                elif note.get("category_id") not in index:
                    report.drop("box: category not listed", f"{where}, category {note.get('category_id')}")
                elif (box := _box(note, entry, report, where)) is not None:
                    boxes.append(box)
                    labels.append(index[note["category_id"]])
            if (image := _image(folder, entry, report)) is None:
                report.drop("box: image dropped", f"image {identity}", len(boxes)) if boxes else None
                continue
            negatives = entry.get("neg_category_ids")
            report.kept.update(images=1, boxes=len(boxes))
            yield Record(
                id=str(identity), kind="detection", image=image, height=entry["height"], width=entry["width"],
                boxes=boxes_array(boxes), categories=tuple(labels), provenance=path.name,
                known_absent=None if negatives is None else tuple(named[i] for i in negatives if i in named),
            )  # fmt: skip

    return Source(tuple(named.values()), len(entries), records(), report)


def mdetr(annotations: epath.PathLike, images: epath.PathLike, *, strict: bool = False) -> Source:
    """Grounding records of an MDETR-form JSON, one per entry of `images` (one caption each).

    `tokens_positive` of an annotation (`tokens`, where present, takes precedence) are character spans of the caption,
    end exclusive. A span that leaves the caption or covers only white space goes to no token and is dropped, a box
    without any span left too. Faults as for `coco`.
    """
    path, folder = epath.Path(annotations), _image_folder(images)
    data = _load(path, ("images", "annotations"))
    entries = _images(data["images"], path, ("id", "file_name", "height", "width", "caption"))
    report = Report(strict=strict)
    by_image = _annotations(data["annotations"], path, entries, report)

    def records() -> Iterator[Record]:
        for identity, entry in entries.items():
            if not _sized(entry, report, len(by_image[identity])):
                continue
            caption = str(entry["caption"])
            boxes, phrases = [], []
            for note in by_image[identity]:
                where = f"annotation {note.get('id', '(no id)')} of image {identity}"
                if note.get("iscrowd"):
                    report.drop("box: crowd", where)
                elif (spans := _spans(note, caption, report, where)) and (
                    box := _box(note, entry, report, where)
                ) is not None:
                    boxes.append(box)
                    phrases.append(spans)
            if not caption.strip():
                report.drop("image: caption empty", f"image {identity}")
            elif (image := _image(folder, entry, report)) is not None:
                report.kept.update(images=1, boxes=len(boxes))
                yield Record(
                    id=str(identity), kind="grounding", image=image, height=entry["height"], width=entry["width"],
                    boxes=boxes_array(boxes), caption=caption, spans=tuple(phrases), provenance=path.name,
                )  # fmt: skip
                continue
            report.drop("box: image dropped", f"image {identity}", len(boxes)) if boxes else None

    return Source((), len(entries), records(), report)


def _image_folder(images: epath.PathLike) -> epath.Path:
    """The folder of images, which must have something in it."""
    folder = epath.Path(images)
    if not folder.is_dir():
        raise SourceError(f"the image folder {folder} does not exist or is no folder: set --images")
    if next(iter(folder.iterdir()), None) is None:
        raise SourceError(f"the image folder {folder} is empty: set --images to the folder of the pictures")
    return folder


def _load(path: epath.Path, keys: Sequence[str]) -> dict[str, Any]:
    """The JSON object in `path`, which must have lists under `keys`."""
    if not path.is_file():
        raise SourceError(f"the annotation file {path} does not exist")
    try:
        data = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} holds a {type(data).__name__}, expected an object with {', '.join(keys)}")
    for key in keys:
        if not isinstance(data.get(key), list):
            found = type(data[key]).__name__ if key in data else "nothing"
            raise SourceError(f"{path}: expected a list under {key!r}, found {found}")
        for index, item in enumerate(data[key]):
            if not isinstance(item, dict):
                raise SourceError(f"{path}: {key}[{index}] is {item!r:.40}, expected an object")
    return data


def _by_id(items: list[dict[str, Any]], path: epath.Path, what: str, keys: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """Items by id; all must have `keys` and ids of their own."""
    result = {}
    for index, item in enumerate(items):
        missing = [key for key in keys if key not in item]
        if missing:
            raise SourceError(f"{path}: {what}[{index}] lacks {', '.join(missing)}")
        identity = item["id"]
        if not isinstance(identity, int | str):
            raise SourceError(f"{path}: {what}[{index}] has the id {identity!r}, expected a number or text")
        if identity in result:
            raise SourceError(f"{path}: the id {identity!r} stands twice in {what}: ids must be unique")
        result[identity] = item
    return result


def _images(items: list[dict[str, Any]], path: epath.Path, keys: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """Image entries by id, their sizes and file names checked for type."""
    entries = _by_id(items, path, "images", keys)
    if not entries:
        raise SourceError(f"{path}: 'images' is empty")
    for identity, entry in entries.items():
        for side in ("height", "width"):
            if isinstance(entry[side], bool) or not isinstance(entry[side], int):
                raise SourceError(f"{path}: image {identity} has {side} {entry[side]!r}, expected pixels as an integer")
        if not isinstance(entry["file_name"], str) or not entry["file_name"]:
            raise SourceError(f"{path}: image {identity} has the file name {entry['file_name']!r}, expected text")
    return entries


def _annotations(
    items: list[dict[str, Any]], path: epath.Path, entries: dict[Any, Any], report: Report
) -> defaultdict[Any, list[dict[str, Any]]]:
    """Annotations by image; duplicated ids are a fault, those of images that are not listed are dropped."""
    seen: set[Any] = set()
    by_image: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for index, item in enumerate(items):
        if "image_id" not in item or "bbox" not in item:
            raise SourceError(f"{path}: annotations[{index}] lacks {'image_id' if 'image_id' not in item else 'bbox'}")
        identity = item.get("id")
        if identity is not None:
            if identity in seen:
                raise SourceError(f"{path}: the id {identity!r} stands twice in annotations: ids must be unique")
            seen.add(identity)
        if item["image_id"] in entries:
            by_image[item["image_id"]].append(item)
        else:
            report.drop("box: image not listed", f"annotation {identity}, image {item['image_id']}")
    return by_image


def _check_names(named: Mapping[Any, str], path: epath.Path) -> None:
    """Refuses names that cannot stand in a prompt, and one name for two categories."""
    if not named:
        raise SourceError(f"{path}: 'categories' has no category besides background")
    seen: dict[str, Any] = {}
    for identity, name in named.items():
        if not any(character.isalnum() for character in clean_name(name)):
            raise SourceError(
                f"{path}: category {identity} is named {name!r}, of which cleaning leaves no letter or digit: "
                "give it a text with --names"
            )
        if name in seen:
            raise SourceError(
                f"{path}: categories {seen[name]} and {identity} are both named {name!r}: tell them apart with --names"
            )
        seen[name] = identity


def _box(
    note: dict[str, Any], entry: dict[str, Any], report: Report, where: str
) -> tuple[float, float, float, float] | None:
    """The annotation's box as inclusive xyxy clipped to the image, or None, counted."""
    raw = note["bbox"]
    if not isinstance(raw, list) or len(raw) != 4 or not all(isinstance(v, int | float) for v in raw):
        report.drop("box: not four numbers", f"{where}, {raw!r:.60}")
        return None
    x, y, w, h = (float(v) for v in raw)
    where = f"{where}, xywh {x:g} {y:g} {w:g} {h:g}"
    if not all(map(math.isfinite, (x, y, w, h))):
        report.drop("box: not finite", where)
        return None
    x2, y2 = x + max(w - 1, 0), y + max(h - 1, 0)
    right, bottom = entry["width"] - 1.0, entry["height"] - 1.0
    if w <= 1 or h <= 1:
        report.drop("box: no area", where)
        return None
    x, x2 = (min(max(v, 0.0), right) for v in (x, x2))
    y, y2 = (min(max(v, 0.0), bottom) for v in (y, y2))
    box = boxes_array([(x, y, x2, y2)])[0]
    # In float32, as stored: a sliver may lose its area there.
    if box[2] <= box[0] or box[3] <= box[1]:
        report.drop("box: outside the image", f"{where} in {entry['height']} x {entry['width']}")
        return None
    return x, y, x2, y2


def _spans(note: dict[str, Any], caption: str, report: Report, where: str) -> Spans:
    """The annotation's character spans that cover text; the others are counted, as is a box that keeps none."""
    raw = note["tokens"] if "tokens" in note else note.get("tokens_positive")
    if not isinstance(raw, list) or not raw:
        report.drop("box: no span", where)
        return ()
    spans = []
    for span in raw:
        if not (isinstance(span, list) and len(span) == 2 and all(isinstance(v, int) for v in span)):
            report.drop("span: not two integers", f"{where}, {span!r:.40}")
            continue
        begin, end = span
        found = f"{where}, ({begin}, {end}) in {len(caption)} characters"
        if begin < 0 or end > len(caption):
            report.drop("span: beyond the caption", found)
        elif not caption[begin:end].strip():
            report.drop("span: to no token", found)
        else:
            spans.append((begin, end))
    if not spans:
        report.drop("box: no span left", where)
    return tuple(spans)


def _sized(entry: dict[str, Any], report: Report, boxes: int) -> bool:
    """Whether the image is listed with a size that an image may have; else it is counted, with its boxes."""
    height, width = entry["height"], entry["width"]
    where = f"image {entry['id']}, {entry['file_name']}, listed {height} x {width}"
    if height > 0 and width > 0 and height * width <= PIXEL_LIMIT:
        return True
    if height > 0 and width > 0:
        report.drop("image: too large", f"{where}: more than {PIXEL_LIMIT:,} pixels")
    else:
        report.drop("image: no size", where)
    report.drop("box: image dropped", where, boxes) if boxes else None
    return False


def _image(folder: epath.Path, entry: dict[str, Any], report: Report) -> bytes | None:
    """The image file's bytes if it decodes to the size that the annotations say, or None, counted."""
    file, where = folder / entry["file_name"], f"image {entry['id']}, {entry['file_name']}"
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        report.drop("image: file missing", where)
        return None
    except OSError as error:
        report.drop("image: file unreadable", f"{where}, {error.strerror or error}")
        return None
    if not data:
        report.drop("image: file empty", where)
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and counts
            image = Image.open(io.BytesIO(data))
        with image:
            size = (image.height, image.width)
            if image.height * image.width > PIXEL_LIMIT:
                report.drop("image: too large", f"{where} is {size}: more than {PIXEL_LIMIT:,} pixels")
                return None
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        report.drop("image: cannot be decoded", f"{where}, {error!s:.60}")
        return None
    if size != (entry["height"], entry["width"]):
        report.drop("image: size differs", f"{where} is {size}, listed {(entry['height'], entry['width'])}")
        return None
    return data
