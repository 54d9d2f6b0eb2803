"""Runs a detector over annotated sets and computes the metrics."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from glip_jax import UserError
from glip_jax.config import Config, EvaluationSet, Orientation
from glip_jax.evaluation.absent_names import absence, absence_scalars
from glip_jax.evaluation.at_start import check_images
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
from glip_jax.evaluation.shares import Share
from glip_jax.inference import Detector, bucket, category_prompts, compete, pipelined
from glip_jax.io import assets
from glip_jax.io.image_files import ImageFileError, read_annotated
from glip_jax.io.paths import OutsideError, check_paths, within
from glip_jax.io.provenance import file_hash
from glip_jax.structures.batch import Detections, Prompt
from glip_jax.structures.descriptions import read_descriptions
from glip_jax.structures.prompts import PromptError, Tokenizer, check_names, listed, load_tokenizer, unread_names

__all__ = [
    "CategoryDetector", "DetectorProtocol", "Evaluated", "EvaluationError", "Grounded", "PhraseDetector", "check_set", "detect_single_names", "evaluate",
    "evaluate_detection", "evaluate_grounding", "evaluate_set", "hash_pictures", "read_image", "saved_set", "scalars",
]  # fmt: skip


class EvaluationError(UserError, ValueError):
    """The images or names of a set do not fit its annotations."""


@runtime_checkable
class CategoryDetector(Protocol):
    """The part of `glip_jax.inference.Detector` that evaluates detection sets."""

    batch_size: int
    """Images of a batch on one device."""

    @property
    def group_size(self) -> int:
        """Images of a call that keeps all its devices busy."""
        ...

    def categories_async(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]], names: Sequence[str], /
    ) -> Callable[[], Sequence[Detections]]:
        """Starts detection and returns what waits for it: per image boxes xyxy in its pixels, phrases that index `names`."""
        ...


@runtime_checkable
class PhraseDetector(Protocol):
    """The part of `glip_jax.inference.Detector` that evaluates grounding sets."""

    tokenizer: Tokenizer
    batch_size: int
    """As in `CategoryDetector`."""

    @property
    def group_size(self) -> int:
        """As in `CategoryDetector`."""
        ...

    def detect_async(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]], prompts: Sequence[Sequence[Prompt]], /
    ) -> Callable[[], Sequence[Sequence[Detections]]]:
        """Starts detection and returns what waits for it: per image and prompt, phrases that index those of the prompt."""
        ...


@runtime_checkable
class DetectorProtocol(CategoryDetector, PhraseDetector, Protocol):
    """A detector for sets of both kinds."""


class Evaluated(NamedTuple):
    """Results on a detection set."""

    truth: GroundTruth
    prompts: tuple[str, ...]
    """The name of each category in the prompts, in the order of `truth.names`."""
    image_ids: tuple[Any, ...]
    detections: dict[Any, Detections]
    """By image id."""
    precision: AveragePrecision
    permuted: float = -1.0
    """AP50 with permuted names (`permuted_ap50`): the level of chance; -1 if it is not defined."""
    pictures: str = ""
    """SHA-256 over the evaluated files: their names and contents in the order of `image_ids`."""
    orientation: Orientation = "auto"
    """EvaluationSet.orientation."""
    absence: dict[str, Any] | None = None
    """`absent_names.absence`: false alarms and thresholds; None for a set that lists no absent names."""


class Grounded(NamedTuple):
    """Results on a grounding set."""

    truth: GroundingTruth
    image_ids: tuple[Any, ...]
    """Of the evaluated captions, which are those with at least one phrase that has a box."""
    detections: dict[Any, Detections]
    """By image id; phrases index the phrases of the image in `truth`, those that the prompt left out included."""
    recall: Recall
    unasked: dict[Any, tuple[int, ...]]
    """By image id: the phrases that the prompt left out, for want of tokens. They count as missed."""
    counts: dict[str, int]
    """captions, captions_cut, phrases_over_budget, phrases_without_token."""
    pictures: str = ""
    """As in `Evaluated`."""
    orientation: Orientation = "auto"


def evaluate(
    config: Config,
    params: dict[str, Any] | None = None,
    sets: Mapping[str, EvaluationSet] | None = None,
    *,
    progress: bool = True,
    detector: DetectorProtocol | None = None,
    share: Share | None = None,
) -> dict[str, float]:
    """Metrics of `params` on every set (default: `config.evaluation.sets`), named `evaluation/SET/METRIC`.

    Detection: COCO's twelve, AP50_permuted and images; grounding: recall@k and merged_recall@k over all phrases and by
    kind (`relational/recall@1`), phrases and images (see `scalars`). Settings: `config.evaluation` (batch size, sides,
    max_images, chunk) and `config.detection`. `detector`: one that has the parameters already. `share`: the part of this process where
    several evaluate together; all of them return the same. Raises EvaluationError or GroundTruthError for a set that cannot
    be evaluated.
    """
    metrics: dict[str, float] = {}
    detector = detector or Detector(config, params)
    for name, dataset in (config.evaluation.sets if sets is None else sets).items():
        result = evaluate_set(detector, config, dataset, name=name, progress=progress, share=share)
        metrics |= {f"evaluation/{name}/{metric}": value for metric, value in scalars(result).items()}
    return metrics


def scalars(result: Evaluated | Grounded) -> dict[str, float]:
    """The metrics of a set by name. Metrics that are not defined on the set are left out.

    captions_cut, phrases_over_budget and phrases_without_token are included where they are not 0.
    """
    match result:
        case Evaluated():
            metrics = result.precision.numbers | {"AP50_permuted": result.permuted}
            absence = absence_scalars(result.absence) if result.absence is not None else {}
            return {k: v for k, v in metrics.items() if v >= 0} | absence | {"images": float(len(result.image_ids))}
        case Grounded():
            phrases = {f"{kind}/phrases" if kind else "phrases": n for kind, n in result.recall.phrases.items()}
            lost = {k: n for k, n in result.counts.items() if n and k != "captions"}
            counts = {**phrases, **lost, "images": len(result.image_ids)}
            return result.recall.numbers | {name: float(count) for name, count in counts.items()}


def check_set(name: str, dataset: EvaluationSet, config: Config) -> list[str]:
    """Reads the annotations of a set, checks its names and looks for the files of its images, before a long run that evaluates it
    at the end. Returns notes for the user on its names.

    Raises:
        MissingImagesError: images are not in their folder.
        EvaluationError, GroundTruthError: as `evaluate_set`, except for what is wrong within the files of images; and for names of which the
            vocabulary knows nothing, or that are the same to the model.
    """
    check_paths(dataset, f"evaluation.sets.{name}.")
    if not epath.Path(dataset.images).exists():
        raise EvaluationError(f"evaluation.sets.{name}.images: {dataset.images} does not exist: expected its images")
    if not epath.Path(dataset.images).is_dir():
        raise EvaluationError(
            f"evaluation.sets.{name}.images: {dataset.images} is a file: expected the folder of its images"
        )
    where, truth, most = f"evaluation.sets.{name}", load_set(name, dataset), config.evaluation.max_images or None
    match truth:
        case GroundTruth():
            check_images(where, dataset, truth.content["images"][:most])
            return _check_names(where, truth, config)
        case GroundingTruth():
            check_images(where, dataset, [image.entry for image in truth.images[:most] if image.phrases])
            return _check_phrases(where, truth, _tokenizer(config))


def load_set(name: str, dataset: EvaluationSet) -> GroundTruth | GroundingTruth:
    """Reads the annotations of a set as its kind says. Raises GroundTruthError."""
    match dataset.kind:
        case "detection":
            return load_ground_truth(dataset.annotations, dataset, name)
        case "grounding":
            return load_grounding(dataset.annotations, dataset, name)


def _tokenizer(config: Config) -> Tokenizer:
    return load_tokenizer(assets.resolve(config.model.text.vocabulary))


def _check_names(where: str, truth: GroundTruth, config: Config) -> list[str]:
    remedy = (
        f"say it otherwise with {where}.names, or evaluate a model whose vocabulary and encoder are of that language"
    )
    try:
        names, tokenizer = truth.prompts, _tokenizer(config)
        notes = check_names(names, tokenizer, f"{where}, {truth.path}", remedy, "refuse_plain")
        category_prompts(names, tokenizer, config)  # raises for a name beyond the token budget
        if (described := config.data.captions.descriptions).use != "none":
            notes += read_descriptions(str(assets.resolve(described.file))).notes(where, names)
    except PromptError as error:
        raise EvaluationError(str(error)) from None
    return notes


def _check_phrases(where: str, truth: GroundingTruth, tokenizer: Tokenizer) -> list[str]:
    """Notes the phrases of which the vocabulary knows nothing; EvaluationError if it knows nothing of any."""
    texts = list(dict.fromkeys(
        " ".join(image.caption[begin:end] for begin, end in phrase.spans) for image in truth.images for phrase in image.phrases
    ))  # fmt: skip
    unread = unread_names(texts, tokenizer, str)
    if len(unread) == len(texts):
        raise EvaluationError(
            f"{where}, {truth.path}: the model's vocabulary knows no word of the phrases, the first is {texts[0]!r}: evaluate a "
            "model whose vocabulary and encoder are of that language"
        )
    known = f"{where}: of {len(texts)} phrases the model's vocabulary knows nothing of {len(unread)}"
    return [f"{known}: {listed(unread)}"] if unread else []


def evaluate_set(
    detector: DetectorProtocol,
    config: Config,
    dataset: EvaluationSet,
    *,
    name: str = "",
    progress: bool = True,
    report: Callable[[str], None] | None = None,
    share: Share | None = None,
    rates: Sequence[float] = (),
) -> Evaluated | Grounded:
    """`evaluate_detection` or `evaluate_grounding`, as `dataset.kind` says."""
    match dataset.kind:
        case "detection":
            return evaluate_detection(
                detector, config, dataset, name=name, progress=progress, report=report, share=share, rates=rates
            )
        case "grounding":
            return evaluate_grounding(
                detector, config, dataset, name=name, progress=progress, report=report, share=share
            )


def evaluate_detection(
    detector: CategoryDetector,
    config: Config,
    dataset: EvaluationSet,
    *,
    name: str = "",
    progress: bool = True,
    report: Callable[[str], None] | None = None,
    order: Sequence[int] | None = None,
    share: Share | None = None,
    rates: Sequence[float] = (),
) -> Evaluated:
    """Evaluates detection of every category of `dataset` in its first `config.evaluation.max_images` images (0: all).

    Boxes are written with width x2 - x1 + 1 (glip-reference 5.2). `report` takes a line with the names in the prompts. `order`
    is the order of the categories in the prompts (default: by id); it does not change the order in the result. `share`: see
    `evaluate`. `rates`: false alarms for which a threshold is chosen besides the usual ones.

    Raises:
        EvaluationError: an image that is missing, unreadable or of another size than in the annotations.
        GroundTruthError: the annotations are no COCO detection JSON, or `dataset.names` has a name of no category.
    """
    truth = load_ground_truth(dataset.annotations, dataset, name)
    names = truth.prompts
    if report is not None:
        report(f"{name or dataset.annotations}: {len(names)} categories, prompted as: {', '.join(names)}")
        if truth.left_out:
            report(f"{name or dataset.annotations}: {', '.join(f'{n} {what}' for what, n in truth.left_out.items())}")
    indices = np.arange(len(names)) if order is None else np.asarray(order)
    ordered = [names[i] for i in indices]
    entries = _limited(truth.content["images"], config, dataset)

    def start(_: Sequence[dict[str, Any]], images: list[Any]) -> Callable[[], list[Detections]]:
        finish = detector.categories_async(images, ordered)
        return lambda: [_renumbered(found, indices) for found in finish()]

    detections, pictures = _run(entries, detector, config, dataset, name, progress, start, report, share or Share())
    image_ids = tuple(entry["id"] for entry in entries)
    results = coco_results(truth, detections)
    precision = average_precision(truth, results, list(image_ids))
    permuted = permuted_ap50(truth, results, list(image_ids))
    absent = absence(truth, detections, image_ids, rates)
    return Evaluated(truth, names, image_ids, detections, precision, permuted, pictures, dataset.orientation, absent)


def detect_single_names(
    detector: PhraseDetector,
    config: Config,
    dataset: EvaluationSet,
    truth: GroundTruth,
    asked: Mapping[Any, Sequence[int]],
    *,
    name: str = "",
    progress: bool = True,
    share: Share | None = None,
) -> dict[Any, Detections]:
    """Detections of names each of which is asked alone: the only one of its prompt, but for `detection.rivals`.

    `asked`: by image id, indices into `truth.prompts`, which the phrases of the result are too. Otherwise as `evaluate_detection`.
    """
    entries = [entry for entry in truth.content["images"] if asked.get(entry["id"])]
    numbers = sorted({number for own in asked.values() for number in own})
    prompts = {n: category_prompts([truth.prompts[n]], detector.tokenizer, config) for n in numbers}

    def each_name(numbers: Sequence[int], found: Iterator[Detections]) -> Iterator[Detections]:
        for n in numbers:
            parts = [_renumbered(next(found), np.where(np.array(indices) < 0, -1, n)) for _, indices in prompts[n]]
            yield compete(_joined(parts), config.detection)

    def start(group: Sequence[dict[str, Any]], images: list[Any]) -> Callable[[], list[Detections]]:
        own = [asked[entry["id"]] for entry in group]
        finish = detector.detect_async(images, [[prompt for n in each for prompt, _ in prompts[n]] for each in own])
        return lambda: [_joined(list(each_name(each, iter(found)))) for each, found in zip(own, finish(), strict=True)]

    return _run(entries, detector, config, dataset, name, progress, start, None, share or Share())[0]


def _joined(parts: Sequence[Detections]) -> Detections:
    """The detections of several prompts, in their order."""
    return Detections(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


def evaluate_grounding(
    detector: PhraseDetector,
    config: Config,
    dataset: EvaluationSet,
    *,
    name: str = "",
    progress: bool = True,
    report: Callable[[str], None] | None = None,
    share: Share | None = None,
) -> Grounded:
    """Evaluates grounding of the phrases of the first `config.evaluation.max_images` captions (0: all) of `dataset`.

    A caption beyond the token budget is cut at the end of the last phrase that fits. The phrases after the cut count as missed,
    as do phrases without a token. `report` takes a line with the counts. `share`: see `evaluate`.

    Raises:
        EvaluationError: no phrase of these captions has a box, or an image is missing, unreadable or of another size than in
            the annotations.
        GroundTruthError: the annotations are no MDETR grounding JSON.
    """
    truth = load_grounding(dataset.annotations, dataset, name)
    chosen = truth.images[: config.evaluation.max_images] if config.evaluation.max_images else truth.images
    captions = {image.id: image for image in chosen if image.phrases}
    if not captions:
        raise EvaluationError(
            f"{dataset.annotations}: none of its first {len(chosen)} captions has a phrase with a box"
        )
    budget = config.model.text.max_tokens
    fitted = {key: fit_caption(image, detector.tokenizer, budget) for key, image in captions.items()}
    counts = _counts(fitted)
    if report is not None:
        phrases = sum(len(image.phrases) for image in captions.values())
        parts = [f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count and what != "captions"]
        parts += [f"left out: {count} {what}" for what, count in truth.left_out.items()]
        report("; ".join([f"{name or dataset.annotations}: {phrases} phrases in {len(captions)} captions", *parts]))
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))

    def start(group: Sequence[dict[str, Any]], images: list[Any]) -> Callable[[], list[Detections]]:
        asked = [fitted[entry["id"]] for entry in group]
        finish = detector.detect_async(images, [[each.prompt] if each.prompt is not None else [] for each in asked])
        return lambda: [_renumbered(found[0], np.asarray(each.included)) if found else none
                        for each, found in zip(asked, finish(), strict=True)]  # fmt: skip

    entries = [image.entry for image in captions.values()]
    detections, pictures = _run(entries, detector, config, dataset, name, progress, start, report, share or Share())
    unasked = {key: (*each.over_budget, *each.without_token) for key, each in fitted.items()}
    return Grounded(
        truth,
        tuple(captions),
        detections,
        phrase_recall((image.phrases, detections[key]) for key, image in captions.items()),
        {key: indices for key, indices in unasked.items() if indices},
        counts,
        pictures,
        dataset.orientation,
    )


def _counts(fitted: Mapping[Any, Fitted]) -> dict[str, int]:
    return {
        "captions": len(fitted),
        "captions_cut": sum(bool(each.over_budget) for each in fitted.values()),
        "phrases_over_budget": sum(len(each.over_budget) for each in fitted.values()),
        "phrases_without_token": sum(len(each.without_token) for each in fitted.values()),
    }


def _limited(entries: list[dict[str, Any]], config: Config, dataset: EvaluationSet) -> list[dict[str, Any]]:
    entries = entries[: config.evaluation.max_images] if config.evaluation.max_images else entries
    if not entries:
        raise EvaluationError(f"{dataset.annotations} lists no images: expected at least one")
    return entries


def _renumbered(found: Detections, indices: np.ndarray) -> Detections:
    """Detections with phrase i replaced by `indices`[i]; -1 stays."""
    phrases = np.asarray(found.phrases)
    phrases = np.where(phrases >= 0, indices[phrases], -1).astype(np.int32)
    return Detections(np.asarray(found.boxes), np.asarray(found.scores), phrases)


def _run(
    entries: Sequence[dict[str, Any]],
    detector: CategoryDetector | PhraseDetector,
    config: Config,
    dataset: EvaluationSet,
    name: str,
    progress: bool,
    start: Callable[[Sequence[dict[str, Any]], list[Any]], Callable[[], list[Detections]]],
    report: Callable[[str], None] | None,
    share: Share,
) -> tuple[dict[Any, Detections], str]:
    """Reads the images of this process and starts detection in groups of them.

    Returns the detections of all processes by image id, in the order of `entries`, and the hash of the files; `report` takes
    notes on them.
    """
    folder = epath.Path(dataset.images)
    detections: dict[Any, Detections] = {}
    digests: dict[Any, str] = {}
    notes = Counter[str]()
    # A bar that moves in a terminal, a line every 30 s in a log file.
    interval = 0.2 if sys.stderr.isatty() else 30.0

    def canvas(entry: dict[str, Any]) -> tuple[int, int] | None:
        listed = "height" in entry and "width" in entry
        return bucket(entry["height"], entry["width"], config)[1] if listed else None

    # Images of one canvas share a batch: in the order of the file much of each batch would be padding.
    groups = list(share.groups(entries, canvas, detector.batch_size, detector.group_size))
    with tqdm(total=sum(map(len, groups)), desc=f"evaluate {name}".strip(), unit="image", disable=not (progress and share.first),
              mininterval=interval, maxinterval=interval) as bar:  # fmt: skip
        for group, read, found in pipelined(
            groups,
            lambda entry: _read(folder, entry, dataset.orientation),
            lambda group, read: start(group, [pixels for pixels, _, _ in read]),
        ):
            for entry, (_, digest, noted), of_image in zip(group, read, found, strict=True):
                detections[entry["id"]], digests[entry["id"]] = of_image, digest
                notes.update(noted)
            bar.update(len(group))
    parts = share.gather((detections, digests, notes))
    detections = {key: found for part, _, _ in parts for key, found in part.items()}
    digests = {key: digest for _, part, _ in parts for key, digest in part.items()}
    notes = sum((part for _, _, part in parts), Counter[str]())
    if report is not None and notes:
        report("; ".join(f"{name or dataset.annotations}: noted {what} {count}" for what, count in notes.items()))
    return {entry["id"]: detections[entry["id"]] for entry in entries}, _hash_of(entries, digests)


def _hash_of(entries: Sequence[dict[str, Any]], digests: Mapping[Any, str]) -> str:
    lines = "".join(f"{entry['file_name']} {digests[entry['id']]}\n" for entry in entries)
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_pictures(dataset: EvaluationSet, name: str, image_ids: Sequence[Any]) -> str:
    """`Evaluated.pictures` of the images of these ids as they lie there now, without decoding them.

    Raises KeyError if the annotations do not list one, OSError if a file cannot be read, GroundTruthError as `evaluate_set`.
    """
    match dataset.kind:
        case "detection":
            listed = load_ground_truth(dataset.annotations, dataset, name).content["images"]
        case "grounding":
            listed = [image.entry for image in load_grounding(dataset.annotations, dataset, name).images]
    by_id, folder = {entry["id"]: entry for entry in listed}, epath.Path(dataset.images)
    chosen = [by_id[key] for key in image_ids]
    return _hash_of(chosen, {entry["id"]: file_hash(str(within(folder, entry["file_name"]))) for entry in chosen})


def saved_set(entry: Mapping[str, Any]) -> EvaluationSet:
    """The set that an entry of evaluation.json describes; settings that an earlier version lacks have their default."""
    return EvaluationSet(**{item.name: entry[item.name] for item in fields(EvaluationSet) if item.name in entry})


def read_image(folder: epath.Path, entry: dict[str, Any], rule: Orientation = "auto") -> UInt8[np.ndarray, "H W 3"]:
    """The RGB pixels that the annotations of an entry of a COCO JSON's `images` refer to; `rule`: EvaluationSet.orientation.

    Raises:
        EvaluationError: the file is missing, unreadable, or of another size than the entry says.
    """
    return _read(folder, entry, rule)[0]


def _read(
    folder: epath.Path, entry: dict[str, Any], rule: Orientation
) -> tuple[UInt8[np.ndarray, "H W 3"], str, tuple[str, ...]]:
    """As `read_image`, with the SHA-256 of the file and the notes on it."""
    try:
        path = within(folder, str(entry["file_name"]))
    except OutsideError as error:
        raise EvaluationError(f"image {entry['id']}: {error}") from None
    try:
        pixels, digest, notes = read_annotated(path, (entry.get("height"), entry.get("width")), rule)
    except ImageFileError as error:
        raise EvaluationError(f"image {entry['id']}: {error}") from error
    annotated = (entry.get("height", pixels.shape[0]), entry.get("width", pixels.shape[1]))
    if annotated != pixels.shape[:2]:
        raise EvaluationError(
            f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), the annotations say "
            f"{annotated[0]} x {annotated[1]}: boxes would not fit; use the images that were annotated"
        )
    return pixels, digest, notes
