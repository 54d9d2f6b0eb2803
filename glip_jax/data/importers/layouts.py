"""Finds a data set of boxes in a folder, whatever its layout, and returns its splits in COCO's form.

The files are only read: ids that do not fit and dummy classes are mended in memory, and each change is a note. The splits of
a data set share one list of categories, whose ids count from 1. Boxes are left as they are: `coco_json` and the importers
check them.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from etils import epath

from glip_jax.data.importers import coco_folders, label_studio, labelme, odvg, voc, yolo
from glip_jax.data.importers.categories import check_ids
from glip_jax.data.importers.entry import Report, SourceError
from glip_jax.data.importers.readers import as_integer, identity
from glip_jax.data.importers.sources import (
    SPLITS,
    LayoutError,
    Source,
    entries,
    files_with,
    folders_below,
    images_below,
    located,
)
from glip_jax.io import gcs
from glip_jax.io.formats import explain

__all__ = ["LAYOUTS", "Dataset", "LayoutError", "Split", "carve", "find", "read_split"]

_DEPTH = 3
"""Folders in folders that are looked into: archives often unpack to NAME/NAME."""

_FOLDERS = 200
"""Folders of one depth that are looked into."""

_FILES = 20
"""Files that are looked at to say what a folder holds instead of a data set."""

_TEXTS = (".json", ".jsonl", ".xml", ".csv", ".txt", ".yaml", ".parquet", ".zip", ".tar")

_CROWDS = 0.5
"""Share of boxes with `iscrowd` above which they are single objects, as the masks of CVAT and SAM."""

_TRIED = 50
"""Images of a split that are looked for in each folder that could be theirs."""


@dataclass(frozen=True)
class Split:
    """The annotated images of one split."""

    name: str
    """"train", "valid" or "test"."""
    coco: dict[str, Any]
    """images, annotations and categories in COCO's form; `file_name` is relative to `images`, and the file exists."""
    images: str
    """Folder of the images."""
    source: str
    """The file or folder of the annotations, for messages."""

    @property
    def boxes(self) -> int:
        """Number of annotations."""
        return len(self.coco["annotations"])


@dataclass(frozen=True)
class Dataset:
    """A data set of own data; its splits have the same categories."""

    layout: str
    """Name in `LAYOUTS`."""
    folder: str
    splits: dict[str, Split]
    """By name; "train" is always there."""
    notes: tuple[str, ...] = ()
    """What was changed or left out while reading, a sentence each."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the categories in order of their ids."""
        return tuple(category["name"] for category in self.splits["train"].coco["categories"])


class _Layout(NamedTuple):
    title: str
    """What it looks for, for messages."""
    sources: Callable[[epath.Path], list[Source]]
    """The sources in a folder, without reading them; empty if the folder has another layout."""


LAYOUTS: Mapping[str, _Layout] = {
    "coco": _Layout(
        "COCO JSON: {train,valid,test}/_annotations.coco.json, annotations/{train,valid,test}.json or instances_*.json beside "
        "images/, annotations_without_background.json",
        coco_folders.sources,
    ),
    "voc": _Layout("Pascal VOC: Annotations/*.xml beside JPEGImages/, or XML files beside the images", voc.sources),
    "yolo": _Layout("YOLO: data.yaml, or labels/ with classes.txt beside images/", yolo.sources),
    "odvg": _Layout("ODVG: JSON lines with a label map", odvg.sources),
    "labelme": _Layout("LabelMe: a JSON file beside each image", labelme.sources),
    "label-studio": _Layout("Label Studio: its export as JSON or JSON-MIN beside images/", label_studio.sources),
}
"""Every layout that `find` knows."""


def find(folder: epath.PathLike, layout: str = "") -> Dataset:
    """Finds and reads the data set in a folder, or in the single folder in it that has one.

    `layout`: a name in LAYOUTS to look for that one only. Raises LayoutError, which says what was looked for, if there is no
    data set or several, no images, no box to train on, or names that occur twice; SourceError for files that cannot be read.
    """
    root = epath.Path(gcs.address(folder))
    if layout and layout not in LAYOUTS:
        raise LayoutError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    kind = gcs.kind(root)
    if kind != "folder":
        found = f"is a file (its folder is {root.parent})" if kind else "does not exist"
        raise LayoutError(f"{root} {found}: expected the folder of a data set, with its annotations and its images")
    wanted = {name: LAYOUTS[name] for name in ([layout] if layout else LAYOUTS)}
    place, name, sources = _located(root, wanted, _DEPTH)
    report = Report()
    if not any(source.split == "train" for source in sources):
        there = ", ".join(f"{source.split} ({source.path.name})" for source in sources)
        raise LayoutError(
            f"{place} has no training set, but {there}: expected annotations of a name with 'train' in it"
        )
    splits = _without_crowds([read_split(source, place, report) for source in sources], report)
    dataset = _one_list(Dataset(name, str(place), {split.name: split for split in splits}))
    if not dataset.splits["train"].boxes:
        raise LayoutError(
            f"{dataset.splits['train'].source}: no image of the training set has a box: nothing can be learned from it"
        )
    mended = [
        f"{what}: {count} (first: {report.first[what]})" for what, count in (report.dropped + report.noted).items()
    ]
    where = [] if place == root else [f"the data set is in {place}"]
    said = [source.note for source in sources if source.note]
    return replace(dataset, notes=(*where, *said, *mended, *_left_out(splits), *dataset.notes))


def _without_crowds(splits: list[Split], report: Report) -> list[Split]:
    """The splits with crowds as single objects, noted, if most boxes are crowds."""
    notes = [note for split in splits for note in split.coco["annotations"]]
    crowds = [note for note in notes if note.get("iscrowd") in (1, True, "1")]
    if len(crowds) <= _CROWDS * len(notes):
        return splits
    what = "box: crowd, kept as one object, as most are (the masks of CVAT and SAM)"
    report.note(what, f"annotation {crowds[0].get('id')}", len(crowds))
    singles = [[{**note, "iscrowd": 0} for note in split.coco["annotations"]] for split in splits]
    return [replace(split, coco={**split.coco, "annotations": own}) for split, own in zip(splits, singles)]


def _left_out(splits: Iterable[Split]) -> Iterator[str]:
    """Notes on images that lie in the folders of the images, and that no annotation lists."""
    used: dict[str, set[str]] = {}
    for split in splits:
        used.setdefault(split.images, set()).update(image["file_name"] for image in split.coco["images"])
    everything = {f"{folder}/{name}" for folder, names in used.items() for name in names}
    for folder in used:
        others = [name for name in images_below(epath.Path(folder)) if f"{folder}/{name}" not in everything]
        if others:
            yield f"{len(others)} images in {folder} have no annotations: left out (first: {others[0]})"


def _located(root: epath.Path, wanted: Mapping[str, _Layout], depth: int) -> tuple[epath.Path, str, list[Source]]:
    """Folder, layout and sources of the one data set in `root` or below it."""
    level = [root]
    for _ in range(depth + 1):
        found, refused = [], []
        for place in level:
            try:
                found += [(place, *match) for match in _matches(place, wanted)]
            except LayoutError as error:
                refused.append(error)
        if len(found) + len(refused) == 1:
            for error in refused:
                raise error
            return found[0]
        if found or refused:
            sets = [f"{name} in {place} ({_said(sources)})" for place, name, sources in found] + [*map(str, refused)]
            more = f" and {len(sets) - 4} more" if len(sets) > 4 else ""
            remedy = f", or its layout with --layout={found[0][1]}" if len({name for _, name, _ in found}) > 1 else ""
            raise LayoutError(
                f"{root} has {len(sets)} data sets: {'; '.join(sets[:4])}{more}; give the folder of one of them{remedy}"
            )
        level = [below for place in level for below in folders_below(place)][:_FOLDERS]
    titles = "; ".join(layout.title for layout in wanted.values())
    has = ", ".join(sorted(name for names in entries(root) for name in names)[:8]) or "nothing"
    raise LayoutError(
        f"{root} has no data set that can be read; it has {has} ({len(images_below(root))} images){_hint(root)}; looked for: {titles}"
    )


def _hint(root: epath.Path) -> str:
    """What lies in a folder instead of a data set, where that is known."""
    files = files_with(root, *_TEXTS)
    for path in (*files[:_FILES], root):
        if (found := explain(path)) and "image" not in found and "such as" not in found:
            return f"; {path.name} {found}"
    return ""


def _matches(place: epath.Path, wanted: Mapping[str, _Layout]) -> list[tuple[str, list[Source]]]:
    found = [(name, layout.sources(place)) for name, layout in wanted.items()]
    return [(name, _with_train(sources)) for name, sources in found if sources]


def _with_train(sources: list[Source]) -> list[Source]:
    """The sources in order; one of which no split is named is the training set."""
    named = [source._replace(split=source.split or "train") for source in sources]
    return sorted(named, key=lambda source: SPLITS.index(source.split))


def _said(sources: Iterable[Source]) -> str:
    return ", ".join(source.path.name for source in sources)


def read_split(
    source: Source, folder: epath.Path, report: Report, categories: list[dict[str, Any]] | None = None
) -> Split:
    """Reads a source; its images are found and its ids mended. Raises SourceError if that cannot be done.

    `categories`: the list of the data set, which the source is to have; its own ids are replaced by those of the same names.
    """
    where = str(source.path)
    coco = _checked(source.read(report), where)
    images, kept, missing = _found_images(coco["images"], source, folder, report)
    lost = [note for note in coco["annotations"] if note["image_id"] in missing]
    report.drop(
        f"box of {source.split}: image file missing", f"annotation {lost[0].get('id')}" if lost else "", len(lost)
    )
    annotations = _numbered([note for note in coco["annotations"] if note["image_id"] not in missing], where, report)
    split = Split(source.split, {**coco, "images": kept, "annotations": annotations}, str(images), where)
    if categories is None:
        return split
    known = {category["name"] for category in categories}
    if unknown := [str(item["name"]) for item in coco["categories"] if str(item["name"]) not in known]:
        raise LayoutError(f"{where}: the category {unknown[0]!r} is none of the data set: expected {sorted(known)[:5]}")
    return _with_categories(split, categories)


def _checked(coco: Mapping[str, Any], where: str) -> dict[str, list[dict[str, Any]]]:
    """The lists with ids that are numbers or texts; SourceError for objects that lack a field, and for ids that occur twice."""
    for key, required in (
        ("images", ("id", "file_name")), ("annotations", ("image_id", "category_id", "bbox")), ("categories", ("id", "name"))
    ):  # fmt: skip
        for number, item in enumerate(coco[key]):
            place = f"{where}: {key}[{number}]"
            if missing := [field for field in required if item.get(field) is None]:
                raise SourceError(f"{place} lacks {', '.join(missing)}")
            for field in required:
                if field == "category_id" and not isinstance(item[field], int | float | str):
                    item[field] = f"{item[field]!r:.40}"  # of no category: the reader counts it
                elif field.endswith("id"):
                    item[field] = identity(item, field, place)
                elif field.endswith("name") and not isinstance(item[field], str | int):
                    raise SourceError(f"{place} has the {field} {item[field]!r:.40}, expected text")
    if not coco["images"]:
        raise LayoutError(f"{where}: 'images' is empty: expected the images of the set")
    for key, field in (("images", "id"), ("categories", "id"), ("categories", "name")):
        twice = [value for value, count in Counter(str(item[field]) for item in coco[key]).items() if count > 1]
        if twice:
            remedy = "give each its own name in the annotation tool" if field == "name" else "ids must be unique"
            raise LayoutError(f"{where}: the {field} {twice[0]!r} occurs twice in {key}: {remedy}")
    return {key: coco[key] for key in ("images", "annotations", "categories")}


def _found_images(
    listed: list[dict[str, Any]], source: Source, folder: epath.Path, report: Report
) -> tuple[epath.Path, list[dict[str, Any]], set[Any]]:
    """The folder of the images, the images whose files exist in it, with their paths there, and the ids of the others."""
    sample = listed[:: max(1, len(listed) // _TRIED)]
    counts = [_count(sample, place) for place in source.images]
    if not max(counts):
        places = ", ".join(str(place.relative_to(folder)) if place != folder else "." for place in source.images[:6])
        raise LayoutError(
            f"{source.path} lists {len(listed)} images, and none of them is there (first: {listed[0]['file_name']!r}; looked in "
            f"{places} of {folder}): put the images beside the annotations, in images/ or in a folder of the split's name"
        )
    best = source.images[counts.index(max(counts))]
    kept, missing = located(listed, best)
    first = f"{missing[0]['file_name']!r}" if missing else ""
    if 2 * len(missing) > len(listed):
        raise LayoutError(
            f"{source.path} lists {len(listed)} images, and {len(missing)} of them are not in {best} (first: {first})"
        )
    report.drop(f"image of {source.split}: file missing", first, len(missing))
    return best, kept, {image["id"] for image in missing}


def _count(images: list[dict[str, Any]], folder: epath.Path) -> int:
    """How many of the images are in a folder; 0 if two of them would be read from one file there."""
    try:
        return len(located(images, folder)[0])
    except SourceError:
        return 0


def _numbered(annotations: list[dict[str, Any]], where: str, report: Report) -> list[dict[str, Any]]:
    """The annotations, with ids from 1 if an id is missing, occurs twice, or is 0, which COCO's evaluation takes for none."""
    ids = [item.get("id") for item in annotations]
    twice = len({str(identity) for identity in ids}) < len(ids)
    if not twice and all(
        isinstance(one, int | str) and not isinstance(one, bool) and one not in (0, "0") for one in ids
    ):
        return annotations
    what = "annotation: ids that are missing, 0 or not unique, all numbered anew"
    first = next((i for i, count in Counter(map(str, ids)).items() if count > 1), "0")
    report.note(what, f"{where}, id {first}", len(ids))
    return [{**item, "id": number} for number, item in enumerate(annotations, 1)]


def _one_list(dataset: Dataset) -> Dataset:
    """The data set with one list of categories for all splits, whose ids are as in the files, or from 1 where these do not fit.

    Dummies without a box are left out: the supercategory of others, and class 0 that alone has none, as Roboflow writes it.
    """
    splits = list(dataset.splits.values())
    used, above = set(), set()
    for split in splits:
        listed, notes = split.coco["categories"], split.coco["annotations"]
        known = {category["id"] for category in listed}
        check_ids(known, Counter(note["category_id"] for note in notes), split.source)
        own = {str(category["id"]): str(category["name"]) for category in listed}
        used |= {own.get(str(note["category_id"])) for note in notes}
        above |= {_above(category) for category in listed if _above(category) != str(category["name"])}
    by_name: dict[str, dict[str, Any]] = {}
    said = []
    for category in (category for split in splits for category in split.coco["categories"]):
        name = str(category["name"])
        top = as_integer(category["id"]) == 0 and not _above(category)
        if name not in used and (name in above or (top and _is_alone(category, splits))):
            said.append(f"category {category['id']}, {name!r}, has no box: left out as a dummy class")
        else:
            plain = {key: value for key, value in category.items() if key != "supercategory"}
            by_name.setdefault(name, plain | {"name": name})
    ids = [category["id"] for category in by_name.values()]
    same = all(_fits(by_name, category) for split in splits for category in split.coco["categories"])
    if not same or len(set(ids)) < len(ids):
        new = {name: number for number, name in enumerate(by_name, 1)}
        zero = {as_integer(identity) for identity in ids} == set(range(len(ids)))
        what = "count from 0" if zero else "are not the same numbers from 1 in all splits"
        if dataset.layout == "coco":  # YOLO and ODVG count from 0
            said.append(f"category ids {what}: numbered from 1")
    else:
        new = {name: category["id"] for name, category in by_name.items()}
    categories = [
        {**category, "name": name, "id": new[name]} | ({} if new[name] == category["id"] else {"listed_id": category["id"]})
        for name, category in by_name.items()
    ]  # fmt: skip
    categories.sort(key=lambda category: category["id"])
    changed = {split.name: _with_categories(split, categories) for split in splits}
    return replace(dataset, splits=changed, notes=(*dataset.notes, *dict.fromkeys(said)))


def _with_categories(split: Split, categories: list[dict[str, Any]]) -> Split:
    """The split with this list of categories; its annotations get the ids of the names that they have."""
    new = {category["name"]: category["id"] for category in categories}
    own = {str(category["id"]): new.get(str(category["name"])) for category in split.coco["categories"]}
    moved = any(own.get(str(category["id"])) != category["id"] for category in split.coco["categories"])
    annotations = [
        {**note, "category_id": own.get(str(note["category_id"])) or f"not listed: {note['category_id']}"}
        if moved
        else note
        for note in split.coco["annotations"]
    ]
    return replace(split, coco={**split.coco, "categories": categories, "annotations": annotations})


def _above(category: Mapping[str, Any]) -> str:
    """The supercategory; "" where there is none."""
    name = str(category.get("supercategory") or "")
    return "" if name.lower() == "none" else name


def _is_alone(category: Mapping[str, Any], splits: Iterable[Split]) -> bool:
    """Whether all other categories have a supercategory."""
    others = [other for split in splits for other in split.coco["categories"] if other["name"] != category["name"]]
    return bool(others) and all(map(_above, others))


def _fits(by_name: Mapping[str, dict[str, Any]], category: Mapping[str, Any]) -> bool:
    """Whether the id of a category is a number from 1, and the same as in the other splits."""
    known = by_name.get(str(category["name"]))
    identity = category["id"]
    return known is None or (isinstance(identity, int) and identity >= 1 and known["id"] == identity)


def carve(dataset: Dataset, share: float = 0.1, seed: int = 0) -> Dataset:
    """The data set with a validation set: `share` of the training images, drawn by `seed`; unchanged if it has one.

    At least one image with a box goes into each part. Raises LayoutError if the training set has fewer than two such images.
    """
    if "valid" in dataset.splits:
        return dataset
    train = dataset.splits["train"]
    boxed = {str(note["image_id"]) for note in train.coco["annotations"]}
    order = sorted(train.coco["images"], key=lambda image: (isinstance(image["id"], str), image["id"]))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda image: str(image["id"]) not in boxed)  # stable: those with a box come first
    with_box = sum(str(image["id"]) in boxed for image in order)
    if with_box < 2:
        raise LayoutError(
            f"{train.source} has {len(order)} images, {with_box} with a box, and no validation set: expected at least 2 images with "
            "boxes, one to train on and one to choose the checkpoint by"
        )
    boxed_count = min(max(1, round(share * with_box)), with_box - 1)
    taken = [*order[:boxed_count], *order[with_box : with_box + round(share * (len(order) - with_box))]]
    chosen = {str(image["id"]) for image in taken}
    splits = {"train": _part(train, "train", chosen, False), "valid": _part(train, "valid", chosen, True)}
    if "test" in dataset.splits:
        splits["test"] = dataset.splits["test"]
    note = (
        f"no validation set: {len(taken)} of the {len(order)} training images, drawn with seed {seed}, are taken for it"
    )
    return replace(dataset, splits=splits, notes=(*dataset.notes, note))


def _part(split: Split, name: str, chosen: set[str], inside: bool) -> Split:
    """The images of a split that are among `chosen`, or the others, with their annotations."""
    images = [image for image in split.coco["images"] if (str(image["id"]) in chosen) == inside]
    notes = [note for note in split.coco["annotations"] if (str(note["image_id"]) in chosen) == inside]
    return replace(split, name=name, coco={**split.coco, "images": images, "annotations": notes})
