"""Runs a detector over sets of annotated pictures and measures it."""

import hashlib
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

from glip_jax import UserError
from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.average_precision import (
    AveragePrecision,
    GroundTruth,
    average_precision,
    coco_results,
    load_ground_truth,
    permuted_ap50,
)
from glip_jax.evaluation.recall import (
    Fitted,
    GroundingTruth,
    Recall,
    fit_caption,
    load_grounding,
    phrase_recall,
)
from glip_jax.inference import Detector
from glip_jax.structures.batch import Detections, Prompt
from glip_jax.structures.prompts import Tokenizer

__all__ = [
    "Evaluated", "EvaluationError", "Finds", "FindsCategories", "FindsPhrases", "Grounded", "check_set", "evaluate",
    "evaluate_detection", "evaluate_grounding", "evaluate_set", "prompt_names", "read_image", "scalars",
]  # fmt: skip


class EvaluationError(UserError, ValueError):
    """A set whose pictures or names do not fit its annotations."""


@runtime_checkable
class FindsCategories(Protocol):
    """What an evaluation of detection needs of a detector (`glip_jax.inference.Detector`)."""

    def categories(self, images: Sequence[UInt8[np.ndarray, "H W 3"]], names: Sequence[str], /) -> Sequence[Detections]:
        """Detections per image; boxes xyxy in the image's own pixels, phrases index `names`."""
        ...


@runtime_checkable
class FindsPhrases(Protocol):
    """What an evaluation of grounding needs of a detector (`glip_jax.inference.Detector`)."""

    tokenizer: Tokenizer

    def caption(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]], prompts: Sequence[Prompt], /
    ) -> Sequence[Detections]:
        """Detections of each image's own prompt; phrases index the prompt's."""
        ...


@runtime_checkable
class Finds(FindsCategories, FindsPhrases, Protocol):
    """What an evaluation of sets of either kind needs."""


class Evaluated(NamedTuple):
    """A detection set, what was found in it and how good that is."""

    truth: GroundTruth
    prompts: tuple[str, ...]
    """What the detector was asked for, per category in the order of `truth.names`."""
    image_ids: tuple[int, ...]
    detections: dict[int, Detections]
    """By image id."""
    precision: AveragePrecision
    permuted: float = -1.0
    """AP50 with the names exchanged (`permuted_ap50`): the level of chance; -1 where there is none."""
    pictures: str = ""
    """SHA-256 over the evaluated files: their names and contents in the order of `image_ids`."""


class Grounded(NamedTuple):
    """A grounding set, what was found in it and how good that is."""

    truth: GroundingTruth
    image_ids: tuple[Any, ...]
    """Of the captions that were measured; those without a phrase that has a box are not."""
    detections: dict[Any, Detections]
    """By image id; phrases index the image's phrases in `truth`, also where some of them were not asked for."""
    recall: Recall
    unasked: dict[Any, tuple[int, ...]]
    """By image id the phrases that the prompt could not hold: counted as missed."""
    counts: dict[str, int]
    """captions, captions_cut, phrases_over_budget, phrases_without_token."""
    pictures: str = ""
    """As in `Evaluated`."""


def evaluate(
    config: Config, params: dict[str, Any], sets: Mapping[str, EvaluationSet] | None = None, *, progress: bool = True
) -> dict[str, float]:
    """The numbers of `params` on every set (default: `config.evaluation.sets`), named `evaluation/SET/NUMBER`.

    Detection: COCO's twelve, AP50_permuted and images; grounding: recall@k and merged_recall@k over all phrases and by
    kind (`relational/recall@1`), phrases and images (see `scalars`). Settings: `config.evaluation` (batch size, sides,
    max_images, chunk) and `config.detection`. Raises EvaluationError or GroundTruthError for a set that cannot be
    evaluated.
    """
    numbers: dict[str, float] = {}
    detector = Detector(config, params)
    for name, dataset in (config.evaluation.sets if sets is None else sets).items():
        result = evaluate_set(detector, config, dataset, name=name, progress=progress)
        numbers |= {f"evaluation/{name}/{number}": value for number, value in scalars(result).items()}
    return numbers


def scalars(result: Evaluated | Grounded) -> dict[str, float]:
    """The numbers of a set by their names; one that the set has nothing to measure on is left out.

    Counts of what was lost (captions_cut, phrases_over_budget, phrases_without_token) appear where they are not 0.
    """
    match result:
        case Evaluated():
            found = result.precision.numbers | {"AP50_permuted": result.permuted}
            return {k: v for k, v in found.items() if v >= 0} | {"images": float(len(result.image_ids))}
        case Grounded():
            phrases = {f"{kind}/phrases" if kind else "phrases": n for kind, n in result.recall.phrases.items()}
            lost = {k: n for k, n in result.counts.items() if n and k != "captions"}
            counts = {**phrases, **lost, "images": len(result.image_ids)}
            return result.recall.numbers | {name: float(count) for name, count in counts.items()}


def check_set(name: str, dataset: EvaluationSet) -> None:
    """Reads the annotations of a set and looks for its folder, so that a long run need not end with a fault in them.

    Raises:
        EvaluationError, GroundTruthError: as `evaluate_set`, but for the pictures themselves.
    """
    if not epath.Path(dataset.images).exists():
        raise EvaluationError(f"evaluation.sets.{name}.images: {dataset.images} is not there: expected its pictures")
    match dataset.kind:
        case "detection":
            prompt_names(load_ground_truth(dataset.annotations), dataset)
        case "grounding":
            load_grounding(dataset.annotations)


def evaluate_set(
    detector: Finds,
    config: Config,
    dataset: EvaluationSet,
    *,
    name: str = "",
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Evaluated | Grounded:
    """`evaluate_detection` or `evaluate_grounding`, as `dataset.kind` says."""
    match dataset.kind:
        case "detection":
            return evaluate_detection(detector, config, dataset, name=name, progress=progress, report=report)
        case "grounding":
            return evaluate_grounding(detector, config, dataset, name=name, progress=progress, report=report)


def evaluate_detection(
    detector: FindsCategories,
    config: Config,
    dataset: EvaluationSet,
    *,
    name: str = "",
    progress: bool = True,
    report: Callable[[str], None] | None = None,
    order: Sequence[int] | None = None,
) -> Evaluated:
    """Detects every category of `dataset` in its first `config.evaluation.max_images` images (0: all), and measures.

    Boxes are written with width x2 - x1 + 1 (glip-reference 5.2). `report` is told what the prompt names became;
    `order` is the order in which the categories are asked for (default: by id), the result does not show it.

    Raises:
        EvaluationError: no images, a picture that is missing, unreadable or of another size than the annotations say,
            or `dataset.names` for a category that there is not.
        GroundTruthError: the annotations are no COCO detection JSON.
    """
    truth = load_ground_truth(dataset.annotations)
    names = prompt_names(truth, dataset)
    if report is not None:
        report(f"{name or dataset.annotations}: {len(names)} categories, asked for as: {', '.join(names)}")
    places = np.arange(len(names)) if order is None else np.asarray(order)
    asked = [names[i] for i in places]
    entries = _first(truth.content["images"], config, dataset)
    detections: dict[int, Detections] = {}

    def find(group: Sequence[dict[str, Any]], images: list[Any]) -> None:
        for entry, found in zip(group, detector.categories(images, asked), strict=True):
            detections[entry["id"]] = _renumbered(found, places)

    pictures = _each(entries, config, dataset, name, progress, find)
    image_ids = tuple(entry["id"] for entry in entries)
    results = coco_results(truth, detections)
    precision = average_precision(truth, results, list(image_ids))
    permuted = permuted_ap50(truth, results, list(image_ids))
    return Evaluated(truth, tuple(names), image_ids, detections, precision, permuted, pictures)


def evaluate_grounding(
    detector: FindsPhrases,
    config: Config,
    dataset: EvaluationSet,
    *,
    name: str = "",
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Grounded:
    """Finds the phrases of the first `config.evaluation.max_images` captions (0: all) of `dataset`, and measures.

    A caption beyond the token budget is cut at the last phrase end that fits; the phrases behind it count as missed,
    as do phrases without a token. `report` is told what was counted.

    Raises:
        EvaluationError: no caption with a boxed phrase among the first, or a picture that is missing, unreadable or of
            another size than the annotations say.
        GroundTruthError: the annotations are no MDETR grounding JSON.
    """
    truth = load_grounding(dataset.annotations)
    chosen = truth.images[: config.evaluation.max_images] if config.evaluation.max_images else truth.images
    members = {image.id: image for image in chosen if image.phrases}
    if not members:
        raise EvaluationError(
            f"{dataset.annotations}: none of its first {len(chosen)} captions has a phrase with a box"
        )
    budget = config.model.text.max_tokens
    fitted = {key: fit_caption(image, detector.tokenizer, budget) for key, image in members.items()}
    counts = _counts(fitted)
    if report is not None:
        phrases = sum(len(image.phrases) for image in members.values())
        told = [f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count and what != "captions"]
        told += [f"left out: {count} {what}" for what, count in truth.left_out.items()]
        report("; ".join([f"{name or dataset.annotations}: {phrases} phrases in {len(members)} captions", *told]))
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    detections: dict[Any, Detections] = dict.fromkeys(members, nothing)

    def find(group: Sequence[dict[str, Any]], images: list[Any]) -> None:
        ready = [(entry["id"], image, own) for entry, image in zip(group, images, strict=True)
                 if (own := fitted[entry["id"]].prompt) is not None]  # fmt: skip
        if ready:
            keys, pixels, prompts = zip(*ready, strict=True)
            for key, found in zip(keys, detector.caption(pixels, prompts), strict=True):
                detections[key] = _renumbered(found, np.asarray(fitted[key].asked))

    pictures = _each([image.entry for image in members.values()], config, dataset, name, progress, find)
    unasked = {key: (*own.over_budget, *own.without_token) for key, own in fitted.items()}
    return Grounded(
        truth,
        tuple(members),
        detections,
        phrase_recall((image.phrases, detections[key]) for key, image in members.items()),
        {key: numbers for key, numbers in unasked.items() if numbers},
        counts,
        pictures,
    )


def _counts(fitted: Mapping[Any, Fitted]) -> dict[str, int]:
    return {
        "captions": len(fitted),
        "captions_cut": sum(bool(own.over_budget) for own in fitted.values()),
        "phrases_over_budget": sum(len(own.over_budget) for own in fitted.values()),
        "phrases_without_token": sum(len(own.without_token) for own in fitted.values()),
    }


def _first(entries: list[dict[str, Any]], config: Config, dataset: EvaluationSet) -> list[dict[str, Any]]:
    entries = entries[: config.evaluation.max_images] if config.evaluation.max_images else entries
    if not entries:
        raise EvaluationError(f"{dataset.annotations} lists no images: expected at least one")
    return entries


def _renumbered(found: Detections, places: np.ndarray) -> Detections:
    """Detections whose phrases, where there is one, are looked up in `places`."""
    phrases = np.asarray(found.phrases)
    places = np.where(phrases >= 0, places[phrases], -1).astype(np.int32)
    return Detections(np.asarray(found.boxes), np.asarray(found.scores), places)


def _each(
    entries: Sequence[dict[str, Any]],
    config: Config,
    dataset: EvaluationSet,
    name: str,
    progress: bool,
    find: Callable[[Sequence[dict[str, Any]], list[Any]], None],
) -> str:
    """Reads the pictures, gives them to `find` in groups of one batch, and returns the hash of their files."""
    folder = epath.Path(dataset.images)
    digests: dict[Any, str] = {}
    # A terminal gets a moving bar, a log file a line now and then.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(entries), desc=f"evaluate {name}".strip(), unit="image", disable=not progress,
              mininterval=interval, maxinterval=interval) as bar:  # fmt: skip
        # Images of one shape share a step: in file order much of each batch would be padding.
        alike = sorted(entries, key=lambda entry: entry.get("height", 1) / max(entry.get("width", 1), 1))
        for group in _groups(alike, config.evaluation.batch_size):
            images = []
            for entry in group:
                pixels, digests[entry["id"]] = _read(folder, entry)
                images.append(pixels)
            find(group, images)
            bar.update(len(group))
    lines = "".join(f"{entry['file_name']} {digests[entry['id']]}\n" for entry in entries)
    return hashlib.sha256(lines.encode()).hexdigest()


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
    return _read(folder, entry)[0]


def _read(folder: epath.Path, entry: dict[str, Any]) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """See `read_image`; the SHA-256 of the file beside the pixels."""
    if "file_name" not in entry:
        raise EvaluationError(f"image {entry['id']} has no file_name: {json.dumps(entry)[:120]}")
    path = folder / entry["file_name"]
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            # No rotation by EXIF: annotations speak of the pixels as they are stored (glip-reference 4.7).
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is not there: expected the picture of image {entry['id']}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{path} is no readable picture: {error}") from error
    said = (entry.get("height", pixels.shape[0]), entry.get("width", pixels.shape[1]))
    if said != pixels.shape[:2]:
        raise EvaluationError(
            f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), the annotations say "
            f"{said[0]} x {said[1]}: boxes would not fit; use the pictures that were annotated"
        )
    return pixels, hashlib.sha256(data).hexdigest()


def _groups(entries: Sequence[dict[str, Any]], size: int) -> Iterator[Sequence[dict[str, Any]]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
