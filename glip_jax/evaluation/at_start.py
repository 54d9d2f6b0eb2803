"""What can be known of an evaluation set before a long run that evaluates it: whether its images are there, and its metrics."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from glip_jax import UserError
from glip_jax.config import EvaluationSet
from glip_jax.evaluation.absent_names import scalar_names
from glip_jax.evaluation.average_precision import NUMBERS, GroundTruth
from glip_jax.evaluation.recall import GroundingTruth, phrase_recall
from glip_jax.io.paths import OutsideError, within
from glip_jax.structures.batch import Detections

__all__ = ["MissingImagesError", "check_images", "metric_names"]

_AREAS = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
"""Of COCO: areas of small, medium and large boxes, both ends included."""
_THREADS = 16


class MissingImagesError(UserError, ValueError):
    """Images of an evaluation set that are not in its folder."""


def check_images(where: str, dataset: EvaluationSet, entries: Sequence[Mapping[str, Any]]) -> None:
    """Looks for the file of every entry of `images`; `where` names the set.

    Raises MissingImagesError with their number and the first of those that are missing, empty or no files.
    """
    folder = epath.Path(dataset.images)

    def fault(entry: Mapping[str, Any]) -> str:
        name = str(entry.get("file_name", f"image {entry['id']} without file_name"))
        try:
            path = within(folder, name)
            size = path.stat().length
        except OutsideError as error:
            return str(error)
        except OSError:
            return f"{name} is missing"
        return "" if size and not path.is_dir() else f"{name} is {'empty' if not size else 'a folder'}"

    with ThreadPoolExecutor(_THREADS) as pool:
        faults = [line for line in pool.map(fault, entries) if line]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise MissingImagesError(
            f"{where}: {len(faults)} of {len(entries)} images in {dataset.images} cannot be evaluated: {', '.join(faults[:5])}{more}; "
            f"put the files there, correct {where}.images, or take the images out of {dataset.annotations}"
        )


def metric_names(truth: GroundTruth | GroundingTruth, max_images: int = 0) -> list[str]:
    """Names of the metrics of a set, without `evaluation/SET/`, that do not depend on the detections.

    COCO defines the metrics of small, medium and large boxes only where the evaluated images have such boxes.
    """
    match truth:
        case GroundingTruth():
            none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
            images = truth.images[:max_images] if max_images else truth.images
            recall = phrase_recall((image.phrases, none) for image in images if image.phrases)
            return [*recall.numbers, *(f"{kind}/phrases" if kind else "phrases" for kind in recall.phrases), "images"]
        case GroundTruth():
            entries = truth.content["images"]
            chosen = {entry["id"] for entry in (entries[:max_images] if max_images else entries)}
            areas = [a["area"] for a in truth.content["annotations"] if a["image_id"] in chosen and not a["iscrowd"]]
            sizes = {s for s, (low, high) in _AREAS.items() if any(low <= area <= high for area in areas)}
            names = [name for name in NUMBERS if areas and (name[-1] not in _AREAS or name[-1] in sizes)]
            lists = any(names.known_absent for key, names in truth.listed.items() if key in chosen)
            absent = scalar_names(bool(areas)) if lists else []
            return [*names, *(["AP50_permuted"] if areas and len(truth.category_ids) > 1 else []), *absent, "images"]
