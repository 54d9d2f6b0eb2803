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
from jaxtyping import Bool, Float, Float32, Int

from glip_jax.config import EvaluationSet
from glip_jax.data.importers.coco_json import AnnotatedCaption, read_grounding
from glip_jax.data.importers.entry import Report
from glip_jax.data.importers.losses import refuse_losses
from glip_jax.data.importers.mdetr import folders_of
from glip_jax.evaluation.average_precision import GroundTruthError, setting_names
from glip_jax.evaluation.metrics.matching import iou
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections, Prompt

__all__ = [
    "MIN_IOU", "PROTOCOLS", "RANKS", "CaptionedImage", "Fitted", "GroundingTruth", "Phrase", "Recall",
    "fit_caption", "load_grounding", "match", "merged", "overlaps", "phrase_hits",
    "phrase_recall",
]  # fmt: skip

RANKS = (1, 5, 10)
PROTOCOLS = ("recall", "merged_recall")
"""Names of the any-box and the merged-box metric, followed by @k."""
MIN_IOU = 0.5

Spans = tuple[tuple[int, int], ...]

_READ = ("id", "file_name", "coco_url", "height", "width", "caption")
"""Fields of an image that the reader returns apart from the others."""


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


def load_grounding(path: str, dataset: EvaluationSet | None = None, name: str = "NAME") -> GroundingTruth:
    """Reads a grounding JSON in the format of MDETR as `data mdetr` does: `glip_jax.data.importers.coco_json`.

    `dataset`: options and image folder; None: neither. `name`: of the set, for messages. The phrases of a caption are, in this
    order of preference, the image's `tokens_positive_eval` (a list of spans per phrase), its `phrases` (a span and a kind per
    phrase), or the distinct `tokens_positive` of its annotations. A box belongs to every phrase whose spans are all among the
    spans of the box. Phrases without boxes are not evaluated, as on Flickr30k; they, boxes of no phrase, and what the import
    drops as well, are counted in `left_out`.

    Raises:
        GroundTruthError: what the import of the file would refuse, no phrase with a box, or most boxes lost for one reason.
    """
    given, report, left_out = dataset or EvaluationSet(path, ""), Report(), Counter[str]()
    with setting_names(name):
        data = read_grounding(
            path, given.images, report, folders=folders_of(given.folders), boxes=given.boxes or None,
            crowds=given.crowds or None, fields=lambda item: {k: v for k, v in item.items() if k not in _READ},
        )  # fmt: skip
        images = tuple(_captioned(path, item, report, left_out) for item in data.captions)
        used = sum(len(phrase.boxes) for image in images for phrase in image.phrases)
        chosen = {"box: crowd"} if given.crowds == "drop" else set()
        refuse_losses(
            report, len(images), used + left_out["boxes of no listed phrase"], path, chosen, given.allow_drops
        )
    if not any(image.phrases for image in images):
        raise GroundTruthError(f"{path}: no caption has a phrase with a box: expected at least one")
    left_out += report.dropped + report.noted
    return GroundingTruth(path, images, dict(left_out))


def _captioned(path: str, item: AnnotatedCaption, report: Report, left_out: Counter[str]) -> CaptionedImage:
    """The phrases of an image with their boxes; counts what is left out."""
    caption, where = item.caption, f"{path}, image {item.id}"
    boxes, spans = [], []
    for phrase in item.boxes:
        x, y, width, height = phrase.xywh
        if phrase.crowd:
            report.drop("box: crowd", f"annotation {phrase.key} of image {item.id}")
        elif width <= 0 or height <= 0:
            report.drop("box: no area", f"annotation {phrase.key} of image {item.id}")
        else:
            boxes.append((x, y, x + width, y + height))
            spans.append(tuple(sorted(set(phrase.spans))))
    kinds: dict[Spans, str] = {}
    asked, phrases = item.fields.get("tokens_positive_eval"), item.fields.get("phrases")
    if asked is not None:
        kinds = {_spans(each, caption, f"{where}, tokens_positive_eval"): "" for each in _list(asked, where)}
    elif phrases is not None:
        for each in _list(phrases, where):
            if not isinstance(each, dict) or "span" not in each:
                raise GroundTruthError(f"{where} has the phrase {each!r:.60}: expected an object with span")
            kinds[_spans([each["span"]], caption, f"{where}, phrases")] = str(each.get("kind", ""))
    else:
        kinds = dict.fromkeys(sorted(spans), "")
    found, used = [], set()
    for phrase, kind in kinds.items():
        rows = [row for row, covered in enumerate(spans) if set(phrase) <= set(covered)]
        used |= set(rows)
        if rows:
            found.append(Phrase(phrase, np.asarray([boxes[row] for row in rows], np.float32), kind))
    left_out["phrases without a box"] += len(kinds) - len(found)
    left_out["boxes of no listed phrase"] += len(spans) - len(used)
    left_out["captions without a phrase that has a box"] += not found
    size = {} if item.height is None else {"height": item.height, "width": item.width}
    entry = {**item.fields, "id": item.id, "file_name": item.file, **size, "caption": caption}
    return CaptionedImage(item.id, entry, caption, tuple(found))


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise GroundTruthError(f"{where} has the phrases {value!r:.60}: expected a list")
    return value


def _spans(raw: Any, caption: str, where: str) -> Spans:
    """The (begin, end) characters of a phrase, checked against the caption."""
    if not isinstance(raw, list) or not raw:
        raise GroundTruthError(f"{where} has the spans {raw!r:.60}: expected [[begin, end], ...] with at least one")
    for span in raw:
        valid = isinstance(span, list) and len(span) == 2 and all(type(value) is int for value in span)
        if not valid or not 0 <= span[0] < span[1] <= len(caption):
            raise GroundTruthError(
                f"{where} has the span {span!r:.60} in a caption of {len(caption)} characters: expected [begin, end] with "
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
    return np.nan_to_num(iou(a, b))


def match(
    found: Float[np.ndarray, "D 4"],
    numbers: Int[np.ndarray, " D"],
    true: Float[np.ndarray, "N 4"],
    true_numbers: Int[np.ndarray, " N"],
) -> Int[np.ndarray, " D"]:
    """Per found box (best first) the true box of the same number that it overlaps by `MIN_IOU`, -1 for none; each is met once."""
    met = np.full(len(found), -1, np.int64)
    if not len(found) or not len(true):
        return met
    shared = overlaps(found.astype(np.float32), true.astype(np.float32))
    shared[numbers[:, None] != true_numbers[None]] = 0
    for row in range(len(found)):
        best = int(shared[row].argmax())
        if shared[row, best] >= MIN_IOU:
            met[row] = best
            shared[:, best] = 0
    return met


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
