"""Detections in COCO's results format, with the annotation file that says what their ids mean; written by `predict`, `label`, `evaluate`.

NAME.json               the results: a list of image_id, category_id, bbox (x, y, width, height in pixels) and score
NAME_annotations.json   images, categories, and the same boxes as annotations with their scores

The first is for pycocotools' loadRes, `score`, `label --detections` and FiftyOne's add_coco_labels; the second is what these want
beside it, and what tools that import annotations take alone. A box of corners x1 and x2 is x2 - x1 + 1 wide, as everywhere here.
"""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from glip_jax.cli.command_line import CommandLineError
from glip_jax.structures import boxes as box

__all__ = ["DetectedImage", "annotation_file", "check_target", "result_rows", "write"]

logger = logging.getLogger(__name__)


class DetectedImage(NamedTuple):
    """An image and its rows of the results."""

    entry: dict[str, Any] | None
    """id, file_name, height, width; more where there is more to say. None: of an image that came before."""
    rows: list[dict[str, Any]]
    """See `result_rows`."""


def annotation_file(path: str) -> epath.Path:
    """The file of images and categories beside the results `path`: NAME_annotations.json of NAME.json."""
    results = epath.Path(path)
    return results.parent / f"{results.stem}_annotations.json"


def result_rows(
    image_id: Any, boxes: Float[np.ndarray, "N 4"], scores: Sequence[float], category_ids: Sequence[Any]
) -> list[dict[str, Any]]:
    """Rows of COCO's results for the boxes of one image: xyxy in pixels, inclusive corners."""
    return [
        {
            "image_id": image_id,
            "category_id": category,
            "bbox": [round(float(value), 2) for value in xywh],
            "score": round(float(score), 5),
        }
        for xywh, score, category in zip(
            box.to_coco_xywh(np.asarray(boxes, np.float64).reshape(-1, 4)), scores, category_ids, strict=True
        )
    ]


def check_target(path: str, folder: str, files: Collection[str] | None = None) -> None:
    """Raises CommandLineError unless `path` can be written: another ending, a folder that cannot be made, detections of other images.

    The same command may be given again, also after a stop: what it wrote before is replaced. `folder`: of the images; `files`: their
    `file_name`s where they are known.
    """
    results = epath.Path(path)
    if results.suffix != ".json":
        raise CommandLineError(f"--coco={path}: expected a name that ends in .json")
    if results.is_dir():
        raise CommandLineError(f"--coco={path} is a folder: expected the name of a file")
    try:
        results.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandLineError(f"--coco={path} cannot be written ({error}): give another path") from None
    if "://" not in path and not os.access(results.parent, os.W_OK):
        raise CommandLineError(f"--coco={path} cannot be written: no permission in {results.parent}; give another path")
    beside = annotation_file(path)
    there = [str(file) for file in (results, beside) if file.exists()]
    if not there:
        return
    where, names = _listed(beside)
    if where != folder or (files is not None and not names <= set(files)):
        found = "nothing that this job wrote" if where is None else f"detections of other images, of {where}"
        raise CommandLineError(
            f"--coco={path}: {' and '.join(there)} exist{'s' if len(there) == 1 else ''} and hold{'s' if len(there) == 1 else ''} {found}: "
            "give another name, or remove it first"
        )


def _listed(path: epath.Path) -> tuple[str | None, set[str]]:
    """The folder and the file names of the images of an annotation file that `write` made; None for another file."""
    try:
        content = json.loads(path.read_text())
        return str(content["info"]["image_folder"]), {image["file_name"] for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None, set()


def write(path: str, folder: str, categories: Sequence[dict[str, Any]], images: Iterable[DetectedImage]) -> None:
    """Writes both files, the results last, each aside and renamed, and logs what they hold.

    `folder`: to which the `file_name`s are relative. `categories`: id and name; `images`, which is read once, may add to them.
    Raises OSError if they cannot be written.
    """
    entries, count = [], 0
    with _aside(epath.Path(path)) as results, _aside(annotation_file(path)) as annotations:
        results.write("[")
        annotations.write('{"annotations": [')
        for image in images:
            entries += [image.entry] if image.entry else []
            for row in image.rows:
                comma, count = "," if count else "", count + 1
                area = round(row["bbox"][2] * row["bbox"][3], 2)
                results.write(f"{comma}\n{json.dumps(row, allow_nan=False)}")
                # CVAT's reader takes no annotation without a segmentation.
                full = {"id": count, **row, "segmentation": [], "area": area, "iscrowd": 0}
                annotations.write(f"{comma}\n{json.dumps(full, allow_nan=False)}")
        results.write("]\n")
        annotations.write("]")
        about = {"description": "detections by glip_jax, not made by people", "image_folder": folder}
        for key, value in (("info", about), ("images", entries), ("categories", list(categories))):
            annotations.write(f', "{key}": {json.dumps(value, allow_nan=False, ensure_ascii=False)}')
        annotations.write("}\n")
    logger.info(f"COCO results: {path}, boxes {count}; images {len(entries)} and categories: {annotation_file(path)}")
    if not count:
        logger.warning(f"note: {path} is an empty list, which pycocotools' loadRes cannot read")


@contextlib.contextmanager
def _aside(path: epath.Path) -> Iterator[Any]:
    """A text file to write to that becomes `path` at the end; nothing is left if anything stops that."""
    if "://" in str(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "content"
            with local.open("w", encoding="utf-8") as stream:
                yield stream
            path.write_bytes(local.read_bytes())
        return
    # Of this process alone: all that label together write the same.
    unfinished = path.parent / f"{path.name}.{os.getpid()}.unfinished"
    try:
        with unfinished.open("w") as stream:
            yield stream
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
