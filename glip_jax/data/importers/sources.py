"""What the readers of own data share: the names of splits, the files that a layout finds, image files by their names."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath

from glip_jax import UserError
from glip_jax.data.importers.coco_json import ImagePaths
from glip_jax.data.importers.entry import Report, SourceError, as_numbers, one_line
from glip_jax.io import gcs
from glip_jax.io.image_files import ENDINGS

__all__ = [
    "ANNOTATIONS", "SPLITS", "LayoutError", "Source", "by_stem", "coco_form", "entries", "files_with", "folders_below", "image_folders", "images_below", "located",
    "one_per_split", "split_of",
]  # fmt: skip

ANNOTATIONS = ("annotation", "annotations", "annots", "anns", "json", "jsons", "labels")
"""Names of folders of annotation files."""

SPLITS = ("train", "valid", "test")

_WORDS = {
    "train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
    "minival": "valid", "test": "test", "testing": "test",
}  # fmt: skip

_MOST = 200_000
"""Files of a folder that are looked at."""


_FEW = 20
"""Folders of no telling name in which images are looked for."""


class LayoutError(SourceError):
    """A folder in which no data set is found, or several, or one that cannot be used."""

    def __init__(self, message: str) -> None:
        UserError.__init__(self, one_line(message, 3000))  # it lists every layout


class Source(NamedTuple):
    """The annotations of one split in a folder."""

    split: str
    """"train", "valid" or "test"; "" where nothing names it."""
    path: epath.Path
    """The annotation file, or the folder of annotation files."""
    images: tuple[epath.Path, ...]
    """Folders in which the images may be, the likeliest first."""
    read: Callable[[Report], dict[str, Any]]
    """Returns COCO's form: images, annotations, categories; raises SourceError. `file_name` is relative to one of `images`."""
    note: str = ""
    """What the user should know of the layout, a sentence."""
    rank: int = 0
    """Of several sources of one split the highest rank is taken; several of that rank are refused."""


def split_of(name: str) -> str:
    """The split that the name of a file or folder says; "" if it says none, or several.

    A name says it as a word, with a year or without one: `train`, `instances_val2017`, `Validation`, `mini_val`.
    """
    words = re.findall(r"[a-z]+", name.lower())
    found = {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 else ""


def entries(folder: epath.Path) -> tuple[list[str], list[str]]:
    """The names of the files and of the folders in a folder, sorted, without hidden ones."""
    if gcs.is_remote(folder):
        found = [(path.name, path.is_dir()) for path in folder.iterdir()]
    else:
        with os.scandir(folder) as listing:  # iterdir makes a path of each of maybe 100,000 images
            found = [(entry.name, entry.is_dir()) for entry in listing]
    shown = sorted(pair for pair in found if not pair[0].startswith((".", "__MACOSX")))
    return [name for name, is_folder in shown if not is_folder], [name for name, is_folder in shown if is_folder]


def folders_below(folder: epath.Path) -> list[epath.Path]:
    """The folders in a folder, in order of their names, without hidden ones."""
    return [folder / name for name in entries(folder)[1]]


def files_with(folder: epath.Path, *endings: str) -> list[epath.Path]:
    """The files in a folder whose names end so, in order, without hidden ones."""
    return [folder / name for name in entries(folder)[0] if name.lower().endswith(endings)]


def images_below(folder: epath.Path) -> list[str]:
    """Paths of the image files in a folder and below it, relative to it, in order."""
    found: list[str] = []
    queue = [""]
    while queue and len(found) < _MOST:
        place = queue.pop(0)
        files, folders = entries(folder / place)
        found += [place + name for name in files if name.lower().endswith(ENDINGS)]
        queue += [f"{place}{name}/" for name in folders]
    return sorted(found)


def by_stem(images: Iterable[str]) -> dict[str, str]:
    """The path of each image by its path without the ending, and by its name alone where only one image has that."""
    whole: dict[str, str] = {}
    alone: dict[str, list[str]] = {}
    for path in images:
        stem = path.rpartition(".")[0]
        whole.setdefault(stem, path)
        alone.setdefault(stem.rpartition("/")[2], []).append(path)
    return {stem: paths[0] for stem, paths in alone.items() if len(paths) == 1} | whole


def coco_form(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], names: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """COCO's form of annotations whose `category_id` is a name, or a key of `names`; ids count from 1, names in order.

    Without `names` the categories are the names that occur, sorted.
    """
    if names is None:
        ordered = sorted({note["category_id"] for note in annotations})
        order = {name: number for number, name in enumerate(ordered, 1)}
        categories = [{"id": number, "name": name} for name, number in order.items()]
        annotations = [{**note, "category_id": order[note["category_id"]]} for note in annotations]
    else:
        categories = [{"id": number, "name": name} for number, name in names.items()]
    numbered = [
        {"id": number, "iscrowd": 0, "area": _area(note["bbox"]), **note} for number, note in enumerate(annotations, 1)
    ]
    return {"images": images, "annotations": numbered, "categories": categories}


def _area(box: list[Any]) -> float:
    values = as_numbers(box, 4)
    return 0.0 if values is None else max(values[2], 0.0) * max(values[3], 0.0)


def located(
    images: Iterable[Mapping[str, Any]], folder: epath.Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images whose files are in a folder, with their paths there as `file_name`, and those that are not.

    `file_name` of an image is looked for as `ImagePaths` does. With the key `names`, which is removed, so are these; then each
    without its ending, anywhere in the folder.
    """
    paths, stems = ImagePaths(folder), None
    found, missing = [], []
    for image in images:
        others = image.get("names")
        kept = {key: value for key, value in image.items() if key != "names"}
        names = [str(kept["file_name"]), *(others or ())]
        path = next((name for name in map(paths.find, names) if _exists(folder, name)), None)
        if path is None and others is not None:
            stems = by_stem(images_below(folder)) if stems is None else stems
            tails = [name.replace("\\", "/").rpartition("/")[2] for name in names]
            path = next((stems[stem] for tail in tails if (stem := tail.rpartition(".")[0] or tail) in stems), None)
        if path is None:
            missing.append(kept)
        else:
            found.append(kept | {"file_name": path})
    return found, missing


def image_folders(file: epath.Path, split: str, folder: epath.Path) -> tuple[epath.Path, ...]:
    """Folders in which the images of an annotation file in `folder` may be, the likeliest first."""
    below = [path for path in folders_below(folder) if path.name.lower() not in ANNOTATIONS]
    images = [path for path in below if path.name.lower() in ("images", "image", "imgs", "data", "jpegimages")]
    of_split = [path for place in (*images, folder) for path in folders_below(place) if split_of(path.name) == split]
    inner = [path for place in of_split if split for path in folders_below(place) if path.name.lower() == "images"]
    beside = [] if file.parent.name.lower() in ANNOTATIONS else [file.parent]
    nested = [path for place in images for path in folders_below(place)[:_FEW]]
    ordered = [*beside, *inner, *(of_split if split else ()), *images, folder, *below[:_FEW], *nested, file.parent]
    return tuple(dict.fromkeys(ordered))


def _exists(folder: epath.Path, name: str) -> bool:
    return (folder / name).exists() if gcs.is_remote(folder) else os.path.exists(f"{folder}/{name}")


def one_per_split(sources: Iterable[Source], folder: epath.Path) -> list[Source]:
    """The sources of the highest rank, one for each split; LayoutError if a split has several."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.split, []).append(source)
    chosen = []
    for split, several in found.items():
        best = [source for source in several if source.rank == max(other.rank for other in several)]
        if len(best) > 1:
            names = " and ".join(str(source.path.relative_to(folder)) for source in best[:2])
            what = f"the {split} set" if split else "the data"
            raise LayoutError(
                f"{folder} has {len(best)} annotations of {what}: {names}; give a folder with one of them, or one of these files"
            )
        chosen += best
    return chosen
