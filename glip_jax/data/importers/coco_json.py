r"""The reader of the JSON of COCO's family: categories, images with their files and sizes, boxes, phrases of captions.

Import, evaluation and labelling read through this module, so that each accepts, repairs, counts and refuses the same:

- A path is looked for below the image folder as it is, then without its leading folders (`images\0.jpg`, `/data/4/0.jpg`,
  `C:\me\0.jpg`, `../x/0.jpg`); two images that would be read from one file are refused.
- A size that is missing, null or no size is that of the image file.
- Numbers may be texts, and an id "1" is the listed 1 where no "1" is listed.
- Boxes that seem to be corners or relative are refused.

What is repaired is noted in the report, what cannot be used is dropped and counted.
"""

import io
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from etils import epath
from PIL import Image

from glip_jax.data.importers.categories import Categories, categories
from glip_jax.data.importers.entry import Box, ImageFolder, Report, SourceError, as_numbers, checked_spans
from glip_jax.data.importers.readers import (
    Join,
    JsonFile,
    as_integer,
    identity,
    require_keys,
    text_field,
)
from glip_jax.data.records import Spans
from glip_jax.io import gcs

__all__ = [
    "AnnotatedBox",
    "AnnotatedCaption",
    "AnnotatedImage",
    "AnnotatedPhrase",
    "BoxFormat",
    "BoxFormatCheck",
    "Crowds",
    "DetectionFile",
    "GroundingFile",
    "ImagePaths",
    "image_size",
    "joined",
    "listed_categories",
    "read_detections",
    "read_grounding",
]

BoxFormat = Literal["xywh", "xyxy"]

Crowds = Literal["drop", "keep"]
"""Boxes with `iscrowd`: several objects under one box, or single objects (the masks of some annotation tools)."""

_ENOUGH = 10
"""Minimum number of boxes for recognising their format."""

_MEASURED = 200
"""Images without a listed size whose file is opened for that."""

_MISSES = 8
"""Missing files of a folder after which its files are expected in the first remaining folder that exists."""

_EXTRA = ("neg_category_ids", "not_exhaustive_category_ids", "known_absent", "look_alikes")


class AnnotatedBox(NamedTuple):
    """A box with a listed category."""

    key: str
    """The annotation's id; "(no id)"."""
    xywh: Box
    """Finite numbers; width and height may be 0 or negative."""
    label: int
    """Index into `Categories.names`."""
    crowd: bool
    area: Any
    """As in the file."""


class AnnotatedImage(NamedTuple):
    """An image with its boxes."""

    id: int | str
    file: str
    """Path below the image folder."""
    height: int | None
    """None: not listed."""
    width: int | None
    boxes: list[AnnotatedBox]
    known_absent: tuple[str, ...] | None
    """Names known to be absent: LVIS's `neg_category_ids`, and `known_absent`, a list of names; None: neither is listed."""
    not_exhaustive: tuple[str, ...]
    """LVIS: names without exhaustive boxes."""
    look_alikes: tuple[str, ...] = ()
    """Names of `known_absent` that resemble what the image shows."""


class AnnotatedPhrase(NamedTuple):
    """A box of a phrase; see `AnnotatedBox`."""

    key: str
    xywh: Box
    spans: Spans
    crowd: bool


class AnnotatedCaption(NamedTuple):
    """A caption of an image with the boxes of its phrases."""

    id: int | str
    file: str
    height: int | None
    width: int | None
    caption: str
    boxes: list[AnnotatedPhrase]
    fields: dict[str, Any]
    """The other fields of the item that were asked for."""


@dataclass(frozen=True)
class DetectionFile:
    """A validated file of boxes with categories."""

    path: epath.Path
    categories: Categories
    count: int
    """Number of images."""
    images: Iterator[AnnotatedImage]
    """Can be iterated once; raises SourceError at the end if the boxes have another format."""


@dataclass(frozen=True)
class GroundingFile:
    """A validated file of captions whose phrases have boxes; see `DetectionFile`."""

    path: epath.Path
    count: int
    captions: Iterator[AnnotatedCaption]


class ImagePaths:
    """Finds the image files of the paths in an annotation file."""

    def __init__(self, images: epath.PathLike) -> None:
        """`images`: the image folder; if it does not exist, paths are only made relative."""
        self._folder = epath.Path(images)
        self._skipped: dict[str, int] = {}
        self._misses: Counter[str] = Counter()
        self._names = sqlite3.connect(
            "", isolation_level=None
        )  # a temporary file: memory does not grow with the images
        self._names.execute("PRAGMA journal_mode = OFF")
        self._names.execute("CREATE TABLE names (file PRIMARY KEY, name) WITHOUT ROWID")
        self._names.execute("BEGIN")

    @staticmethod
    def parts(name: str) -> list[str]:
        """The parts of a path, whatever its separators, from the last ".." on, so that none leaves the folder."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        up = max((i for i, part in enumerate(parts) if part == ".."), default=-1)
        return parts[up + 1 :] or [name.replace("/", "_").replace("\\", "_")]

    def find(self, name: str) -> str:
        """The path below the image folder: leading folders are removed until the file exists; as it is if it does not.

        Files of one folder are found alike. A name that does not exist as it is may be a URL: quoted, or in a query. Raises
        SourceError if an image of another path would be read from the same file.
        """
        found = self._known(self.parts(name))
        if found is None and ("%" in name or "?" in name):
            found = self._known(self.parts(unquote(name.rpartition("?d=")[2].partition("?")[0])))
        found = "/".join(self.parts(name)) if found is None else found
        row = [text.encode(errors="backslashreplace").decode() for text in (found, "/".join(self.parts(name)))]
        if not self._names.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", row).rowcount:
            (other,) = self._names.execute("SELECT name FROM names WHERE file = ?", row[:1]).fetchone()
            if other != row[1]:
                raise SourceError(
                    f"the images {other!r:.80} and {row[1]!r:.80} would both be read from {found!r:.80} in {self._folder}: set "
                    "--images to the folder in which both paths exist"
                )
        return found

    def _known(self, parts: list[str]) -> str | None:
        *parents, file = parts
        key = "/".join(parents)
        if key not in self._skipped:
            tails = ["/".join(parents[i:]) for i in range(len(parts))]
            if self._misses[key] < _MISSES:
                depth = next((i for i, tail in enumerate(tails) if (self._folder / tail / file).exists()), None)
            else:
                depth = next((i for i, tail in enumerate(tails) if (self._folder / tail).is_dir()), 0)
            if depth is None:
                self._misses[key] += 1
                return None
            self._skipped[key] = depth
        return "/".join([*parents[self._skipped[key] :], file])

    def size(self, file: str) -> tuple[int | None, int | None]:
        """Height and width of an image file as stored; None if it cannot be read."""
        try:
            with Image.open(io.BytesIO(ImageFolder(self._folder)(file))) as image:
                return image.height, image.width
        except gcs.StorageError:
            raise
        except Exception:  # decoders raise anything; whoever reads the image says what is wrong
            return None, None


def image_size(item: Mapping[str, Any], where: str, report: Report) -> tuple[int | None, int | None]:
    """The listed height and width; (None, None), noted, if they are missing or no size: then the image's own is used."""
    height, width = (as_integer(item.get(side)) for side in ("height", "width"))
    if height is not None and width is not None and height > 0 and width > 0:
        if isinstance(item["height"], str) or isinstance(item["width"], str):
            report.note("image: size listed as text", f"{where}, found {item['height']!r:.20} x {item['width']!r:.20}")
        return height, width
    listed = {side: item[side] for side in ("height", "width") if item.get(side) is not None}
    if listed:
        report.note("image: listed size is no size, the image's own is used", f"{where}, found {listed!r:.60}")
    else:
        report.note("image: no size listed, the image's own is used", where)
    return None, None


def listed_categories(data: JsonFile, report: Report) -> dict[Any, dict[str, Any]]:
    """The category list by id, with name and supercategory."""
    listed: dict[Any, dict[str, Any]] = {}
    for i, item in enumerate(data.objects("categories")):
        where = f"{data.path}: categories[{i}]"
        require_keys(item, ("id", "name"), where)
        key = identity(item, "id", where)
        if key in listed:
            raise SourceError(f"{data.path}: the id {key!r} occurs twice in categories: ids must be unique")
        if isinstance(item["name"], int) and not isinstance(item["name"], bool):
            report.note("category: name is a number, read as text", f"category {key}, {item['name']}")
            item["name"] = str(item["name"])
        name = text_field(item, "name", f"{data.path}: category {key}", "name")
        listed[key] = {"name": name, "supercategory": item.get("supercategory")}
    return listed


def joined(
    data: JsonFile,
    paths: ImagePaths,
    image: Callable[[dict[str, Any], str], list[Any]],
    annotation: Callable[[dict[str, Any], str], list[Any]],
    report: Report,
    scratch: Path | None,
    stray: str = "box: image not listed",
    place: Callable[[dict[str, Any], str, str], str] = lambda item, where, name: name,  # noqa: ARG005
) -> Join:
    """Joins the lists `images` and `annotations` of a COCO-like file.

    The value of an image is [file, height, width] and what `image` adds; `annotation` gives that of an annotation. Both take
    (object, description) and raise SourceError if the file is invalid. `place`: the path of an image in the image folder,
    from (object, description, listed name). Annotations of unlisted images are dropped and counted as `stray`. Raises
    SourceError if ids are missing, duplicated or neither number nor text, if there are no images, or if two images would be
    read from one file.
    """

    def images() -> Iterator[tuple[Any, list[Any]]]:
        for i, item in enumerate(data.objects("images")):
            where = f"{data.path}: images[{i}]"
            require_keys(item, ("id",), where)
            key = identity(item, "id", where)
            if item.get("file_name") is None and isinstance(item.get("coco_url"), str):
                item["file_name"] = "/".join(item["coco_url"].split("/")[-2:])
            require_keys(item, ("file_name",), where)
            named = f"{data.path}: image {key!s:.40}"
            name = place(item, named, text_field(item, "file_name", named, "file name"))
            size = image_size(item, f"image {key!s:.40}", report)
            yield key, [paths.find(name), *size, *image(item, where)]

    def annotations() -> Iterator[tuple[Any, Any, list[Any]]]:
        for i, item in enumerate(data.objects("annotations")):
            where = f"{data.path}: annotations[{i}]"
            require_keys(item, ("image_id",), where)
            key = None if item.get("id") is None else identity(item, "id", where)
            yield identity(item, "image_id", where), key, annotation(item, where)

    join = Join(scratch)
    join.add_images(images())
    join.add_annotations(annotations())
    if not join.count:
        raise SourceError(f"{data.path}: 'images' is empty")
    for table in ("images", "annotations"):
        duplicate = join.duplicate_key(table)
        if duplicate is not None:
            raise SourceError(f"{data.path}: the id {duplicate!r} occurs twice in {table}: ids must be unique")
    for image_key, count in join.match_other_forms():
        found = f"{image_key!r:.40} is the listed {'number' if isinstance(image_key, str) else 'text'}"
        report.note("annotation: image id as text or number, matched", found, count)
    for key, image_key in join.without_image():
        report.drop(stray, f"annotation {key}, image {image_key!r:.60}")
    return join


def read_detections(
    annotations: epath.PathLike | JsonFile,
    images: epath.PathLike,
    report: Report,
    *,
    rename: Mapping[str, str] | None = None,
    merge_names: bool = False,
    boxes: BoxFormat | None = None,
    crowds: Crowds | None = None,
    scratch: Path | None = None,
) -> DetectionFile:
    """Opens a COCO JSON of boxes with categories; see `glip_jax.data.importers.coco.open_coco` for options and errors."""
    data = annotations if isinstance(annotations, JsonFile) else JsonFile(annotations)
    paths = ImagePaths(images)
    listed, used = listed_categories(data, report), Counter[Any]()

    def annotation(item: dict[str, Any], where: str) -> list[Any]:
        require_keys(item, ("bbox",), where)
        category = item.get("category_id")
        if isinstance(category, float) and category.is_integer():
            category = int(category)
        if isinstance(category, bool) or not isinstance(category, int | str):
            category = f"{category!r:.40}"
        used[category] += 1
        return [item["bbox"], category, item.get("iscrowd"), item.get("area")]

    join = joined(data, paths, lambda item, _: [item.get(key) for key in _EXTRA], annotation, report, scratch)
    known = categories(listed, used, str(data.path), report, rename, merge_names)
    return DetectionFile(data.path, known, join.count, _images(join, known, paths, boxes, crowds, data.path, report))


def _images(
    join: Join, known: Categories, paths: ImagePaths, box_format: BoxFormat | None, crowds: Crowds | None,
    path: epath.Path, report: Report,
) -> Iterator[AnnotatedImage]:  # fmt: skip
    format_check = BoxFormatCheck(paths)
    for key, (file, height, width, negatives, unfinished, absent_names, alike), notes in join:
        found = []
        size = format_check.size(file, height, width, bool(notes))
        for annotation, (raw, category, iscrowd, area) in notes:
            name = "(no id)" if annotation is None else str(annotation)
            where = f"annotation {name} of image {key}"
            xywh = _four(raw, size, box_format, format_check, where, report)
            crowd = _crowd(iscrowd, crowds, where, report)
            label = known.find(category)
            if crowd is None or xywh is None:
                continue
            if known.is_background(category):
                report.drop("box: background class", f"{where}, category {category}")
            elif label is None:
                report.drop("box: category not listed", f"{where}, category {category!r:.40}")
            else:
                if category not in known.index:
                    report.note("box: category id as text or number, matched", f"{where}, category {category!r:.40}")
                found.append(AnnotatedBox(name, xywh, label, crowd, area))
        absent = None
        if negatives is not None or absent_names is not None:
            by_id = known.names_of(negatives, f"image {key}", report)
            absent = tuple(dict.fromkeys((*by_id, *known.names_listed(absent_names, f"image {key}", report))))
        incomplete = known.names_of(unfinished, f"image {key}", report)
        look_alikes = tuple(n for n in known.names_listed(alike, f"image {key}", report) if n in (absent or ()))
        yield AnnotatedImage(key, file, height, width, found, absent, incomplete, look_alikes)
    if box_format is None:
        format_check.raise_if_wrong(path)


def read_grounding(
    annotations: epath.PathLike | JsonFile,
    images: epath.PathLike,
    report: Report,
    *,
    folders: Mapping[str, str] | None = None,
    boxes: BoxFormat | None = None,
    crowds: Crowds | None = None,
    scratch: Path | None = None,
    fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda item: {},  # noqa: ARG005
) -> GroundingFile:
    """Opens a JSON in MDETR's format; see `glip_jax.data.importers.mdetr.open_mdetr`. `fields`: what to keep of an image."""
    data = annotations if isinstance(annotations, JsonFile) else JsonFile(annotations)
    paths = ImagePaths(images)

    def image(item: dict[str, Any], where: str) -> list[Any]:
        require_keys(item, ("caption",), where)
        return [item["caption"], fields(item)]

    def annotation(item: dict[str, Any], where: str) -> list[Any]:
        require_keys(item, ("bbox",), where)
        spans = item.get("tokens_positive") if item.get("tokens") is None else item["tokens"]
        return [item["bbox"], item.get("iscrowd"), spans]

    def place(item: dict[str, Any], where: str, name: str) -> str:
        if folders is None:
            return name
        origin = item.get("data_source")
        if not isinstance(origin, str) or origin not in folders:
            known = ", ".join(folders)
            raise SourceError(f"{where} has data_source {origin!r:.40}, expected one of {known}: set its folder")
        return f"{folders[origin]}/{name}" if folders[origin] else name

    join = joined(data, paths, image, annotation, report, scratch, place=place)
    return GroundingFile(data.path, join.count, _captions(join, paths, boxes, crowds, data.path, report))


def _captions(
    join: Join, paths: ImagePaths, box_format: BoxFormat | None, crowds: Crowds | None, path: epath.Path, report: Report
) -> Iterator[AnnotatedCaption]:
    format_check = BoxFormatCheck(paths)
    for key, (file, height, width, caption, fields), notes in join:
        if not isinstance(caption, str):
            report.drop("image: caption no text", f"image {key}, found {caption!r:.40}, expected text")
            report.drop("box: image dropped", f"image {key}", len(notes))
            continue
        found = []
        size = format_check.size(file, height, width, bool(notes))
        for annotation, (raw, iscrowd, raw_spans) in notes:
            name = "(no id)" if annotation is None else str(annotation)
            where = f"annotation {name} of image {key}"
            xywh = _four(raw, size, box_format, format_check, where, report)
            crowd = _crowd(iscrowd, crowds, where, report)
            if crowd is None or xywh is None:
                continue
            if (spans := () if crowd else checked_spans(raw_spans, caption, report, where)) or crowd:
                found.append(AnnotatedPhrase(name, xywh, spans, crowd))
        yield AnnotatedCaption(key, file, height, width, caption, found, fields)
    if box_format is None:
        format_check.raise_if_wrong(path)


def _four(
    raw: Any, size: tuple[int | None, int | None], box_format: BoxFormat | None, check: "BoxFormatCheck", where: str,
    report: Report,
) -> Box | None:  # fmt: skip
    """x, y, width, height as finite numbers; None, counted, for other values."""
    values = as_numbers(raw, 4)
    if values is None and isinstance(raw, list) and any(isinstance(value, str) for value in raw):
        values = as_numbers([_number(value) for value in raw], 4)
        report.note("box: numbers as text", f"{where}, {raw!r:.60}", values is not None)
    if values is None:
        report.drop("box: not four numbers", f"{where}, {raw!r:.60}")
        return None
    a, b, c, d = values
    if not all(map(math.isfinite, values)):
        report.drop("box: not finite", f"{where}, {a:g} {b:g} {c:g} {d:g}")
        return None
    check.add((a, b, c, d), *size, where)
    return (a, b, c - a, d - b) if box_format == "xyxy" else (a, b, c, d)


def _number(value: Any) -> Any:
    """The number that a text states, else the value."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _crowd(value: Any, crowds: Crowds | None, where: str, report: Report) -> bool | None:
    """Whether a box is a crowd; None, counted, if `iscrowd` is neither 0 nor 1."""
    text = value.strip().lower() if isinstance(value, str) else value
    if text in (None, "", "false", "0", "0.0") or (isinstance(text, bool | int | float) and text == 0):
        return False
    if text not in ("true", "1", "1.0") and not (isinstance(text, bool | int | float) and text == 1):
        report.drop("box: iscrowd neither 0 nor 1", f"{where}, found {value!r:.40}")
        return None
    if crowds == "keep":
        report.note("box: crowd, kept as one object", where)
    return crowds != "keep"


class BoxFormatCheck:
    """Checks whether the boxes of a file can be xywh in pixels."""

    def __init__(self, paths: ImagePaths | None = None) -> None:
        """`paths`: reads the sizes of some images that have none listed."""
        self.boxes = self.sized = self.beyond = self.corners = self.shares = 0
        self.first = ""
        self._paths, self._measured = paths, 0

    def size(self, file: str, height: int | None, width: int | None, boxes: bool) -> tuple[int | None, int | None]:
        """The listed size, or that of the file for the first images that have boxes and no listed one."""
        if height is not None or not boxes or self._paths is None or self._measured >= _MEASURED:
            return height, width
        self._measured += 1
        return self._paths.size(file)

    def add(self, box: Box, height: int | None, width: int | None, where: str) -> None:
        """Counts a box."""
        a, b, c, d = box
        self.boxes += 1
        self.shares += all(0 <= value <= 1 for value in box)
        if height is None or width is None:
            return
        self.sized += 1
        self.corners += c > a and d > b and c <= width + 1 and d <= height + 1
        if a + c > width + 1 or b + d > height + 1:
            self.beyond += 1
            self.first = self.first or f"{where}, {a:g} {b:g} {c:g} {d:g} in {height} x {width}"

    def raise_if_wrong(self, path: epath.Path, remedy: str = "set --boxes=xyxy or --boxes=xywh") -> None:
        """Raises SourceError if the boxes seem to be relative, or xyxy: too many leave the image as xywh, and all fit as xyxy."""
        if self.boxes >= _ENOUGH and self.shares == self.boxes:
            raise SourceError(
                f"{path}: all values of bbox are between 0 and 1, so boxes seem to be relative: expected xywh in pixels"
            )
        if self.sized >= _ENOUGH and self.beyond > 0.2 * self.sized and self.corners >= 0.99 * self.sized:
            raise SourceError(
                f"{path}: bbox seems to hold corners, x1 y1 x2 y2: read as x y width height, {self.beyond} of "
                f"{self.sized} leave their image (first: {self.first}), as corners {self.corners} fit; {remedy}"
            )
