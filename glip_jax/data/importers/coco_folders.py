"""Finds the files of COCO's form in a folder of own data: Roboflow, ODinW, COCO's own layout, exports of CVAT and Label Studio.

{train,valid,test}/_annotations.coco.json                          beside the images of the split (Roboflow)
{train,valid,test}/annotations_without_background.json             beside the images of the split (ODinW)
{train,val,test}_annotations_without_background.json               beside all images (ODinW, "export")
annotations/{train,valid,test}.json, annotations/instances_*.json  images in images/, images/SPLIT/ or SPLIT/
FILE.json                                                          one file of all images: no split is named
"""

import json
from typing import Any

import ijson
from etils import epath

from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.sources import Source, folders_below, one_per_split, split_of
from glip_jax.io import text_files

__all__ = ["json_kind", "read_coco", "read_json", "sources"]

_BESIDE = {"annotations_without_background.json": 3, "_annotations.coco.json": 2}
"""File names of annotations that lie beside their images, with their rank: ODinW has both."""

_OTHER = ("captions", "fewshot", "image_info", "panoptic", "person_keypoints", "stuff")
"""Files of other tasks in COCO's form, by the beginning of their names."""


def sources(folder: epath.Path) -> list[Source]:
    """The annotation files in a folder by split; empty if there is none. Raises LayoutError if a split has several."""
    places = [(below, split) for below in folders_below(folder) if (split := split_of(below.name))]
    places += [(place, "") for place in (folder, _annotations_of(folder)) if place is not None]
    found = []
    for place, split in places:
        here = [_source(file, split or split_of(file.stem), folder) for file in _files(place)]
        # ODinW's mini_val is a part of its valid.
        found += [
            source._replace(rank=-("mini" in f"{place.name} {source.path.stem}"))
            for source in one_per_split(here, folder)
        ]
    if any(source.split for source in found):
        found = [source for source in found if source.split]
    return one_per_split(found, folder)


def _annotations_of(folder: epath.Path) -> epath.Path | None:
    return next((below for below in folders_below(folder) if below.name.lower() == "annotations"), None)


def json_kind(path: epath.Path) -> str:
    """What a JSON file is, by its first keys: "coco" (boxes with categories), "labelme", "label-studio", "odvg", or ""."""
    keys: set[str] = set()
    top, image = "", False
    try:
        with path.open("rb") as file:
            for prefix, event, value in ijson.parse(file, use_float=True, multiple_values=True):
                top = top or event
                if event == "map_key" and prefix == ("item" if top == "start_array" else ""):
                    keys.add(value)
                if prefix == "images.item" and value == "caption":
                    return ""  # phrases of captions
                image |= prefix in ("images.item", "images") and event in ("end_map", "end_array")
                if (kind := _kind(keys, top)) and (image or kind != "coco"):
                    return kind
                if top not in ("start_map", "start_array") or (event == "end_map" and prefix in ("", "item")):
                    return ""
    except (ijson.JSONError, ValueError, OSError):
        pass
    return ""


def _kind(keys: set[str], top: str) -> str:
    if top == "start_array":
        return "label-studio" if {"data", "annotations"} <= keys or {"image", "annotator"} <= keys else ""
    if {"images", "annotations", "categories"} <= keys:
        return "coco"
    if "shapes" in keys and {"imagePath", "imageData"} & keys:
        return "labelme"
    return "odvg" if keys & {"filename", "file_name"} and keys & {"detection", "grounding"} else ""


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file; SourceError if it cannot be read."""
    try:
        return json.loads(text_files.decoded(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SourceError(f"{path} cannot be read as JSON ({reason!s:.200}): repair it or copy it again") from None


def _files(folder: epath.Path) -> list[epath.Path]:
    files = sorted((path for path in folder.iterdir() if path.suffix.lower() == ".json"), key=str)
    named = [file for file in files if not file.name.startswith(_OTHER) and not file.name.startswith(".")]
    return [file for file in named if json_kind(file) == "coco"]


def _source(file: epath.Path, split: str, folder: epath.Path) -> Source:
    rank = max((r for name, r in _BESIDE.items() if file.name.endswith(name)), default=0)
    rank = rank or int(file.name.startswith("instances"))
    return Source(split, file, _image_folders(file, split, folder), lambda _: read_coco(file), rank)


def _image_folders(file: epath.Path, split: str, folder: epath.Path) -> tuple[epath.Path, ...]:
    """Folders in which the images of an annotation file may be."""
    below = [path for path in folders_below(folder) if path.name.lower() not in ("annotations", "labels")]
    images = [path for path in below if path.name.lower() in ("images", "image", "imgs", "data", "jpegimages")]
    of_split = [path for place in (*images, folder) for path in folders_below(place) if split_of(path.name) == split]
    inner = [path for place in of_split if split for path in folders_below(place) if path.name.lower() == "images"]
    beside = [] if file.parent.name.lower() == "annotations" else [file.parent]
    ordered = [*beside, *inner, *(of_split if split else ()), *images, folder, *below, file.parent]
    return tuple(dict.fromkeys(ordered))


def read_coco(file: epath.Path) -> dict[str, Any]:
    """The images, annotations and categories of a file; SourceError unless these are lists of objects."""
    data = read_json(file)
    if not isinstance(data, dict):
        raise SourceError(
            f"{file} holds a {type(data).__name__}, expected an object with images, annotations, categories"
        )
    for key in ("images", "annotations", "categories"):
        items = data.get(key)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise SourceError(f"{file}: expected a list of objects under {key!r}")
    return {key: data[key] for key in ("images", "annotations", "categories")}
