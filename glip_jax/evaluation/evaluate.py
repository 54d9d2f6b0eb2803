"""Runs a detector over COCO-style sets and measures it."""

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.average_precision import (
    AveragePrecision,
    GroundTruth,
    average_precision,
    coco_results,
    load_ground_truth,
)
from glip_jax.inference import Detector
from glip_jax.structures import Detections

__all__ = ["Evaluated", "EvaluationError", "FindsCategories", "evaluate", "evaluate_set", "prompt_names", "read_image"]


class EvaluationError(ValueError):
    """A set whose pictures or names do not fit its annotations."""


@runtime_checkable
class FindsCategories(Protocol):
    """What an evaluation needs of a detector (`glip_jax.inference.Detector`)."""

    def categories(self, images: Sequence[UInt8[np.ndarray, "H W 3"]], names: Sequence[str], /) -> Sequence[Detections]:
        """Detections per image; boxes xyxy in the image's own pixels, phrases index `names`."""
        ...


class Evaluated(NamedTuple):
    """A set, what was found in it and how good that is."""

    truth: GroundTruth
    prompts: tuple[str, ...]
    """What the detector was asked for, per category in the order of `truth.names`."""
    image_ids: tuple[int, ...]
    detections: dict[int, Detections]
    """By image id."""
    precision: AveragePrecision


def evaluate(
    config: Config, params: dict[str, Any], sets: Mapping[str, EvaluationSet] | None = None, *, progress: bool = True
) -> dict[str, float]:
    """COCO's twelve numbers of `params` on every set (default: `config.evaluation.sets`).

    Names are `evaluation/SET/AP` and so on, with `evaluation/SET/images` beside them; a number that a set has nothing
    to measure on is left out. Settings: `config.evaluation` (batch size, sides, max_images, chunk) and
    `config.detection`. Raises EvaluationError or GroundTruthError for a set that cannot be evaluated.
    """
    numbers: dict[str, float] = {}
    detector = Detector(config, params)
    for name, dataset in (config.evaluation.sets if sets is None else sets).items():
        result = evaluate_set(detector, config, dataset, name=name, progress=progress)
        found = {number: value for number, value in result.precision.numbers.items() if value >= 0}
        numbers |= {f"evaluation/{name}/{number}": value for number, value in found.items()}
        numbers[f"evaluation/{name}/images"] = float(len(result.image_ids))
    return numbers


def evaluate_set(
    detector: FindsCategories,
    config: Config,
    dataset: EvaluationSet,
    *,
    name: str = "",
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Evaluated:
    """Detects every category of `dataset` in its first `config.evaluation.max_images` images (0: all), and measures.

    Boxes are written with width x2 - x1 + 1 (glip-reference 5.2). `report` is told what the prompt names became.

    Raises:
        EvaluationError: no images, a picture that is missing, unreadable or of another size than the annotations say,
            or `dataset.names` for a category that there is not.
        GroundTruthError: the annotations are no COCO detection JSON.
    """
    truth = load_ground_truth(dataset.annotations)
    prompts = prompt_names(truth, dataset)
    if report is not None:
        report(f"{name or dataset.annotations}: {len(prompts)} categories, asked for as: {', '.join(prompts)}")
    entries = truth.content["images"]
    entries = entries[: config.evaluation.max_images] if config.evaluation.max_images else entries
    if not entries:
        raise EvaluationError(f"{dataset.annotations} lists no images: expected at least one")
    folder = epath.Path(dataset.images)
    detections: dict[int, Detections] = {}
    # A terminal gets a moving bar, a log file a line now and then.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(entries), desc=f"evaluate {name}".strip(), unit="image", disable=not progress,
              mininterval=interval, maxinterval=interval) as bar:  # fmt: skip
        # Images of one shape share a step: in file order much of each batch would be padding.
        alike = sorted(entries, key=lambda entry: entry.get("height", 1) / max(entry.get("width", 1), 1))
        for group in _groups(alike, config.evaluation.batch_size):
            images = [read_image(folder, entry) for entry in group]
            for entry, found in zip(group, detector.categories(images, prompts), strict=True):
                detections[entry["id"]] = Detections(*(np.asarray(field) for field in found))
            bar.update(len(group))
    image_ids = tuple(entry["id"] for entry in entries)
    precision = average_precision(truth, coco_results(truth, detections), list(image_ids))
    return Evaluated(truth, tuple(prompts), image_ids, detections, precision)


def prompt_names(truth: GroundTruth, dataset: EvaluationSet) -> list[str]:
    """What each category is asked for as: its name, or what `dataset.names` says instead.

    Raises:
        EvaluationError: `dataset.names` has a name that no category has, or there are no categories.
    """
    unknown = sorted(set(dataset.names) - set(truth.names))
    if unknown:
        raise EvaluationError(
            f"evaluation names {', '.join(unknown)} are no categories of {truth.path}: "
            f"expected some of {', '.join(truth.names)}"
        )
    if not truth.names:
        raise EvaluationError(f"{truth.path} has no categories: there is nothing to ask the detector for")
    return [dataset.names.get(name, name) for name in truth.names]


def read_image(folder: epath.Path, entry: dict[str, Any]) -> UInt8[np.ndarray, "H W 3"]:
    """The RGB pixels of an entry of a COCO JSON's `images`.

    Raises:
        EvaluationError: the file is missing, unreadable, or of another size than the entry says.
    """
    if "file_name" not in entry:
        raise EvaluationError(f"image {entry['id']} has no file_name: {json.dumps(entry)[:120]}")
    path = folder / entry["file_name"]
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            # No rotation by EXIF: annotations speak of the pixels as they are stored (glip-reference 4.7).
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is not there: expected the picture of image {entry['id']}") from error
    except OSError as error:
        raise EvaluationError(f"{path} is no readable picture: {error}") from error
    said = (entry.get("height", pixels.shape[0]), entry.get("width", pixels.shape[1]))
    if said != pixels.shape[:2]:
        raise EvaluationError(
            f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), the annotations say "
            f"{said[0]} x {said[1]}: boxes would not fit; use the pictures that were annotated"
        )
    return pixels


def _groups(entries: Sequence[dict[str, Any]], size: int) -> Iterator[Sequence[dict[str, Any]]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
