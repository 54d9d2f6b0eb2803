"""Finds the image of an outside detector's file that a record shows, by file name or by id, or says why it is not certain.

Ids and file names are different things: an image with the id 1 is not the file 1.jpg, and neither is the record of line 1. A
record of captions keeps the path of its image and, where its source numbers images, that id (`Record.file`, `image_id`).
"""

import re
from collections import defaultdict
from pathlib import PurePosixPath
from typing import Literal

from glip_jax.data.importers.coco_json import ImagePaths

__all__ = ["ListedImages", "Match"]

Match = Literal["", "id", "name"]
"""How records are matched with images: by path, and by id where one side has no path; by id alone; by file name without folders."""

_LINE = re.compile(r"[1-9][0-9]*(\.[1-9][0-9]*)?")
"""Id of a record that an import numbered by line."""

_NOT_LISTED = "image: not among the detections"


class ListedImages:
    """Images of an annotation file by id and by path."""

    def __init__(self, match: Match = "") -> None:
        self._match = match
        self._files: dict[str, tuple[str, ...]] = {}
        """Parts of the path by image id; empty where none is listed."""
        self._named: defaultdict[str, list[str]] = defaultdict(list)
        """Image ids by file name, and by file name without extension."""

    def add(self, image: str, file: str) -> bool:
        """Adds an image; False if its id is there already. `file`: its path, "" if unknown."""
        if image in self._files:
            return False
        self._files[image] = tuple(ImagePaths.parts(file)) if file else ()
        for name in {form for last in self._files[image][-1:] for form in (last, _stem(last))}:
            self._named[name].append(image)
        return True

    def add_unlisted(self, key: int | str) -> str:
        """The id of an image that a detection names. If it is not listed and no number, it may be the name of a file."""
        if str(key) not in self._files:
            self.add(str(key), key if isinstance(key, str) and not _LINE.fullmatch(key) else "")
        return str(key)

    def find(self, record: str, file: str, image_id: str) -> tuple[str | None, str]:
        """The id of the image that a record shows, or None and the reason.

        `record`: its id; `file`: path of its image, `image_id`: id in its source; both empty in records of earlier versions.
        """
        if not file and not image_id:
            before, has_caption, _ = record.rpartition("#")
            image_id, file = (
                (before, "") if has_caption else ("", record)
            )  # IMAGE#CAPTION, or a name without its extension
            if self._match == "id":
                image_id = image_id or record
            elif _LINE.fullmatch(file):
                return None, "image: numbered by line in an earlier import, import these captions again (or --match=id)"
        listed = image_id if image_id in self._files else None
        if self._match == "id":
            return listed, "" if listed else _NOT_LISTED
        found = self._by_path(tuple(ImagePaths.parts(file))) if file else []
        if self._match == "name" or not found:
            if self._match == "name" and file:
                found = self._named.get(ImagePaths.parts(file)[-1], [])
            elif listed and file and self._files[listed]:
                return None, "image: its id is that of another file (--match=id if the ids mean the same images)"
            elif listed:
                found = [listed]
        if len(found) != 1:
            return None, "image: its file name is that of several images of the detections" if found else _NOT_LISTED
        parts, own = self._files[found[0]], ImagePaths.parts(file) if file else []
        if self._match == "" and own and listed != found[0] and parts != tuple(own):
            if listed:
                return (
                    None,
                    "image: its id and its file name are those of different images (--match=id or --match=name)",
                )
            if len(own) > len(parts):
                return None, "image: the detections name its file without its folder (--match=name if names are unique)"
        return found[0], ""

    def _by_path(self, own: tuple[str, ...]) -> list[str]:
        """Images of the same path, else those whose path ends with this one, or this one with theirs."""
        named = dict.fromkeys(self._named.get(own[-1], []))
        # A name that is listed without its extension.
        named |= dict.fromkeys(i for i in self._named.get(_stem(own[-1]), []) if self._files[i][-1] == _stem(own[-1]))
        images = [(image, self._files[image]) for image in named]
        same = [image for image, parts in images if parts == own]
        return same or [image for image, parts in images if _ends_alike(parts[:-1], own[:-1])]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _ends_alike(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether the shorter of two sequences is the end of the other."""
    length = min(len(one), len(other))
    return not length or one[-length:] == other[-length:]
