"""From the captions of a shard to pseudo records: the work between reading, the teacher and writing.

Threads read, decode and find phrases ahead of the teacher, so that a device need not wait; images of one canvas go to the
teacher together, and captions of one image share its features.
"""

import dataclasses
import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from glip_jax.data import images as codec
from glip_jax.data.importers.entry import Report
from glip_jax.data.records import Record, RecordError, content_hash
from glip_jax.data.shards import Shards
from glip_jax.labeling.phrases.finders import PhraseFinder, head_word
from glip_jax.labeling.phrases.language import OTHER_SCRIPT, language_doubt
from glip_jax.labeling.statistics import LabelStatistics
from glip_jax.labeling.teacher import Picture, Query, QueryResult, Span, Teacher, keep

__all__ = ["Labeler", "Rules", "pseudo_record"]

_BEGUN = 1
"""Batches that the teacher is at while the one before is written."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Rules:
    """What of a teacher's boxes becomes a pseudo label."""

    threshold: float = 0.5
    """A box is kept if its score is above."""
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """By source, where it is another."""
    nms_iou: float = 0.6
    """Of two boxes of a phrase that overlap by more, the better one stays."""
    most_boxes: int = 10
    """Of a phrase."""

    def of(self, source: str) -> float:
        """The threshold of a source."""
        return self.thresholds.get(source, self.threshold)

    def least(self, sources: Iterable[str]) -> float:
        """The lowest threshold of any of the sources."""
        return min(map(self.of, sources))


class _Ready(NamedTuple):
    """A record that can be asked about; without pixels it is left out."""

    record: Record | None
    image: int
    """Content hash."""
    pixels: UInt8[np.ndarray, "H W 3"] | None
    question: Query | None
    left_out: str
    example: str
    dropped_phrases: Mapping[str, int]
    surplus: tuple[Span, ...] = ()
    """Phrases beyond the most of a caption."""
    doubt: str = ""
    """Why the caption may be none in English."""


class _Begun(NamedTuple):
    """What the teacher was asked."""

    readies: list[list[_Ready]]
    """Per image the records that share it."""
    answers: Callable[[], list[list[QueryResult]]]
    """Waits for them."""


class Labeler:
    """Labels ranges of records."""

    def __init__(
        self, teacher: Teacher, finder: PhraseFinder, rules: Rules, about: Mapping[str, Any], code: str, threads: int
    ) -> None:  # fmt: skip
        """`about`: what every record says of where it comes from, beside threshold and code; `threads` read ahead."""
        self._teacher, self._finder, self._rules, self._about = teacher, finder, rules, about
        self._code, self._threads = code, threads
        self._one = threading.Lock()

    def label(
        self, shards: Shards, begin: int, end: int, write: Callable[[Record], Any], made: Callable[[int], Any]
    ) -> LabelStatistics:  # fmt: skip
        """Labels records `detect_async` up to `end`; `write` gets the pseudo records, `made` is told how many were looked at.

        The order of what is written is the order in which images become a batch, the same each time.
        """
        source = shards.manifest.name
        tally = LabelStatistics()
        tally.code[self._code] += 0
        waiting: defaultdict[Any, dict[int, list[_Ready]]] = defaultdict(dict)
        begun: deque[_Begun] = deque()

        def ask(own: Mapping[int, list[_Ready]]) -> None:
            """While the teacher looks at these, what it found in those before is chosen and written."""
            begun.append(self._ask(own))
            while len(begun) > _BEGUN:
                self._write(begun.popleft(), source, tally, write, made)

        with ThreadPoolExecutor(self._threads) as pool:
            depth = 2 * self._threads + 2 * self._teacher.images
            for ready in _ahead(pool, lambda index: self._ready(shards, index), range(begin, end), depth):
                group = self._told(ready, source, tally)
                if group is None:
                    made(1)
                    continue
                own = waiting[group]
                if ready.image not in own and len(own) >= self._teacher.images:
                    ask(own)
                    own.clear()
                own.setdefault(ready.image, []).append(ready)
            for own in waiting.values():
                ask(own)
            while begun:
                self._write(begun.popleft(), source, tally, write, made)
        return tally

    def _ready(self, shards: Shards, index: int) -> _Ready:
        """In a thread: all that can be done before the teacher is asked."""
        try:
            record = shards[index]
            with self._one:  # finders do not say that threads may share them
                (spans, dropped, surplus), doubt = self._finder.find(record.caption), language_doubt(record.caption)
            if doubt == OTHER_SCRIPT:
                example = f"{record.id}: {record.caption!r:.80}"
                return _Ready(record, 0, None, None, f"caption: {doubt}", example, {})
            if not spans:
                reason, example = "caption: no noun phrase", f"{record.id}: {record.caption!r:.80}"
                return _Ready(record, 0, None, None, reason, example, dropped)
            if self._teacher.group(record.height, record.width) is None:
                example = f"{record.id}: {record.height} x {record.width}"
                return _Ready(record, 0, None, None, "image: too long and narrow", example, dropped)
            pixels = codec.decode(record, "fast")  # equal pixels, in half of Pillow's time
            question = self._teacher.question(record.id, record.caption, spans)
            return _Ready(record, content_hash(record.image), pixels, question, "", "", dropped, surplus, doubt)
        except RecordError as error:
            reason = "image: cannot be decoded" if "field image" in str(error) else "record: corrupt"
            return _Ready(None, 0, None, None, reason, str(error), {})

    def _told(self, ready: _Ready, source: str, tally: LabelStatistics) -> Any:
        """Counts a record; the group that it waits in, None if it is left out."""
        tally.captions += 1
        tally.source(source, captions=1)
        for reason, count in ready.dropped_phrases.items():
            example = f"{ready.record.id}: {ready.record.caption!r:.80}" if ready.record else ""
            tally.report.drop(f"phrase: {reason}", example, count)
        if ready.record is None or ready.question is None:
            tally.report.drop(ready.left_out, ready.example)
            return None
        if ready.doubt:
            tally.report.note(f"caption: {ready.doubt}", f"{ready.record.id}: {ready.record.caption!r:.80}")
        if len(ready.question.asked.prompts) > 1:
            example = f"{ready.record.id}: {len(ready.question.asked.prompts)} prompts"
            tally.report.note("caption: longer than the teacher's text, asked in several prompts", example)
        return self._teacher.group(ready.record.height, ready.record.width)

    def _ask(self, waiting: Mapping[int, list[_Ready]]) -> _Begun:
        """Asks the teacher about the images that wait."""
        pictures = [
            Picture(own[0].pixels, [ready.question for ready in own if ready.question is not None])
            for own in waiting.values()
            if own[0].pixels is not None
        ]
        return _Begun(list(waiting.values()), self._teacher.detect_async(pictures))

    def _write(
        self, begun: _Begun, source: str, tally: LabelStatistics, write: Callable[[Record], Any], made: Callable[[int], Any]
    ) -> None:  # fmt: skip
        """Chooses of what the teacher found, and writes it."""
        provenance = {**self._about, "threshold": self._rules.of(source), "code": self._code}
        text = json.dumps(provenance, ensure_ascii=False, separators=(",", ":"))
        for own, answers in zip(begun.readies, begun.answers(), strict=True):
            for ready, answer in zip(own, answers, strict=True):
                assert ready.record is not None
                assert ready.question is not None
                record = pseudo_record(
                    ready.record, ready.question, answer, self._rules, source, text, tally, ready.surplus
                )
                if record is not None:
                    write(record)
                    tally.code[self._code] += 1
                made(1)


def pseudo_record(
    record: Record, question: Query, answer: QueryResult, rules: Rules, source: str, provenance: str, tally: LabelStatistics,
    surplus: Sequence[Span] = (),
) -> Record | None:  # fmt: skip
    """The pseudo record of a caption, or None, counted, where nothing was found.

    Phrases without a box, those that could not be asked for and `surplus`, of which nobody asked, become `unknown`: that
    the teacher does not see a thing is no evidence that it is not there.
    """
    report: Report = tally.report
    where = f"{record.id}: {record.caption!r:.80}"
    if answer.left_out:
        report.drop(answer.left_out, where)
        return None
    if answer.cut:
        report.note("caption: as many boxes as the detector gives, worse ones may be missing", where)
    boxes, spans, scores, unknown = [], [], [], []
    limit = np.array([record.width, record.height] * 2, np.float32) - 1
    for number, span in enumerate(question.spans):
        words = record.caption[slice(*span)]
        if number in answer.unasked:
            report.note(f"phrase: {answer.unasked[number]}", f"{record.id}: {words!r:.80}")
        found = answer.found[number]
        clipped = np.clip(found.boxes, 0, limit)
        solid = (clipped[:, 2:] > clipped[:, :2]).all(1)
        best = float(found.scores.max()) if len(found.scores) else None
        report.drop("box: no area inside the image", where, int((~solid & (found.scores > rules.of(source))).sum()))
        found, beyond = keep(
            found._replace(boxes=clipped[solid], scores=found.scores[solid]),
            rules.of(source), rules.nms_iou, rules.most_boxes,
        )  # fmt: skip
        report.drop("box: beyond the most of a phrase", f"{record.id}: {words!r:.80}", beyond)
        tally.phrase(words, head_word(record.caption, span), best, len(found.scores))
        if not len(found.scores):
            unknown.append((span,))
        own = [min(float(score), 1.0) for score in found.scores]
        boxes += found.boxes.tolist()
        spans += [(span,)] * len(own)
        scores += own
        tally.box(own)
    if not boxes:
        report.drop("caption: no box above the threshold", where)
        return None
    tally.kept += 1
    tally.source(source, kept=1, boxes=len(boxes))
    return dataclasses.replace(
        record, kind="pseudo", boxes=np.asarray(boxes, np.float32).reshape(-1, 4), spans=tuple(spans),
        scores=tuple(scores), unknown=(*unknown, *((span,) for span in surplus)), provenance=provenance,
    )  # fmt: skip


def _ahead(
    pool: ThreadPoolExecutor, make: Callable[[_In], _Out], items: Iterable[_In], depth: int
) -> Iterator[_Out]:  # fmt: skip
    """What `make` makes of the items, in their order, `depth` of them begun ahead."""
    begun: deque[Future[_Out]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(make, item))
            if len(begun) > depth:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
