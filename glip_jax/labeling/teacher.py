"""The teacher: what a detector finds for the phrases of captions, over several views of an image where asked for.

A phrase is asked for within its caption, as the original does it, not on its own: words around it say which one is meant.
A caption of more tokens than the teacher reads becomes several prompts, each a stretch of whole words around whole
phrases; of the other stretches the teacher knows nothing then.
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
    "QueryResult", "PromptPlan", "Boxes", "DetectorTeacher", "DetectorProtocol", "Picture", "Query", "Teacher", "View", "ask", "fuse",
    "detectors", "keep", "teacher_config",
]  # fmt: skip

_MOST_DETECTIONS = 300
"""Of a prompt; as many as the original keeps of a prompt of LVIS."""

Span = tuple[int, int]


class PromptPlan(NamedTuple):
    """The prompts that ask for the phrases of a caption."""

    prompts: tuple[Prompt, ...]
    phrases: tuple[tuple[int, ...], ...]
    """Per prompt, which phrases of the caption its own are."""
    unasked: dict[int, str]
    """Phrases that cannot be asked for, and why."""


class Query(NamedTuple):
    """A caption and what is asked of it; `key` is the record's id."""

    key: str
    caption: str
    spans: tuple[Span, ...]
    asked: PromptPlan


class Picture(NamedTuple):
    """An image and the captions that it has."""

    pixels: UInt8[np.ndarray, "H W 3"]
    questions: list[Query]


class Boxes(NamedTuple):
    """What was found of a phrase, best first."""

    boxes: Float32[np.ndarray, "D 4"]
    """xyxy, pixels of the image, inclusive."""
    scores: Float32[np.ndarray, " D"]


class QueryResult(NamedTuple):
    """What was found for a caption."""

    found: list[Boxes]
    """Per phrase."""
    unasked: dict[int, str]
    """Phrases of which the teacher could not be asked, and why."""
    left_out: str = ""
    """Why nothing can be said of the image, if so."""
    cut: bool = False
    """Whether the detector found as many boxes as it may, so that worse ones may be missing."""


@runtime_checkable
class DetectorProtocol(Protocol):
    """What is needed of a `Detector`."""

    config: Config
    tokenizer: Tokenizer
    batch_size: int

    def detect_async(
        self, images: Sequence[Any], prompts_: Sequence[Sequence[Prompt]]
    ) -> Callable[[], list[list[Detections]]]:
        """Begins to find each image's own prompts; what comes back waits for the detections."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """What labelling asks: the network of a checkpoint, or somebody else's detections."""

    @property
    def images(self) -> int:
        """How many images `answers` wants at a time."""
        ...

    def group(self, height: int, width: int) -> Any:
        """Images of equal groups go together; None for an image that cannot be looked at."""
        ...

    def question(self, key: str, caption: str, spans: tuple[Span, ...]) -> Query:
        """Prepares a caption; called from several threads."""
        ...

    def detect_async(self, pictures: Sequence[Picture]) -> Callable[[], list[list[QueryResult]]]:
        """Begins to answer the questions of each picture, all of one group; what comes back waits for the answers."""
        ...


def teacher_config(
    config: Config, threshold: float, nms_iou: float, short_side: int | None = None, views: int = 1
) -> Config:
    """Settings of evaluation with which no box that a `threshold` keeps is lost before it.

    A score is sqrt(alignment x centerness), and no centerness is above 1: a box above the threshold has an alignment
    above its square. Where views are averaged a box counts from half the threshold on. `short_side`: another size to
    look at, the long side in proportion. Images too long for the buckets of training share two canvases more, one
    upright and one lying, so that no odd shape costs a compilation.
    """
    least = (threshold / 2 if views > 1 else threshold) ** 2 * (1 - 1e-4)
    detection = dataclasses.replace(
        config.detection, threshold=min(config.detection.threshold, least), nms_iou=nms_iou,
        max_detections=max(config.detection.max_detections, _MOST_DETECTIONS),
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
    """One way of looking at an image."""

    detector: DetectorProtocol
    mirrored: bool
    """Left to right; passed over for captions that say left or right."""


_BegunView = tuple[View, list[list[int]], Callable[[], list[list[Detections]]]]
"""A view, which questions of each picture it was asked, and its detections."""


class DetectorTeacher:
    """Asks a detector, over one or several views.

    Boxes of several views are mapped back and fused phrase by phrase, see `fuse`: what all views see keeps its score,
    what one of two sees has half of it.
    """

    def __init__(self, views: Sequence[View], nms_iou: float, threshold: float) -> None:
        """`threshold`: the least of all sources."""
        self.views, self._nms_iou, self._threshold = tuple(views), nms_iou, threshold
        self._first = self.views[0].detector

    @property
    def images(self) -> int:
        """Images of one batch."""
        return self._first.batch_size

    def group(self, height: int, width: int) -> Any:
        """The canvas; None for images so long and narrow that each would need a program of its own."""
        config = self._first.config
        rule, multiple = config.evaluation, config.model.input.extent_multiple
        canvas = bucket(height, width, config)[1]
        known = (canvas_size(rule.short_side, aspect, rule.long_side, multiple) for aspect in config.data.aspects)
        return canvas if canvas in known else None

    def question(self, key: str, caption: str, spans: tuple[Span, ...]) -> Query:
        """The prompts of a caption."""
        asked = ask(caption, spans, self._first.tokenizer, self._first.config.model.text.max_tokens)
        return Query(key, caption, spans, asked)

    def detect_async(self, pictures: Sequence[Picture]) -> Callable[[], list[list[QueryResult]]]:
        """See `Teacher`."""
        begun = []
        for view in self.views:
            asked = [
                [
                    n
                    for n, q in enumerate(p.questions)
                    if q.asked.prompts and not (view.mirrored and says_side(q.caption))
                ]
                for p in pictures
            ]
            images = [np.ascontiguousarray(p.pixels[:, ::-1]) if view.mirrored else p.pixels for p in pictures]
            prompts = [
                [prompt for n in own for prompt in p.questions[n].asked.prompts] for p, own in zip(pictures, asked)
            ]
            begun.append((view, asked, view.detector.detect_async(images, prompts)))
        return lambda: self._answers(pictures, begun)

    def _answers(self, pictures: Sequence[Picture], begun: Sequence[_BegunView]) -> list[list[QueryResult]]:
        found: list[list[list[list[Boxes]]]] = [[[] for _ in picture.questions] for picture in pictures]
        cut: set[tuple[int, int]] = set()
        for view, asked, detected in begun:
            for place, detections in enumerate(detected()):
                answers = iter(detections)
                for n in asked[place]:
                    question = pictures[place].questions[n]
                    parts = [next(answers) for _ in question.asked.prompts]
                    width = pictures[place].pixels.shape[1] if view.mirrored else 0
                    found[place][n].append(_by_phrase(question, parts, width))
                    most = view.detector.config.detection.max_detections
                    if any(len(part.scores) >= most and part.scores.min() > self._threshold for part in parts):
                        cut.add((place, n))
        return [
            [
                QueryResult(self._fused(q, found[place][n]), q.asked.unasked, cut=(place, n) in cut)
                for n, q in enumerate(p.questions)
            ]
            for place, p in enumerate(pictures)
        ]

    def _fused(self, question: Query, views: list[list[Boxes]]) -> list[Boxes]:
        if not views:
            return [_NOTHING] * len(question.spans)
        if len(self.views) == 1:
            return views[0]
        least = self._threshold / 2
        return [fuse([view[phrase] for view in views], least, self._nms_iou) for phrase in range(len(question.spans))]


def _by_phrase(question: Query, parts: Sequence[Detections], mirrored_width: int) -> list[Boxes]:
    """The detections of a caption's prompts, phrase by phrase, in the pixels of the image as it is stored."""
    result = [_NOTHING] * len(question.spans)
    for part, phrases in zip(parts, question.asked.phrases, strict=True):
        boxes, scores = np.asarray(part.boxes, np.float32).reshape(-1, 4), np.asarray(part.scores, np.float32)
        if mirrored_width:
            boxes = mirror_boxes(boxes, mirrored_width)
        for own, phrase in enumerate(phrases):
            chosen = np.asarray(part.phrases) == own
            result[phrase] = Boxes(boxes[chosen], scores[chosen])
    return result


_NOTHING = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def keep(found: Boxes, threshold: float, nms_iou: float, most: int) -> tuple[Boxes, int]:
    """Boxes of a phrase above `threshold`, without those that overlap a better one by more than `nms_iou` (inclusive
    pixels), at most `most`; and how many more there were.
    """
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] > threshold]
    near: Bool[np.ndarray, "D D"] = box.pairwise_iou(found.boxes[order], found.boxes[order]) > nms_iou
    alive: Bool[np.ndarray, " D"] = np.ones(len(order), bool)
    chosen = []
    for place in range(len(order)):
        if alive[place]:
            chosen.append(place)
            alive &= ~near[place]
    kept = order[chosen[:most]]
    return Boxes(found.boxes[kept], found.scores[kept]), max(0, len(chosen) - most)


def fuse(views: Sequence[Boxes], least: float, iou: float) -> Boxes:
    """One set of boxes from those that several views of an image give a phrase (weighted boxes fusion, arXiv 1910.13302).

    From the best box on, each gathers of every other view the best box that overlaps it by more than `iou`. The result
    is their mean weighted by score; its score is the sum of theirs over the number of views, so that a view which sees
    nothing counts as 0. Boxes with a score of `least` or less count as not seen.
    """
    parts = [Boxes(view.boxes[view.scores > least], view.scores[view.scores > least]) for view in views]
    boxes = np.concatenate([part.boxes for part in parts]) if parts else _NOTHING.boxes
    scores = np.concatenate([part.scores for part in parts]) if parts else _NOTHING.scores
    owner = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
    free: Bool[np.ndarray, " D"] = np.ones(len(scores), bool)
    results: list[tuple[Float[np.ndarray, "4"], float]] = []
    for best in np.argsort(-scores, kind="stable"):
        if not free[best]:
            continue
        overlap = box.iou(boxes, boxes[best][None])
        members = [best]
        for other in range(len(parts)):
            near = np.flatnonzero(free & (owner == other) & (overlap > iou))
            if other != owner[best] and len(near):
                members.append(near[scores[near].argmax()])
        # What overlaps the best of its own view is the same thing once more, as in a suppression.
        free[members] = False
        free &= ~((overlap > iou) & (owner == owner[best]))
        weights = scores[members]
        results.append(((boxes[members] * weights[:, None]).sum(0) / weights.sum(), float(weights.sum()) / len(parts)))
    results.sort(key=lambda item: -item[1])
    return Boxes(
        np.asarray([own for own, _ in results], np.float32).reshape(-1, 4),
        np.asarray([score for _, score in results], np.float32),
    )


def ask(caption: str, spans: Sequence[Span], tokenizer: Tokenizer, max_tokens: int) -> PromptPlan:
    """The prompts that ask for `spans` of a caption, each of at most `max_tokens` tokens ([CLS] and [SEP] included).

    The caption itself where it fits; else stretches of it, one behind the other, that begin and end at words and cut no
    phrase. A phrase that has no token, or more than a prompt holds, is not asked for.
    """
    encoding = tokenizer.encode(caption)
    offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
    tokens = positive_map(offsets, [[span] for span in spans])
    unasked = dict.fromkeys(np.flatnonzero(~tokens.any(1)).tolist(), "no token")
    first, last = tokens.argmax(1), tokens.shape[1] - 1 - tokens[:, ::-1].argmax(1)
    left = [phrase for phrase in range(len(spans)) if phrase not in unasked]
    if len(offsets) <= max_tokens:
        whole = Prompt(caption, tuple((spans[phrase],) for phrase in left))
        return PromptPlan((whole,) if left else (), (tuple(left),) if left else (), unasked)
    budget = max_tokens - 2
    over = {phrase for phrase in left if last[phrase] - first[phrase] >= budget}
    unasked |= dict.fromkeys(sorted(over), "longer than the teacher's text")
    left = sorted((phrase for phrase in left if phrase not in over), key=lambda phrase: first[phrase])
    prompts, phrases, begin = [], [], 1  # behind [CLS]
    while left:
        if last[left[0]] >= begin + budget or first[left[0]] < begin:
            begin = int(first[left[0]])
        end = min(begin + budget, len(offsets) - 1)
        taken = [phrase for phrase in left if last[phrase] < end]
        left = [phrase for phrase in left if last[phrase] >= end]
        least = int(max(last[phrase] for phrase in taken)) + 1
        end = max(least, min([end, *(int(first[phrase]) for phrase in left)]))
        # A word's later tokens begin with ##: alone they would be read as others.
        while least < end < len(offsets) - 1 and encoding.tokens[end].startswith("##"):
            end -= 1
        prompt = _stretch(caption, offsets, begin, end, [spans[phrase] for phrase in taken])
        if len(tokenizer.encode(prompt.caption).ids) > max_tokens:  # the cut word has become longer
            unasked |= dict.fromkeys(taken, "longer than the teacher's text")
        else:
            prompts.append(prompt)
            phrases.append(tuple(taken))
        begin = end
    return PromptPlan(tuple(prompts), tuple(phrases), dict(sorted(unasked.items())))


def _stretch(caption: str, offsets: np.ndarray, begin: int, end: int, spans: Sequence[Span]) -> Prompt:
    """The part of a caption from token `detect_async` up to token `end`, and phrases with their places in it."""
    start, stop = int(offsets[begin, 0]), int(offsets[end - 1, 1])
    moved = (((max(a - start, 0), min(b, stop) - start),) for a, b in spans)
    return Prompt(caption[start:stop], tuple(moved))


def detectors(
    config: Config, params: Any, threshold: float, nms_iou: float, flip: bool, scales: Sequence[int], batch_size: int | None
) -> list[View]:  # fmt: skip
    """The views of a checkpoint: each of `scales` (short sides in pixels; none: the one of evaluation), and with `flip`
    each of them mirrored too.
    """
    sizes: list[int | None] = list(scales) or [None]
    views = []
    detector: Detector | None = None
    for size in sizes:
        own = teacher_config(config, threshold, nms_iou, size, len(sizes) * (2 if flip else 1))
        detector = Detector(own, detector.params if detector else params, batch_size, texts_of=detector)
        views += [View(detector, mirrored) for mirrored in ((False, True) if flip else (False,))]
    return views
