"""Phrase recall on grounding annotations, as Flickr30k Entities is evaluated: recall@1/5/10, any-box and merged-box.

A phrase is found at k if one of its k best boxes has an IoU of at least 0.5 with a true box of it (intersection over union of
plain corners, without the "+1" of COCO; glip-reference 5.4). *Any-box*: with any of the true boxes of the phrase. *Merged-box*:
with the box around all of them. Both as in the evaluator of MDETR (arXiv 2104.12763, section 4.2; datasets/flickr_eval.py of its
repository), which GLIP uses unchanged.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from glip_jax.evaluation.average_precision import GroundTruthError, read_lists
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections, Prompt
from glip_jax.structures.boxes import pairwise_iou

__all__ = [
    "MIN_IOU", "PROTOCOLS", "RANKS", "CaptionedImage", "Fitted", "GroundingTruth", "Phrase", "Recall",
    "fit_caption", "load_grounding", "merged", "overlaps", "phrase_hits",
    "phrase_recall",
]  # fmt: skip

RANKS = (1, 5, 10)
PROTOCOLS = ("recall", "merged_recall")
"""Names of the any-box and the merged-box metric, followed by @k."""
MIN_IOU = 0.5

Spans = tuple[tuple[int, int], ...]


class Phrase(NamedTuple):
    """A phrase of a caption and its true boxes."""

    spans: Spans
    boxes: Any
    """Float32[N 4]: xyxy with x2 = x + width, pixels of the image; at least one."""
    kind: str = ""
    """Its kind in the "phrases" of the annotations, such as plain or relational."""


class CaptionedImage(NamedTuple):
    """An entry of `images`: one caption of one image."""

    id: Any
    entry: dict[str, Any]
    caption: str
    phrases: tuple[Phrase, ...]
    """Those that have boxes."""


@dataclass(frozen=True)
class GroundingTruth:
    """A grounding JSON in the format of MDETR."""

    path: str
    images: tuple[CaptionedImage, ...]
    left_out: dict[str, int]
    """Counts of what is not evaluated, by reason."""


class Fitted(NamedTuple):
    """The part of a caption that fits into a token budget."""

    prompt: Prompt | None
    """None: not even the first phrase fits."""
    included: tuple[int, ...]
    """For each phrase of the prompt its index among the phrases of the image."""
    over_budget: tuple[int, ...]
    """Indices of the phrases beyond the budget."""
    without_token: tuple[int, ...]
    """Indices of the phrases that have no token (only white space or control characters)."""


class Recall(NamedTuple):
    """Results of an evaluation of grounding."""

    numbers: dict[str, float]
    """`recall@1` ... `merged_recall@10` over all phrases, and `KIND/recall@1` ... for each kind there is."""
    phrases: dict[str, int]
    """Number of phrases: "" for all, then by kind."""


def load_grounding(path: str) -> GroundingTruth:
    """Reads a grounding JSON in the format of MDETR: images with a caption each, annotations with bbox and tokens_positive.

    The phrases of a caption are, in this order of preference, the image's `tokens_positive_eval` (a list of spans per
    phrase), its `phrases` (a span and a kind per phrase), or the distinct `tokens_positive` of its annotations. A box
    belongs to every phrase whose spans are all among the spans of the box. Phrases without boxes are not evaluated, as on
    Flickr30k; they, crowds, boxes without an area and boxes of no phrase are counted in `left_out`.

    Raises:
        GroundTruthError: the file is missing or no grounding JSON, an id occurs twice, a box is of an unknown image, a span is
            beyond its caption, or no phrase has a box.
    """
    content = read_lists(path, ("images", "annotations"), "an MDETR grounding JSON")
    left_out: Counter[str] = Counter()
    annotations: dict[Any, list[dict[str, Any]]] = {}
    try:
        for entry in content["images"]:
            if entry["id"] in annotations:
                raise GroundTruthError(
                    f"{path}: the id {entry['id']!r} occurs twice in images: expected one entry an id"
                )
            if not isinstance(entry["caption"], str):
                raise GroundTruthError(
                    f"{path}: image {entry['id']} has the caption {entry['caption']!r}: expected text"
                )
            annotations[entry["id"]] = []
        for number, annotation in enumerate(content["annotations"]):
            if annotation["image_id"] not in annotations:
                raise GroundTruthError(
                    f"{path}: annotation {annotation.get('id', number)} is of image {annotation['image_id']!r}, which is not listed"
                )
            annotations[annotation["image_id"]].append(annotation)
        images = tuple(_captioned(path, entry, annotations[entry["id"]], left_out) for entry in content["images"])
    except (KeyError, TypeError) as error:
        raise GroundTruthError(
            f"{path}: an entry lacks {error} or has a wrong type there: expected an MDETR grounding JSON"
        ) from error
    if not any(image.phrases for image in images):
        raise GroundTruthError(f"{path}: no caption has a phrase with a box: expected at least one")
    return GroundingTruth(path, images, {reason: count for reason, count in left_out.items() if count})


def _captioned(
    path: str, entry: dict[str, Any], annotations: Sequence[dict[str, Any]], left_out: Counter[str]
) -> CaptionedImage:
    """The phrases of an image with their boxes; counts what is left out."""
    caption, where = entry["caption"], f"{path}, image {entry['id']}"
    boxes, spans = [], []
    for annotation in annotations:
        x, y, width, height = _bbox(annotation, where)
        raw = annotation.get("tokens", annotation.get("tokens_positive"))
        box_spans = _spans(raw, caption, f"{where}, annotation {annotation.get('id')}")
        if annotation.get("iscrowd"):
            left_out["crowd boxes"] += 1
        elif width <= 0 or height <= 0:
            left_out["boxes without an area"] += 1
        else:
            boxes.append((x, y, x + width, y + height))
            spans.append(box_spans)
    kinds: dict[Spans, str] = {}
    if "tokens_positive_eval" in entry:
        kinds = {_spans(item, caption, f"{where}, tokens_positive_eval"): "" for item in entry["tokens_positive_eval"]}
    elif "phrases" in entry:
        listed = ((item["span"], str(item.get("kind", ""))) for item in entry["phrases"])
        kinds = {_spans([span], caption, f"{where}, phrases"): kind for span, kind in listed}
    else:
        kinds = dict.fromkeys(sorted(spans), "")
    phrases, used = [], set()
    for phrase, kind in kinds.items():
        rows = [row for row, covered in enumerate(spans) if set(phrase) <= set(covered)]
        used |= set(rows)
        if rows:
            phrases.append(Phrase(phrase, np.asarray([boxes[row] for row in rows], np.float32), kind))
    left_out["phrases without a box"] += len(kinds) - len(phrases)
    left_out["boxes of no listed phrase"] += len(spans) - len(used)
    left_out["captions without a phrase that has a box"] += not phrases
    return CaptionedImage(entry["id"], entry, caption, tuple(phrases))


def _bbox(annotation: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    box = annotation["bbox"]
    valid = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not valid or not np.isfinite(box).all():
        raise GroundTruthError(f"{where}: annotation {annotation.get('id')} has bbox {box}: expected x, y, w, h")
    x, y, width, height = (float(value) for value in box)
    return x, y, width, height


def _spans(raw: Any, caption: str, where: str) -> Spans:
    """The (begin, end) characters in `raw`, checked against the caption."""
    if not isinstance(raw, list) or not raw:
        raise GroundTruthError(f"{where} has the spans {raw!r}: expected [[begin, end], ...] with at least one")
    for span in raw:
        valid = isinstance(span, list) and len(span) == 2 and all(isinstance(value, int) for value in span)
        if not valid or not 0 <= span[0] < span[1] <= len(caption):
            raise GroundTruthError(
                f"{where} has the span {span} in a caption of {len(caption)} characters: expected [begin, end] with "
                "0 <= begin < end <= length, end exclusive"
            )
    return tuple(sorted({(span[0], span[1]) for span in raw}))


def fit_caption(image: CaptionedImage, tokenizer: prompts.Tokenizer, max_tokens: int) -> Fitted:
    """The caption verbatim if it fits into `max_tokens` ([CLS] and [SEP] included), else cut at the last phrase end
    that does. Phrases beyond the cut are not in the prompt; the evaluation counts them as missed.
    """

    def encoded(text: str) -> tuple[int, Any]:
        encoding = tokenizer.encode(text)
        return len(encoding.ids), np.asarray(encoding.offsets, np.int32).reshape(-1, 2)

    spans = [phrase.spans for phrase in image.phrases]
    ends = [max(end for _, end in each) for each in spans]
    text = image.caption
    count, offsets = encoded(text)
    has_token = np.asarray(prompts.positive_map(offsets, spans).any(1))
    without = tuple(np.flatnonzero(~has_token).tolist())
    for end in sorted({ends[i] for i in range(len(spans)) if has_token[i]}, reverse=True):
        if count <= max_tokens:
            break
        text = image.caption[:end]
        count, _ = encoded(text)
    if count > max_tokens:
        text = ""
    included = tuple(i for i, end in enumerate(ends) if has_token[i] and end <= len(text))
    over = tuple(i for i, end in enumerate(ends) if has_token[i] and end > len(text))
    return Fitted(Prompt(text, tuple(spans[i] for i in included)) if included else None, included, over, without)


def merged(boxes: Float32[np.ndarray, "N 4"]) -> Float32[np.ndarray, "1 4"]:
    """The box around all boxes (xyxy)."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])[None]


def phrase_hits(phrases: Sequence[Phrase], found: Detections) -> Bool[np.ndarray, "protocols P ranks"]:
    """Whether each phrase is found, by protocol and rank. `found.phrases` index `phrases`; boxes are in pixels."""
    hits = np.zeros((len(PROTOCOLS), len(phrases), len(RANKS)), bool)
    boxes, indices = np.asarray(found.boxes, np.float32).reshape(-1, 4), np.asarray(found.phrases)
    order = np.argsort(-np.asarray(found.scores), kind="stable")
    for row, phrase in enumerate(phrases):
        ranked = boxes[order][indices[order] == row]
        for protocol, true in enumerate((phrase.boxes, merged(phrase.boxes))):
            matched = overlaps(ranked, np.asarray(true, np.float32)).max(1, initial=0) >= MIN_IOU
            hits[protocol, row] = [matched[:rank].any() for rank in RANKS]
    return hits


def overlaps(a: Float32[np.ndarray, "n 4"], b: Float32[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of plain corners; 0 for two boxes without an area."""
    inclusive = np.array([0, 0, 1, 1], np.float32)  # the convention of `pairwise_iou`
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(pairwise_iou(a - inclusive, b - inclusive))


def phrase_recall(images: Iterable[tuple[Sequence[Phrase], Detections]]) -> Recall:
    """Recall over all phrases of all images, and over those of each kind. A phrase without detections is missed.

    `Detections.phrases` index the phrases of the image. Without any phrase there are no metrics.
    """
    hits: list[np.ndarray] = []
    kinds: list[str] = []
    for phrases, found in images:
        hits.append(phrase_hits(phrases, found))
        kinds += [phrase.kind for phrase in phrases]
    if not kinds:
        return Recall({}, {"": 0})
    every = np.concatenate(hits, axis=1)
    numbers: dict[str, float] = {}
    counts: dict[str, int] = {}
    for kind in ["", *sorted({kind for kind in kinds if kind})]:
        chosen = every[:, [not kind or each == kind for each in kinds]]
        counts[kind] = chosen.shape[1]
        prefix = f"{kind}/" if kind else ""
        for protocol, name in enumerate(PROTOCOLS):
            for rank, share in zip(RANKS, chosen[protocol].mean(0), strict=True):
                numbers[f"{prefix}{name}@{rank}"] = float(share)
    return Recall(numbers, counts)
