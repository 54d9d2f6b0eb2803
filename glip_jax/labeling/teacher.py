"""Teachers: detect the phrases of captions in their images, optionally averaged over several views of an image.

A phrase is detected within its caption, as in the original GLIP, because the surrounding words tell which object is meant.
A caption with more tokens than the text encoder accepts is split into several prompts between words and outside phrases;
each prompt is encoded without the others.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from glip_jax.config import Config
from glip_jax.data.captions import says_side
from glip_jax.data.transforms import mirror_boxes
from glip_jax.inference import Detector, bucket
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import Detections, Prompt
from glip_jax.structures.canvas import canvas_size
from glip_jax.structures.prompts import Tokenizer, positive_map

__all__ = [
    "DetectorProtocol", "DetectorTeacher", "ImageQueries", "PhraseDetections", "PromptPlan", "Query", "QueryResult", "Teacher",
    "View", "detector_views", "fuse", "plan_prompts", "select_boxes", "teacher_config",
]  # fmt: skip

_MIN_MAX_DETECTIONS = 300
"""Lower bound of `detection.max_detections`: the number that the original keeps for a prompt of LVIS."""

Span = tuple[int, int]


class PromptPlan(NamedTuple):
    """The prompts that cover the phrases of a caption."""

    prompts: tuple[Prompt, ...]
    phrases: tuple[tuple[int, ...], ...]
    """For each prompt the caption's phrase index of each of its phrases."""
    skipped: dict[int, str]
    """Phrases that fit into no prompt: index to reason."""


class Query(NamedTuple):
    """A caption, the character spans of its phrases, the prompts for them, and the record's id, file and image_id."""

    key: str
    caption: str
    spans: tuple[Span, ...]
    plan: PromptPlan
    file: str = ""
    image_id: str = ""


class ImageQueries(NamedTuple):
    """An image and the queries that share its features."""

    pixels: UInt8[np.ndarray, "H W 3"]
    queries: list[Query]


class PhraseDetections(NamedTuple):
    """Detections of one phrase, by descending score."""

    boxes: Float32[np.ndarray, "D 4"]
    """xyxy in pixels of the image, inclusive."""
    scores: Float32[np.ndarray, " D"]


class QueryResult(NamedTuple):
    """Detections for a caption."""

    detections: list[PhraseDetections]
    """One item per phrase."""
    skipped: dict[int, str]
    """Phrases that the teacher did not look for: index to reason."""
    skip_reason: str = ""
    """Why the teacher has no detections of this image at all; empty where it has."""
    truncated: bool = False
    """Whether the detector reached `max_detections`, so that boxes of lower scores may be missing."""


@runtime_checkable
class DetectorProtocol(Protocol):
    """The part of `Detector` that a teacher uses."""

    config: Config
    tokenizer: Tokenizer

    @property
    def group_size(self) -> int:
        """Images of a call that keeps all its devices busy."""
        ...

    def detect_async(
        self, images: Sequence[Any], prompts_: Sequence[Sequence[Prompt]]
    ) -> Callable[[], list[list[Detections]]]:
        """Starts detecting the prompts of each image; the returned function waits for the detections."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Source of detections for labelling: a checkpoint's network, or a file of another detector's detections."""

    @property
    def group_size(self) -> int:
        """Images per call of `detect_async`."""
        ...

    def batch_key(self, height: int, width: int) -> Any:
        """Images with equal keys can share a batch; None for an image that this teacher does not accept."""
        ...

    def make_query(
        self, key: str, caption: str, spans: tuple[Span, ...], file: str = "", image_id: str = ""
    ) -> Query:  # fmt: skip
        """Prepares the prompts of a caption; called from several threads. `key`, `file`, `image_id`: those of the record."""
        ...

    def detect_async(self, images: Sequence[ImageQueries]) -> Callable[[], list[list[QueryResult]]]:
        """Starts detection for the queries of each image; all images have the same batch key.

        The returned function waits, and returns one result per image and query.
        """
        ...


def teacher_config(
    config: Config, threshold: float, nms_iou: float, short_side: int | None = None, views: int = 1
) -> Config:
    """The config of a teacher's `Detector`: it returns every box whose score exceeds `threshold`.

    A score is sqrt(alignment x centerness) with centerness <= 1, so a score above the threshold implies an alignment
    above its square. With several views, boxes count from half the threshold on. `short_side` replaces the short side of
    evaluation in pixels; the long side is scaled with it. Two aspect ratios are added for images that are longer than the
    training buckets, one portrait and one landscape, so that unusual shapes cause no further compilation.
    """
    min_alignment = (threshold / 2 if views > 1 else threshold) ** 2 * (1 - 1e-4)
    detection = dataclasses.replace(
        config.detection, threshold=min(config.detection.threshold, min_alignment), nms_iou=nms_iou,
        max_detections=max(config.detection.max_detections, _MIN_MAX_DETECTIONS),
    )  # fmt: skip
    short, long = config.evaluation.short_side, config.evaluation.long_side
    if short_side is not None:
        short, long = short_side, round(long * short_side / short)
    return dataclasses.replace(
        config,
        detection=detection,
        evaluation=dataclasses.replace(config.evaluation, short_side=short, long_side=long),
        data=dataclasses.replace(config.data, aspects=(*config.data.aspects, long / short, short / long)),
    )


class View(NamedTuple):
    """A detector at one input size, on the image or on its mirror image."""

    detector: DetectorProtocol
    mirrored: bool
    """Whether the image is flipped left to right; such a view skips captions that mention left or right."""


_PendingView = tuple[View, list[list[int]], Callable[[], list[list[Detections]]]]
"""A view, the indices of the queries of each image that it was given, and the function that waits for its detections."""


class DetectorTeacher:
    """Detects with a network, in one or several views of each image.

    Boxes of several views are mapped back to the image and fused phrase by phrase (`fuse`): a box that all views find keeps
    its score, a box that one of two views finds gets half of it.
    """

    def __init__(self, views: Sequence[View], nms_iou: float, threshold: float) -> None:
        """`threshold`: the minimum over all sources."""
        self.views, self._nms_iou, self._threshold = tuple(views), nms_iou, threshold
        self._first = self.views[0].detector

    @property
    def group_size(self) -> int:
        """Images per call of `detect_async`: a batch for every device."""
        return self._first.group_size

    def batch_key(self, height: int, width: int) -> Any:
        """The canvas size; None for an image so elongated that its canvas would need a compilation of its own."""
        config = self._first.config
        rule, multiple = config.evaluation, config.model.input.extent_multiple
        canvas = bucket(height, width, config)[1]
        canvases = (canvas_size(rule.short_side, aspect, rule.long_side, multiple) for aspect in config.data.aspects)
        return canvas if canvas in canvases else None

    def make_query(
        self, key: str, caption: str, spans: tuple[Span, ...], file: str = "", image_id: str = ""
    ) -> Query:  # fmt: skip
        """The prompts of a caption."""
        plan = plan_prompts(caption, spans, self._first.tokenizer, self._first.config.model.text.max_tokens)
        return Query(key, caption, spans, plan, file, image_id)

    def detect_async(self, images: Sequence[ImageQueries]) -> Callable[[], list[list[QueryResult]]]:
        """See `Teacher`."""
        pending = []
        for view in self.views:
            indices = [
                [
                    n
                    for n, query in enumerate(image.queries)
                    if query.plan.prompts and not (view.mirrored and says_side(query.caption))
                ]
                for image in images
            ]
            pixels = [np.ascontiguousarray(i.pixels[:, ::-1]) if view.mirrored else i.pixels for i in images]
            prompts = [
                [prompt for n in chosen for prompt in image.queries[n].plan.prompts]
                for image, chosen in zip(images, indices)
            ]
            pending.append((view, indices, view.detector.detect_async(pixels, prompts)))
        return lambda: self._results(images, pending)

    def _results(self, images: Sequence[ImageQueries], pending: Sequence[_PendingView]) -> list[list[QueryResult]]:
        by_view: list[list[list[list[PhraseDetections]]]] = [[[] for _ in image.queries] for image in images]
        truncated: set[tuple[int, int]] = set()
        for view, indices, wait in pending:
            for i, detections in enumerate(wait()):
                remaining = iter(detections)
                for n in indices[i]:
                    query = images[i].queries[n]
                    parts = [next(remaining) for _ in query.plan.prompts]
                    width = images[i].pixels.shape[1] if view.mirrored else 0
                    by_view[i][n].append(_by_phrase(query, parts, width))
                    limit = view.detector.config.detection.max_detections
                    if any(len(part.scores) >= limit and part.scores.min() > self._threshold for part in parts):
                        truncated.add((i, n))
        return [
            [
                QueryResult(self._fused(query, by_view[i][n]), query.plan.skipped, truncated=(i, n) in truncated)
                for n, query in enumerate(image.queries)
            ]
            for i, image in enumerate(images)
        ]

    def _fused(self, query: Query, views: list[list[PhraseDetections]]) -> list[PhraseDetections]:
        if not views:
            return [_EMPTY] * len(query.spans)
        if len(self.views) == 1:
            return views[0]
        min_score = self._threshold / 2
        return [fuse([view[phrase] for view in views], min_score, self._nms_iou) for phrase in range(len(query.spans))]


def _by_phrase(query: Query, parts: Sequence[Detections], mirrored_width: int) -> list[PhraseDetections]:
    """Groups the detections of a caption's prompts by phrase, in pixels of the stored (unmirrored) image."""
    result = [_EMPTY] * len(query.spans)
    for part, phrases in zip(parts, query.plan.phrases, strict=True):
        boxes, scores = np.asarray(part.boxes, np.float32).reshape(-1, 4), np.asarray(part.scores, np.float32)
        if mirrored_width:
            boxes = mirror_boxes(boxes, mirrored_width)
        for number, phrase in enumerate(phrases):
            chosen = np.asarray(part.phrases) == number
            result[phrase] = PhraseDetections(boxes[chosen], scores[chosen])
    return result


_EMPTY = PhraseDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def select_boxes(
    detections: PhraseDetections, threshold: float, nms_iou: float, max_boxes: int
) -> tuple[PhraseDetections, int]:
    """Selects the boxes of a phrase: scores above `threshold`, non-maximum suppression, at most `max_boxes`.

    A box is suppressed by one of a higher score if their IoU (inclusive pixels) exceeds `nms_iou`. Returns the boxes, and
    the number that only `max_boxes` removed.
    """
    order = np.argsort(-detections.scores, kind="stable")
    order = order[detections.scores[order] > threshold]
    overlaps: Bool[np.ndarray, "D D"] = box.pairwise_iou(detections.boxes[order], detections.boxes[order]) > nms_iou
    alive: Bool[np.ndarray, " D"] = np.ones(len(order), bool)
    selected = []
    for index in range(len(order)):
        if alive[index]:
            selected.append(index)
            alive &= ~overlaps[index]
    kept = order[selected[:max_boxes]]
    return PhraseDetections(detections.boxes[kept], detections.scores[kept]), max(0, len(selected) - max_boxes)


def fuse(views: Sequence[PhraseDetections], min_score: float, iou: float) -> PhraseDetections:
    """Fuses the detections of a phrase in several views of an image (weighted boxes fusion, arXiv 1910.13302).

    In the order of descending scores, each box is matched in every other view with the box of the highest score among those
    with an IoU above `iou`. The fused box is their mean weighted by score; its score is the sum of their scores divided by
    the number of views, so a view without a match counts as 0. Boxes with a score of at most `min_score` are ignored.
    """
    parts = [
        PhraseDetections(view.boxes[view.scores > min_score], view.scores[view.scores > min_score]) for view in views
    ]
    boxes = np.concatenate([part.boxes for part in parts]) if parts else _EMPTY.boxes
    scores = np.concatenate([part.scores for part in parts]) if parts else _EMPTY.scores
    view_of = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
    unmatched: Bool[np.ndarray, " D"] = np.ones(len(scores), bool)
    results: list[tuple[Float[np.ndarray, "4"], float]] = []
    for best in np.argsort(-scores, kind="stable"):
        if not unmatched[best]:
            continue
        overlap = box.iou(boxes, boxes[best][None])
        members = [best]
        for other in range(len(parts)):
            near = np.flatnonzero(unmatched & (view_of == other) & (overlap > iou))
            if other != view_of[best] and len(near):
                members.append(near[scores[near].argmax()])
        # Boxes of the same view that overlap the best one are duplicates, as in non-maximum suppression.
        unmatched[members] = False
        unmatched &= ~((overlap > iou) & (view_of == view_of[best]))
        weights = scores[members]
        results.append(((boxes[members] * weights[:, None]).sum(0) / weights.sum(), float(weights.sum()) / len(parts)))
    results.sort(key=lambda item: -item[1])
    return PhraseDetections(
        np.asarray([fused for fused, _ in results], np.float32).reshape(-1, 4),
        np.asarray([score for _, score in results], np.float32),
    )


def plan_prompts(caption: str, spans: Sequence[Span], tokenizer: Tokenizer, max_tokens: int) -> PromptPlan:
    """Plans the prompts for the phrases `spans` of a caption, each of at most `max_tokens` tokens including [CLS] and [SEP].

    A caption that fits is one prompt. A longer one is split into consecutive parts that begin and end between words and
    split no phrase. Phrases without a token, of which the vocabulary knows nothing, or with more tokens than a prompt holds, are
    skipped.
    """
    encoding = tokenizer.encode(caption)
    offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
    tokens = positive_map(offsets, [[span] for span in spans])
    skipped = dict.fromkeys(np.flatnonzero(~tokens.any(1)).tolist(), "no token")
    unread = (n for n in range(len(spans)) if {encoding.tokens[i] for i in np.flatnonzero(tokens[n])} == {"[UNK]"})
    skipped |= dict.fromkeys(unread, "no word that the vocabulary knows")
    first, last = tokens.argmax(1), tokens.shape[1] - 1 - tokens[:, ::-1].argmax(1)
    remaining = [phrase for phrase in range(len(spans)) if phrase not in skipped]
    if len(offsets) <= max_tokens:
        whole = Prompt(caption, tuple((spans[phrase],) for phrase in remaining))
        return PromptPlan((whole,) if remaining else (), (tuple(remaining),) if remaining else (), skipped)
    budget = max_tokens - 2
    too_long = {phrase for phrase in remaining if last[phrase] - first[phrase] >= budget}
    skipped |= dict.fromkeys(sorted(too_long), "more tokens than the teacher's text limit")
    remaining = sorted((phrase for phrase in remaining if phrase not in too_long), key=lambda phrase: first[phrase])
    prompts, phrases, begin = [], [], 1  # after [CLS]
    while remaining:
        if last[remaining[0]] >= begin + budget or first[remaining[0]] < begin:
            begin = int(first[remaining[0]])
        end = min(begin + budget, len(offsets) - 1)
        taken = [phrase for phrase in remaining if last[phrase] < end]
        remaining = [phrase for phrase in remaining if last[phrase] >= end]
        min_end = int(max(last[phrase] for phrase in taken)) + 1
        end = max(min_end, min([end, *(int(first[phrase]) for phrase in remaining)]))
        # Tokens that continue a word begin with ##; without the word's beginning they would become other tokens.
        while min_end < end < len(offsets) - 1 and encoding.tokens[end].startswith("##"):
            end -= 1
        prompt = _part(caption, offsets, begin, end, [spans[phrase] for phrase in taken])
        if len(tokenizer.encode(prompt.caption).ids) > max_tokens:  # a word that was split has more tokens now
            skipped |= dict.fromkeys(taken, "more tokens than the teacher's text limit")
        else:
            prompts.append(prompt)
            phrases.append(tuple(taken))
        begin = end
    return PromptPlan(tuple(prompts), tuple(phrases), dict(sorted(skipped.items())))


def _part(caption: str, offsets: np.ndarray, begin: int, end: int, spans: Sequence[Span]) -> Prompt:
    """The part of a caption from token `begin` up to token `end` (exclusive), with the spans shifted accordingly."""
    start, stop = int(offsets[begin, 0]), int(offsets[end - 1, 1])
    shifted = (((max(a - start, 0), min(b, stop) - start),) for a, b in spans)
    return Prompt(caption[start:stop], tuple(shifted))


def detector_views(
    config: Config, params: Any, threshold: float, nms_iou: float, flip: bool, scales: Sequence[int], batch_size: int | None
) -> list[View]:  # fmt: skip
    """The views of a checkpoint: one for each of `scales` (short sides in pixels; empty: the short side of evaluation), and
    with `flip` a mirrored one for each too.
    """
    sizes: list[int | None] = list(scales) or [None]
    views = []
    detector: Detector | None = None
    for size in sizes:
        view_config = teacher_config(config, threshold, nms_iou, size, len(sizes) * (2 if flip else 1))
        detector = Detector(view_config, params, batch_size, texts_of=detector)
        views += [View(detector, mirrored) for mirrored in ((False, True) if flip else (False,))]
    return views
