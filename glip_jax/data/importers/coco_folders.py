"""Finds the files of COCO's form in a folder of own data: Roboflow, ODinW, COCO's own layout, exports of CVAT and Label Studio.

{train,valid,test}/_annotations.coco.json                          beside the images of the split (Roboflow)
{train,valid,test}/annotations_without_background.json             beside the images of the split (ODinW)
{train,val,test}_annotations_without_background.json               beside all images (ODinW, "export")
annotations/{train,valid,test}.json, annotations/instances_*.json  images in images/, images/SPLIT/ or SPLIT/
FILE.json                                                          one file of all images: no split is named
"""

import json
from typing import Any

from etils import epath

from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.sources import (
    ANNOTATIONS,
    Source,
    files_with,
    folders_below,
    image_folders,
    one_per_split,
    split_of,
)
from glip_jax.io import text_files
from glip_jax.io.formats import recognize

__all__ = ["read_coco", "read_json", "sources"]

_BESIDE = {"annotations_without_background.json": 3, "_annotations.coco.json": 2}
"""File names of annotations that lie beside their images, with their rank: ODinW has both."""

_OTHER = ("captions", "fewshot", "image_info", "panoptic", "person_keypoints", "stuff")
"""Files of other tasks in COCO's form, by the beginning of their names."""


def sources(folder: epath.Path) -> list[Source]:
    """The annotation files in a folder by split; empty if there is none. Raises LayoutError if a split has several."""
    below = folders_below(folder)
    places = [(folder, ""), *((place, "") for place in below if place.name.lower() in ANNOTATIONS)]
    for place in below:
        if split := split_of(place.name):
            places += [(place, split)] + [
                (one, split) for one in folders_below(place) if one.name.lower() in ANNOTATIONS
            ]
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


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file; SourceError if it cannot be read."""
    try:
        return json.loads(text_files.decoded(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SourceError(f"{path} cannot be read as JSON ({reason!s:.200}): repair it or copy it again") from None


def _files(folder: epath.Path) -> list[epath.Path]:
    named = [file for file in files_with(folder, ".json") if not file.name.startswith(_OTHER)]
    found = [(file, recognize(file)) for file in named]
    return [file for file, form in found if form is not None and form.reader in ("coco", "lvis")]


def _source(file: epath.Path, split: str, folder: epath.Path) -> Source:
    rank = max((r for name, r in _BESIDE.items() if file.name.endswith(name)), default=0)
    return Source(split, file, image_folders(file, split, folder), lambda _: read_coco(file), rank=rank)


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
