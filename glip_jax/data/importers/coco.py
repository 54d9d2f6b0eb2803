"""Imports detection annotations in COCO's JSON format: COCO, LVIS, Objects365 (v1 and v2), ODinW folders, your own data.

There is one entry per image, including images without boxes. Boxes are xywh in pixels; a file whose boxes seem to be xyxy or
relative is refused, and the message says what to do. Crowd boxes are dropped, and their category is marked as not exhaustive
in the image.

LVIS: categories in `neg_category_ids` are known to be absent, those in `not_exhaustive_category_ids` are not exhaustive; file
names come from `coco_url`. Objects365: `isfake` (a drawing, a statue) is ignored. If a path does not exist below the image
folder, leading folders are removed (images/v1/patch8/x.jpg -> patch8/x.jpg -> x.jpg).
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from etils import epath

from glip_jax.data.importers.categories import Categories, categories
from glip_jax.data.importers.entry import (
    Entry,
    ImageFolder,
    ImportSource,
    Report,
    SourceError,
    as_numbers,
    from_xywh,
    image_folder,
)
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import Join, JsonFile, integer_field, require_keys, text_field
from glip_jax.io import gcs

__all__ = [
    "BoxFormat",
    "Coco",
    "Lvis",
    "BoxFormatCheck",
    "Objects365",
    "Odinw",
    "ImagePaths",
    "as_xywh",
    "joined",
    "open_coco",
    "open_odinw",
    "rename_map",
]

BoxFormat = Literal["xywh", "xyxy"]

_ENOUGH = 10
"""Minimum number of boxes for recognising their format."""

_EXTRA = ("neg_category_ids", "not_exhaustive_category_ids")


def open_coco(
    annotations: epath.PathLike,
    images: epath.PathLike,
    *,
    rename: Mapping[str, str] | None = None,
    boxes: BoxFormat | None = None,
    strict: bool = False,
    scratch: Path | None = None,
) -> ImportSource:
    """Opens a COCO JSON file of detection annotations.

    `rename`: prompt text by category name, for names without meaning, e.g. {"RBC": "red blood cell"}. `boxes`: format of
    `bbox`; None: xywh, checked for plausibility. Raises SourceError if the file is not JSON, a key is missing, ids or names
    are duplicated, a name has no letter or digit, the image folder is missing or empty, or boxes have another format.
    """
    folder = image_folder(images)
    data, report = JsonFile(annotations), Report(strict=strict)
    listed = _listed(data)
    used: Counter[Any] = Counter()
    join = joined(data, _image_values, lambda item, where: _annotation_values(item, used, where), report, scratch)
    found = categories(listed, used, str(data.path), report, rename)
    entries = _entries(join, found, ImagePaths(folder), boxes, data.path, report)
    return ImportSource(entries, folder, report, found.names, join.count, (data.path,))


def open_odinw(folder: epath.PathLike, **options: Any) -> ImportSource:
    """Opens a folder of ODinW or Roboflow: images with an annotation file beside them. Options as for `open_coco`.

    Raises SourceError if there is no annotation file, or several candidates.
    """
    return open_coco(_annotation_file(epath.Path(folder)), epath.Path(folder), **options)


def _annotation_file(root: epath.Path) -> epath.Path:
    if not root.is_dir():
        raise SourceError(
            f"{root} is not a folder: expected one with images and an annotation file, e.g. Aquarium/train"
        )
    wanted = ("annotations_without_background.json", "_annotations.coco.json")
    files = [root / name for name in wanted if (root / name).exists()][:1] or sorted(root.glob("*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no JSON file"
        raise SourceError(f"{root} has {found}: expected {' or '.join(wanted)}, or one JSON file")
    return files[0]


class ImagePaths:
    """Finds the image files of the paths in an annotation file."""

    def __init__(self, folder: ImageFolder) -> None:
        self._folder = folder.path
        self._skipped: dict[str, int] = {}

    def find(self, name: str) -> str:
        """The path below the image folder: leading folders are removed until the remaining folder exists."""
        *parents, file = [part for part in name.replace("\\", "/").split("/") if part] or [name]
        key = "/".join(parents)
        if key not in self._skipped:
            depths = range(len(parents) + 1)
            self._skipped[key] = next((i for i in depths if (self._folder / "/".join(parents[i:])).is_dir()), 0)
        return "/".join([*parents[self._skipped[key] :], file])


def joined(
    data: JsonFile,
    image: Any,
    annotation: Any,
    report: Report,
    scratch: Path | None,
    stray: str = "box: image not listed",
) -> Join:
    """Joins the lists `images` and `annotations` of a COCO-like file.

    `image` and `annotation` convert an object to the values that are kept, (object, description) -> list, and raise
    SourceError if the file is invalid. Annotations of unlisted images are dropped and counted as `stray`. Raises SourceError
    if ids are missing, duplicated or neither number nor text, or if there are no images.
    """

    def identity(item: dict[str, Any], key: str, where: str) -> Any:
        value = item[key]
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise SourceError(f"{where} has the {key} {value!r:.40}, expected a number or text")
        return value

    def images() -> Iterator[tuple[Any, list[Any]]]:
        for i, item in enumerate(data.objects("images")):
            where = f"{data.path}: images[{i}]"
            require_keys(item, ("id",), where)
            yield identity(item, "id", where), image(item, where)

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
    for key, image_key in join.without_image():
        report.drop(stray, f"annotation {key}, image {image_key}")
    return join


def _listed(data: JsonFile) -> dict[Any, dict[str, Any]]:
    """The category list by id, with name and supercategory."""
    listed: dict[Any, dict[str, Any]] = {}
    for i, item in enumerate(data.objects("categories")):
        where = f"{data.path}: categories[{i}]"
        require_keys(item, ("id", "name"), where)
        if isinstance(item["id"], bool) or not isinstance(item["id"], int | str):
            raise SourceError(f"{where} has the id {item['id']!r:.40}, expected a number or text")
        if item["id"] in listed:
            raise SourceError(f"{data.path}: the id {item['id']!r} occurs twice in categories: ids must be unique")
        name = text_field(item, "name", f"{data.path}: category {item['id']}", "name")
        listed[item["id"]] = {"name": name, "supercategory": item.get("supercategory")}
    return listed


def _image_values(item: dict[str, Any], where: str) -> list[Any]:
    """File name, height, width, and the two lists of LVIS."""
    if "file_name" not in item and isinstance(item.get("coco_url"), str):
        item["file_name"] = "/".join(item["coco_url"].split("/")[-2:])
    require_keys(item, ("file_name", "height", "width"), where)
    named = f"{where.partition(': ')[0]}: image {item['id']}"
    height, width = (integer_field(item, side, named) for side in ("height", "width"))
    return [text_field(item, "file_name", named, "file name"), height, width, *(item.get(key) for key in _EXTRA)]


def _annotation_values(item: dict[str, Any], used: Counter[Any], where: str) -> list[Any]:
    """Box, category, whether it is a crowd; counts the category in `used`."""
    require_keys(item, ("bbox",), where)
    category = item.get("category_id")
    if isinstance(category, float) and category.is_integer():
        category = int(category)
    if isinstance(category, bool) or not isinstance(category, int | str):
        category = f"{category!r:.40}"
    used[category] += 1
    return [item["bbox"], category, bool(item.get("iscrowd"))]


def _entries(
    join: Join, known: Categories, paths: ImagePaths, box_format: BoxFormat | None, path: epath.Path, report: Report
) -> Iterator[Entry]:
    """Yields one entry per image; after the last one, checks whether the boxes had the expected format."""
    format_check = BoxFormatCheck()
    for identity, (file, height, width, negatives, unfinished), notes in join:
        boxes, labels, ids, crowds = [], [], [], []
        for key, (raw, category, crowd) in notes:
            where = f"annotation {'(no id)' if key is None else key} of image {identity}"
            format_check.add(raw, height, width, where)
            if crowd:
                report.drop("box: crowd", where)
                crowds.append(category)
            elif category in known.background:
                report.drop("box: background class", f"{where}, category {category}")
            elif category not in known.index:
                report.drop("box: category not listed", f"{where}, category {category}")
            elif (box := from_xywh(as_xywh(raw) if box_format == "xyxy" else raw, report, where)) is not None:
                boxes.append(box)
                labels.append(known.index[category])
                ids.append("(no id)" if key is None else str(key))
        absent = None if negatives is None else known.names_of(negatives)
        boxed = {known.names[label] for label in labels}
        if absent is not None and boxed.intersection(absent):
            both = [name for name in absent if name in boxed]
            report.note("name: known absent but boxed, not kept as absent", f"image {identity}, {both[0]!r}", len(both))
            absent = tuple(name for name in absent if name not in boxed)
        yield Entry(
            id=str(identity), image=paths.find(file), kind="detection", height=height, width=width,
            boxes=tuple(boxes), labels=tuple(labels), known_absent=absent, ids=tuple(ids), provenance=path.name,
            not_exhaustive=tuple(dict.fromkeys(known.names_of(unfinished) + known.names_of(crowds))),
        )  # fmt: skip
    if box_format is None:
        format_check.raise_if_wrong(path)


def as_xywh(raw: Any) -> Any:
    """Converts xyxy to xywh; values that are not four numbers are returned unchanged, to be counted later."""
    corners = as_numbers(raw, 4)
    return raw if corners is None else [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]]


class BoxFormatCheck:
    """Checks whether the boxes of a file can be xywh in pixels."""

    def __init__(self) -> None:
        self.boxes = self.beyond = self.corners = self.shares = 0
        self.first = ""

    def add(self, raw: Any, height: int, width: int, where: str) -> None:
        """Counts a box."""
        values = as_numbers(raw, 4)
        if values is None or not all(map(math.isfinite, values)):
            return
        a, b, c, d = values
        self.boxes += 1
        self.shares += all(0 <= value <= 1 for value in values)
        self.corners += c > a and d > b and c <= width + 1 and d <= height + 1
        if a + c > width + 1 or b + d > height + 1:
            self.beyond += 1
            self.first = self.first or f"{where}, {a:g} {b:g} {c:g} {d:g} in {height} x {width}"

    def raise_if_wrong(self, path: epath.Path) -> None:
        """Raises SourceError if the boxes seem to be relative, or xyxy: too many leave the image as xywh, and all fit as xyxy."""
        if self.boxes < _ENOUGH:
            return
        if self.shares == self.boxes:
            raise SourceError(
                f"{path}: all values of bbox are between 0 and 1, so boxes seem to be relative: expected xywh in pixels"
            )
        if self.beyond > 0.2 * self.boxes and self.corners >= 0.99 * self.boxes:
            raise SourceError(
                f"{path}: bbox seems to hold corners, x1 y1 x2 y2: read as x y width height, {self.beyond} of "
                f"{self.boxes} leave their image (first: {self.first}), as corners {self.corners} fit; "
                "set --boxes=xyxy or --boxes=xywh"
            )


@dataclass(frozen=True, kw_only=True)
class Coco(BuildOptions):
    """Import boxes with category names from a COCO JSON file, the format to use for your own detection data.

    example: python -m glip_jax data coco instances_train2017.json --images=train2017 --out=shards/coco
    """

    annotations: tyro.conf.Positional[PathArgument]
    """The annotation file."""
    images: PathArgument
    """Folder of the images."""
    names: PathArgument | None = None
    """JSON object with prompt text for category names, e.g. {"RBC": "red blood cell"}."""
    boxes: BoxFormat | None = None
    """Format of bbox; default: xywh, checked for plausibility."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The annotation file."""
        return (self.annotations,)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_coco(
            self.annotations, self.images, rename=rename_map(self.names), boxes=self.boxes, strict=self.strict,
            scratch=scratch,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lvis(Coco):
    """Import LVIS: COCO's format with categories known to be absent and categories without exhaustive boxes.

    example: python -m glip_jax data lvis lvis_v1_train.json --images=coco --out=shards/lvis
    """


@dataclass(frozen=True, kw_only=True)
class Objects365(Coco):
    """Import Objects365, v1 or v2, from its JSON files.

    example: python -m glip_jax data objects365 zhiyuan_objv2_train.json --images=objects365/train --out=shards/o365
    """


@dataclass(frozen=True, kw_only=True)
class Odinw(BuildOptions):
    """Import a folder of ODinW or Roboflow: images with an annotation file beside them.

    example: python -m glip_jax data odinw Aquarium/train --out=shards/aquarium
    """

    folder: tyro.conf.Positional[PathArgument]
    """Folder with the images and annotations_without_background.json or _annotations.coco.json."""
    names: PathArgument | None = None
    """JSON object with prompt text for category names, e.g. {"puffin": "puffin with an orange beak"}."""

    @property
    def source(self) -> epath.Path:
        """The folder."""
        return self.folder

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The annotation file in the folder."""
        return (_annotation_file(self.folder),)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_odinw(self.folder, rename=rename_map(self.names), strict=self.strict, scratch=scratch)


def rename_map(path: epath.Path | None) -> dict[str, str] | None:
    """Reads a JSON object of texts; SourceError for any other file."""
    if path is None:
        return None
    try:
        names = json.loads(gcs.open_file(path).read())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"--names {path} cannot be read as JSON ({error})") from None
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise SourceError(f"--names {path}: expected a JSON object of texts, name in the file -> text in the prompt")
    return names
