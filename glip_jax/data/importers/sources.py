"""What the readers of own data share: the names of splits, the files that a layout finds, image files by their names."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epath

from glip_jax import UserError
from glip_jax.data.importers.entry import Report, SourceError, one_line
from glip_jax.io.image_files import ENDINGS

__all__ = ["SPLITS", "LayoutError", "Source", "by_stem", "folders_below", "images_below", "one_per_split", "split_of"]

SPLITS = ("train", "valid", "test")

_WORDS = {
    "train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
    "minival": "valid", "test": "test", "testing": "test",
}  # fmt: skip

_MOST = 200_000
"""Files of a folder that are looked at."""


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
    """Returns COCO's form: images, annotations, categories; raises SourceError. `file_name` is relative to a folder of `images`."""
    rank: int = 0
    """Of several sources of one split the highest rank is taken; several of that rank are refused."""


def split_of(name: str) -> str:
    """The split that the name of a file or folder says; "" if it says none, or several.

    A name says it as a word, with a year or without one: `train`, `instances_val2017`, `Validation`, `mini_val`.
    """
    words = re.findall(r"[a-z]+", re.sub(r"mini[_-]?val", "minival", name.lower()))
    found = {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 else ""


def folders_below(folder: epath.Path) -> list[epath.Path]:
    """The folders in a folder, in order of their names, without hidden ones."""
    return sorted((path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path)), key=str)


def images_below(folder: epath.Path) -> list[str]:
    """Paths of the image files in a folder and below it, relative to it, in order."""
    found: list[str] = []
    queue = [folder]
    while queue and len(found) < _MOST:
        for path in sorted(queue.pop(0).iterdir(), key=str):
            if _is_hidden(path):
                continue
            if path.suffix.lower() in ENDINGS:
                found.append(str(path.relative_to(folder)))
            elif not path.suffix and path.is_dir():
                queue.append(path)
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


def _is_hidden(path: epath.Path) -> bool:
    return path.name.startswith((".", "__MACOSX"))
