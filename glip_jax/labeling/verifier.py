"""A second judge of labels: another model's veto of phrases that the teacher boxed.

A phrase for which the verifier has no box above its threshold is vetoed in that image; it becomes unknown. Verification of
existence by another model gave SAM 3's data more than better boxes did (cgF1 +7.2 against +1.1, arXiv 2511.16719).

A network is asked each phrase as a prompt of its own. In a caption, fusion lets a word take evidence from its neighbours, and the
words of a caption compete in one softmax, so the teacher's own mistake is repeated; a veto needs a score that depends on the image and
the phrase alone. It costs fusion and head once for each phrase, the image encoder once for each image. Asked by the whole caption
(`alone=False`) it costs what the teacher costs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from glip_jax.labeling.teacher import (
    DetectorTeacher,
    ImageQueries,
    PhraseDetections,
    PromptPlan,
    Query,
    QueryResult,
    Teacher,
    View,
    plan_prompts,
)
from glip_jax.structures import boxes as box

__all__ = ["PhraseTeacher", "Verdict", "Verifier"]

_TOO_LONG = "image too long and narrow"


class Verdict(NamedTuple):
    """What a verifier says of the phrases of a caption that it was asked for; indices are those of the query's spans."""

    found: dict[int, PhraseDetections]
    """The verifier's boxes above its threshold of each phrase that it judged; none: the phrase is vetoed."""
    not_judged: dict[int, str]
    """Phrases that it cannot judge: index to reason."""


class Verifier:
    """Judges phrases by the detections of a second teacher."""

    def __init__(self, teacher: Teacher, threshold: float, iou: float = 0.0) -> None:
        """`threshold`: a phrase exists if the second teacher has a box of a higher score; `iou`: see `confirmed`."""
        self._teacher, self._threshold, self._iou = teacher, threshold, iou

    @property
    def group_size(self) -> int:
        """Images per call of `verify_async` that keep its devices busy."""
        return self._teacher.group_size

    def batch_key(self, height: int, width: int) -> Any:
        """Images with equal keys can share a batch; None for an image that is not judged."""
        return self._teacher.batch_key(height, width)

    def verify_async(
        self, images: Sequence[ImageQueries], asked: Sequence[Sequence[Sequence[int]]]
    ) -> Callable[[], list[list[Verdict]]]:
        """Starts to judge; `asked`: per image and query the indices of the phrases. The returned function waits."""
        queries = [
            [_of_phrases(self._teacher, query, own) for query, own in zip(image.queries, phrases, strict=True)]
            for image, phrases in zip(images, asked, strict=True)
        ]
        fits = [self.batch_key(*image.pixels.shape[:2]) is not None for image in images]
        given = [
            ImageQueries(image.pixels, own if fit else [])
            for image, own, fit in zip(images, queries, fits, strict=True)
        ]
        finish = self._teacher.detect_async(given)

        def verdicts() -> list[list[Verdict]]:
            return [
                [self._verdict(own, result) for own, result in zip(phrases, results, strict=True)]
                if fit
                else [Verdict({}, dict.fromkeys(own, _TOO_LONG)) for own in phrases]
                for phrases, results, fit in zip(asked, finish(), fits, strict=True)
            ]

        return verdicts

    def confirmed(self, boxes: Float32[np.ndarray, "D 4"], found: PhraseDetections) -> Bool[np.ndarray, " D"]:
        """Which boxes (xyxy in inclusive pixels) of a phrase stay: all if `found` has a box; with `iou`, those that one of its
        boxes overlaps by at least that.
        """
        if not len(found.scores) or not self._iou:
            return np.full(len(boxes), len(found.scores) > 0)
        return box.pairwise_iou(boxes, found.boxes).max(1) >= self._iou

    def _verdict(self, asked: Sequence[int], result: QueryResult) -> Verdict:
        if result.skip_reason:
            return Verdict({}, dict.fromkeys(asked, result.skip_reason))
        found, not_judged = {}, {}
        for number, phrase in enumerate(asked):
            if number in result.skipped:
                not_judged[phrase] = result.skipped[number]
            else:
                detections = result.detections[number]
                above = detections.scores > self._threshold
                found[phrase] = PhraseDetections(detections.boxes[above], detections.scores[above])
        return Verdict(found, not_judged)


def _of_phrases(teacher: Teacher, query: Query, phrases: Sequence[int]) -> Query:
    """A query for some phrases of another; their indices are those in `phrases`."""
    spans = tuple(query.spans[phrase] for phrase in phrases)
    return teacher.make_query(query.key, query.caption, spans, query.file, query.image_id)


class PhraseTeacher:
    """A network that detects each phrase as a prompt of its own: its score does not depend on the rest of the caption.

    Captions of one image often share phrases ("a dog"), which are asked once.
    """

    def __init__(self, teacher: DetectorTeacher) -> None:
        """`teacher`: its network, with one view."""
        self._teacher = teacher
        (view,) = teacher.views
        self._plan = functools.lru_cache(maxsize=100_000)(functools.partial(_plan, view))

    @property
    def group_size(self) -> int:
        """Images per call of `detect_async`."""
        return self._teacher.group_size

    def batch_key(self, height: int, width: int) -> Any:
        """As that of the network's teacher."""
        return self._teacher.batch_key(height, width)

    def make_query(
        self, key: str, caption: str, spans: tuple[tuple[int, int], ...], file: str = "", image_id: str = ""
    ) -> Query:  # fmt: skip
        """A prompt for each phrase; those that the text encoder cannot read are skipped."""
        plans = [self._plan(_text(caption, span)) for span in spans]
        skipped = {number: reason for number, plan in enumerate(plans) for reason in plan.skipped.values()}
        asked = [(plan.prompts[0], (number,)) for number, plan in enumerate(plans) if plan.prompts]
        prompts, phrases = zip(*asked) if asked else ((), ())
        return Query(key, caption, spans, PromptPlan(prompts, phrases, skipped), file, image_id)

    def detect_async(self, images: Sequence[ImageQueries]) -> Callable[[], list[list[QueryResult]]]:
        """See `Teacher`."""
        once = []
        for image in images:
            # The prompt of a text is the same object for all images, which the Detector encodes once.
            prompts = list(dict.fromkeys(prompt for query in image.queries for prompt in query.plan.prompts))
            spans = tuple(prompt.spans[0][0] for prompt in prompts)
            plan = PromptPlan(tuple(prompts), tuple((number,) for number in range(len(prompts))), {})
            once.append(ImageQueries(image.pixels, [Query("", "", spans, plan)] if prompts else []))
        finish = self._teacher.detect_async(once)

        def results() -> list[list[QueryResult]]:
            every = []
            for image, asked, found in zip(images, once, finish(), strict=True):
                prompts = asked.queries[0].plan.prompts if asked.queries else ()
                by_prompt = dict(zip(prompts, found[0].detections)) if prompts else {}
                every.append([_result(query, by_prompt) for query in image.queries])
            return every

        return results


def _result(query: Query, by_prompt: dict[Any, PhraseDetections]) -> QueryResult:
    detections = [PhraseDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))] * len(query.spans)
    for prompt, (number,) in zip(query.plan.prompts, query.plan.phrases, strict=True):
        detections[number] = by_prompt[prompt]
    return QueryResult(detections, query.plan.skipped)


def _plan(view: View, text: str) -> PromptPlan:
    detector = view.detector
    return plan_prompts(text, [(0, len(text))], detector.tokenizer, detector.config.model.text.max_tokens)


def _text(caption: str, span: tuple[int, int]) -> str:
    """The words of a phrase as a prompt: single spaces, so that equal phrases are one text."""
    return " ".join(caption[slice(*span)].split())
