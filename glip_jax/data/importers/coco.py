"""COCO's detection JSON, and the sets that are written in it: LVIS, Objects365 (v1 and v2), ODinW's folders, own data.

One entry per image, images without boxes included. Boxes are xywh in pixels; a file whose boxes are xyxy, or shares of
the image, is refused with a word on what to do. A crowd box is dropped, and its name is not exhaustive in its image.

LVIS: `neg_category_ids` are known absent, `not_exhaustive_category_ids` not exhaustive; a file name is the end of
`coco_url`. Objects365's `isfake` (a drawing, a statue) changes nothing. A path that is not below the folder of pictures
is looked for without its leading folders (images/v1/patch8/x.jpg -> patch8/x.jpg -> x.jpg).
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
from glip_jax.data.importers.entry import Entry, Folder, Opened, Report, SourceError, from_xywh, image_folder, numbers
from glip_jax.data.importers.options import BuildOptions, Place
from glip_jax.data.importers.readers import Join, JsonFile, integer, need, text
from glip_jax.io import gcs

__all__ = [
    "BoxForm",
    "Coco",
    "Lvis",
    "Meaning",
    "Objects365",
    "Odinw",
    "Places",
    "as_xywh",
    "joined",
    "open_coco",
    "open_odinw",
    "rename_map",
]

BoxForm = Literal["xywh", "xyxy"]

_ENOUGH = 10
"""Boxes from which their numbers tell what they mean."""

_EXTRA = ("neg_category_ids", "not_exhaustive_category_ids")


def open_coco(
    annotations: epath.PathLike,
    images: epath.PathLike,
    *,
    rename: Mapping[str, str] | None = None,
    boxes: BoxForm | None = None,
    strict: bool = False,
    scratch: Path | None = None,
) -> Opened:
    """Detection entries of a COCO JSON.

    `rename` gives prompt text for category names that mean nothing, e.g. {"RBC": "red blood cell"}. `boxes`: what bbox
    holds; None: xywh, after a look at whether it can be. SourceError: no JSON, a missing key, ids that stand twice, names
    that cannot be prompted or stand twice, a folder of images that is missing or empty, boxes that mean something else.
    """
    folder = image_folder(images)
    data, report = JsonFile(annotations), Report(strict=strict)
    listed = _listed(data)
    used: Counter[Any] = Counter()
    join = joined(data, _image_values, lambda note, where: _note_values(note, used, where), report, scratch)
    found = categories(listed, used, str(data.path), report, rename)
    entries = _entries(join, found, Places(folder), boxes, data.path, report)
    return Opened(entries, folder, report, found.names, join.count, (data.path,))


def open_odinw(folder: epath.PathLike, **options: Any) -> Opened:
    """A folder of ODinW (or Roboflow): pictures and one annotation file beside them. Options as for `open_coco`.

    SourceError if there is no annotation file, or more than one that could be meant.
    """
    place = epath.Path(folder)
    if not place.is_dir():
        raise SourceError(
            f"{place} is no folder: expected one with pictures and an annotation file, e.g. Aquarium/train"
        )
    wanted = ("annotations_without_background.json", "_annotations.coco.json")
    files = [place / name for name in wanted if (place / name).exists()][:1] or sorted(place.glob("*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no JSON file"
        raise SourceError(f"{place} has {found}: expected {' or '.join(wanted)}, or one JSON file")
    return open_coco(files[0], place, **options)


class Places:
    """Finds the paths that annotation files give below the folder of pictures."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder.path
        self._skipped: dict[str, int] = {}

    def find(self, name: str) -> str:
        """The path below the folder: leading folders that are not there are left out, whole folders at a time."""
        *parents, file = [part for part in name.replace("\\", "/").split("/") if part] or [name]
        key = "/".join(parents)
        if key not in self._skipped:
            depths = range(len(parents) + 1)
            self._skipped[key] = next((i for i in depths if (self._folder / "/".join(parents[i:])).is_dir()), 0)
        return "/".join([*parents[self._skipped[key] :], file])


def joined(
    data: JsonFile, image: Any, note: Any, report: Report, scratch: Path | None, stray: str = "box: image not listed"
) -> Join:
    """The lists `images` and `annotations` of a COCO-like file, joined.

    `image` and `note` make of an object what is kept of it, (object, place in words) -> list, and raise SourceError for
    one that spoils the file. SourceError: ids that are missing, stand twice or are neither number nor text; no images.
    Notes of images that are not listed are dropped and counted as `stray`.
    """

    def identity(item: dict[str, Any], key: str, where: str) -> Any:
        value = item[key]
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise SourceError(f"{where} has the {key} {value!r:.40}, expected a number or text")
        return value

    def images() -> Iterator[tuple[Any, list[Any]]]:
        for i, item in enumerate(data.objects("images")):
            where = f"{data.path}: images[{i}]"
            need(item, ("id",), where)
            yield identity(item, "id", where), image(item, where)

    def notes() -> Iterator[tuple[Any, Any, list[Any]]]:
        for i, item in enumerate(data.objects("annotations")):
            where = f"{data.path}: annotations[{i}]"
            need(item, ("image_id",), where)
            own = None if item.get("id") is None else identity(item, "id", where)
            yield identity(item, "image_id", where), own, note(item, where)

    join = Join(scratch)
    join.add_images(images())
    join.add_notes(notes())
    if not join.count:
        raise SourceError(f"{data.path}: 'images' is empty")
    for table, key in (("images", "images"), ("notes", "annotations")):
        twice = join.twice(table)
        if twice is not None:
            raise SourceError(f"{data.path}: the id {twice!r} stands twice in {key}: ids must be unique")
    for own, other in join.strays():
        report.drop(stray, f"annotation {own}, image {other}")
    return join


def _listed(data: JsonFile) -> dict[Any, dict[str, Any]]:
    """The category list by id: name and supercategory."""
    listed: dict[Any, dict[str, Any]] = {}
    for i, item in enumerate(data.objects("categories")):
        where = f"{data.path}: categories[{i}]"
        need(item, ("id", "name"), where)
        if isinstance(item["id"], bool) or not isinstance(item["id"], int | str):
            raise SourceError(f"{where} has the id {item['id']!r:.40}, expected a number or text")
        if item["id"] in listed:
            raise SourceError(f"{data.path}: the id {item['id']!r} stands twice in categories: ids must be unique")
        name = text(item, "name", f"{data.path}: category {item['id']}", "name")
        listed[item["id"]] = {"name": name, "supercategory": item.get("supercategory")}
    return listed


def _image_values(item: dict[str, Any], where: str) -> list[Any]:
    """File name, height, width, and LVIS's two lists."""
    if "file_name" not in item and isinstance(item.get("coco_url"), str):
        item["file_name"] = "/".join(item["coco_url"].split("/")[-2:])
    need(item, ("file_name", "height", "width"), where)
    named = f"{where.partition(': ')[0]}: image {item['id']}"
    height, width = (integer(item, side, named) for side in ("height", "width"))
    return [text(item, "file_name", named, "file name"), height, width, *(item.get(key) for key in _EXTRA)]


def _note_values(note: dict[str, Any], used: Counter[Any], where: str) -> list[Any]:
    """Box, category, crowd; counts the category."""
    need(note, ("bbox",), where)
    category = note.get("category_id")
    if isinstance(category, float) and category.is_integer():
        category = int(category)
    if isinstance(category, bool) or not isinstance(category, int | str):
        category = f"{category!r:.40}"
    used[category] += 1
    return [note["bbox"], category, bool(note.get("iscrowd"))]


def _entries(
    join: Join, known: Categories, places: Places, form: BoxForm | None, path: epath.Path, report: Report
) -> Iterator[Entry]:
    """One entry per image; a look at all boxes at the end tells whether they can be what they were read as."""
    meaning = Meaning()
    for identity, (file, height, width, negatives, unfinished), notes in join:
        boxes, labels, ids, crowds = [], [], [], []
        for own, (raw, category, crowd) in notes:
            where = f"annotation {'(no id)' if own is None else own} of image {identity}"
            meaning.look(raw, height, width, where)
            if crowd:
                report.drop("box: crowd", where)
                crowds.append(category)
            elif category in known.background:
                report.drop("box: background class", f"{where}, category {category}")
            elif category not in known.index:
                report.drop("box: category not listed", f"{where}, category {category}")
            elif (box := from_xywh(as_xywh(raw) if form == "xyxy" else raw, report, where)) is not None:
                boxes.append(box)
                labels.append(known.index[category])
                ids.append("(no id)" if own is None else str(own))
        absent = None if negatives is None else known.names_of(negatives)
        here = {known.names[label] for label in labels}
        if absent is not None and here.intersection(absent):
            both = [name for name in absent if name in here]
            report.note("name: known absent but boxed, not kept as absent", f"image {identity}, {both[0]!r}", len(both))
            absent = tuple(name for name in absent if name not in here)
        yield Entry(
            id=str(identity), image=places.find(file), kind="detection", height=height, width=width,
            boxes=tuple(boxes), labels=tuple(labels), known_absent=absent, ids=tuple(ids), provenance=path.name,
            not_exhaustive=tuple(dict.fromkeys(known.names_of(unfinished) + known.names_of(crowds))),
        )  # fmt: skip
    if form is None:
        meaning.refuse(path)


def as_xywh(raw: Any) -> Any:
    """Corners as xywh; what is no four numbers as it is, to be counted."""
    corners = numbers(raw, 4)
    return raw if corners is None else [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]]


class Meaning:
    """What the boxes of a file look like, taken as xywh in pixels."""

    def __init__(self) -> None:
        self.boxes = self.beyond = self.corners = self.shares = 0
        self.first = ""

    def look(self, raw: Any, height: int, width: int, where: str) -> None:
        """Counts one box."""
        values = numbers(raw, 4)
        if values is None or not all(map(math.isfinite, values)):
            return
        a, b, c, d = values
        self.boxes += 1
        self.shares += all(0 <= value <= 1 for value in values)
        self.corners += c > a and d > b and c <= width + 1 and d <= height + 1
        if a + c > width + 1 or b + d > height + 1:
            self.beyond += 1
            self.first = self.first or f"{where}, {a:g} {b:g} {c:g} {d:g} in {height} x {width}"

    def refuse(self, path: epath.Path) -> None:
        """SourceError if the boxes are something else: too many leave the image as xywh, and all fit as corners."""
        if self.boxes < _ENOUGH:
            return
        if self.shares == self.boxes:
            raise SourceError(
                f"{path}: every bbox lies between 0 and 1, as shares of the image: expected xywh in pixels"
            )
        if self.beyond > 0.2 * self.boxes and self.corners >= 0.99 * self.boxes:
            raise SourceError(
                f"{path}: bbox seems to hold corners, x1 y1 x2 y2: read as x y width height, {self.beyond} of "
                f"{self.boxes} leave their image (first: {self.first}), as corners {self.corners} fit; "
                "say which with --boxes=xyxy or --boxes=xywh"
            )


@dataclass(frozen=True, kw_only=True)
class Coco(BuildOptions):
    """Import boxes with category names from a COCO JSON: all that a detection set of your own needs.

    example: python -m glip_jax data coco instances_train2017.json --images=train2017 --out=shards/coco
    """

    annotations: tyro.conf.Positional[Place]
    """The annotation file."""
    images: Place
    """Folder of the pictures."""
    names: Place | None = None
    """JSON object with prompt text for category names, e.g. {"RBC": "red blood cell"}."""
    boxes: BoxForm | None = None
    """What bbox holds; default: xywh, after a look at whether it can be."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_coco(
            self.annotations, self.images, rename=rename_map(self.names), boxes=self.boxes, strict=self.strict,
            scratch=scratch,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lvis(Coco):
    """Import LVIS: COCO's form, with names known to be absent and names that are not exhaustively boxed.

    example: python -m glip_jax data lvis lvis_v1_train.json --images=coco --out=shards/lvis
    """


@dataclass(frozen=True, kw_only=True)
class Objects365(Coco):
    """Import Objects365, v1 or v2, in its owner's JSON.

    example: python -m glip_jax data objects365 zhiyuan_objv2_train.json --images=objects365/train --out=shards/o365
    """


@dataclass(frozen=True, kw_only=True)
class Odinw(BuildOptions):
    """Import a folder of ODinW or Roboflow: pictures with an annotation file beside them.

    example: python -m glip_jax data odinw Aquarium/train --out=shards/aquarium
    """

    folder: tyro.conf.Positional[Place]
    """Folder with the pictures and annotations_without_background.json or _annotations.coco.json."""
    names: Place | None = None
    """JSON object with prompt text for category names, e.g. {"puffin": "puffin with an orange beak"}."""

    @property
    def source(self) -> epath.Path:
        """The folder."""
        return self.folder

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_odinw(self.folder, rename=rename_map(self.names), strict=self.strict, scratch=scratch)


def rename_map(path: epath.Path | None) -> dict[str, str] | None:
    """A JSON object of texts; SourceError for anything else."""
    if path is None:
        return None
    try:
        names = json.loads(gcs.open_file(path).read())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"--names {path} cannot be read as JSON ({error})") from None
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise SourceError(f"--names {path}: expected an object of texts, name in the file -> text in the prompt")
    return names
