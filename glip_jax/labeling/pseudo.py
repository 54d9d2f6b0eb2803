"""Labels the captions of a shard: reads records, runs the teacher, selects boxes and writes pseudo records.

Threads read, decode and find phrases ahead of the teacher, so that the device does not wait for them. A group holds images
of one canvas size, a batch for every device; captions of the same image share its features.
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

from glip_jax.data.images import decode
from glip_jax.data.importers.entry import Report
from glip_jax.data.records import Record, RecordError, content_hash
from glip_jax.data.shards import Shards
from glip_jax.inference import pipelined
from glip_jax.labeling.phrases.finders import PhraseFinder, head_word
from glip_jax.labeling.phrases.language import OTHER_SCRIPT, language_doubt
from glip_jax.labeling.statistics import LabelStatistics
from glip_jax.labeling.teacher import ImageQueries, PhraseDetections, Query, QueryResult, Span, Teacher, select_boxes
from glip_jax.labeling.verifier import Verdict, Verifier

__all__ = ["Labeler", "Rules", "pseudo_record"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Rules:
    """Which boxes of a teacher become pseudo labels."""

    threshold: float = 0.5
    """Boxes with a higher score are kept."""
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Thresholds of single sources, by name; they replace `threshold`."""
    nms_iou: float = 0.6
    """IoU above which a box of a phrase is suppressed by one of a higher score."""
    max_boxes: int = 10
    """Maximum number of boxes per phrase."""

    def threshold_of(self, source: str) -> float:
        """The threshold of a source."""
        return self.thresholds.get(source, self.threshold)

    def min_threshold(self, sources: Iterable[str]) -> float:
        """The lowest threshold among the sources."""
        return min(map(self.threshold_of, sources))


class _Prepared(NamedTuple):
    """A record with its decoded image and its query, or the reason why it is skipped."""

    record: Record | None
    image: int
    """Content hash of the image."""
    pixels: UInt8[np.ndarray, "H W 3"] | None
    query: Query | None
    skip_reason: str
    example: str
    dropped_phrases: Mapping[str, int]
    surplus: tuple[Span, ...] = ()
    """Phrases beyond the maximum number per caption."""
    doubt: str = ""
    """Why the caption may not be English; empty if it seems to be."""


class _Detected(NamedTuple):
    """Records that share an image, and what the teacher found for each."""

    items: list[_Prepared]
    image: ImageQueries
    results: list[QueryResult]


class Labeler:
    """Labels ranges of records."""

    def __init__(
        self, teacher: Teacher, finder: PhraseFinder, rules: Rules, about: Mapping[str, Any], code: str, threads: int,
        verifier: Verifier | None = None,
    ) -> None:  # fmt: skip
        """`about`: provenance written into every record, beside threshold and code; `threads`: how many read ahead; `verifier`:
        judges the phrases for which the teacher has boxes.
        """
        self._teacher, self._finder, self._rules, self._about = teacher, finder, rules, about
        self._code, self._threads, self._verifier = code, threads, verifier
        # An outside teacher takes single images, which a network beside it should not.
        self._group_size = max(teacher.group_size, verifier.group_size if verifier else 1)
        self._finder_lock = threading.Lock()

    def label(
        self, shards: Shards, begin: int, end: int, write: Callable[[Record], Any], progress: Callable[[int], Any]
    ) -> LabelStatistics:  # fmt: skip
        """Labels the records from `begin` up to `end` (exclusive).

        `write` receives each pseudo record, `progress` the number of records processed since its last call. Records are
        written in the order in which their images form batches, which is deterministic.
        """
        source = shards.manifest.name
        statistics = LabelStatistics()
        statistics.code[self._code] += 0

        def groups() -> Iterator[list[list[_Prepared]]]:
            """For each image of a group the records that share it."""
            waiting: defaultdict[Any, dict[int, list[_Prepared]]] = defaultdict(dict)
            with ThreadPoolExecutor(self._threads) as pool:
                depth = 2 * self._threads + 2 * self._group_size
                for item in _prefetch(pool, lambda index: self._prepare(shards, index), range(begin, end), depth):
                    key = self._count(item, source, statistics)
                    if key is None:
                        progress(1)
                        continue
                    images = waiting[key]
                    if item.image not in images and len(images) >= self._group_size:
                        yield list(images.values())
                        images.clear()
                    images.setdefault(item.image, []).append(item)
                for images in waiting.values():
                    yield list(images.values())

        detected = pipelined(groups(), _queries, lambda _, images: self._teacher.detect_async(images))
        for group, results, verdicts in self._verified(detected, self._rules.threshold_of(source)):
            self._write(group, results, verdicts, source, statistics, write, progress)
        return statistics

    def _verified(
        self, detected: Iterable[tuple[Sequence[list[_Prepared]], list[ImageQueries], list[list[QueryResult]]]], threshold: float
    ) -> Iterator[tuple[Sequence[list[_Prepared]], list[list[QueryResult]], list[list[Verdict | None]]]]:  # fmt: skip
        """Each group with its results and verdicts. The teacher's next groups are on the device while the verifier judges one."""
        verifier = self._verifier
        if verifier is None:
            for group, _, results in detected:
                yield group, results, [[None] * len(items) for items in group]
            return

        def start(_: Any, images: list[_Detected]) -> Callable[[], list[list[Verdict]]]:
            asked = [[_above(result, threshold) for result in own.results] for own in images]
            return verifier.verify_async([own.image for own in images], asked)

        groups = ([_Detected(*own) for own in zip(*group, strict=True)] for group in detected)
        for group, _, verdicts in pipelined(groups, lambda own: own, start):
            yield [own.items for own in group], [own.results for own in group], [[*own] for own in verdicts]

    def _prepare(self, shards: Shards, index: int) -> _Prepared:
        """Runs in a thread: everything that precedes the teacher."""
        try:
            record = shards[index]
            with self._finder_lock:  # phrase finders need not be thread-safe
                found, doubt = self._finder.find(record.caption), language_doubt(record.caption)
            spans, dropped, surplus = found.spans, found.dropped, found.surplus
            if doubt == OTHER_SCRIPT:
                example = f"{record.id}: {record.caption!r:.80}"
                return _Prepared(record, 0, None, None, f"caption: {doubt}", example, {})
            if not spans:
                reason, example = "caption: no noun phrase", f"{record.id}: {record.caption!r:.80}"
                return _Prepared(record, 0, None, None, reason, example, dropped)
            if self._teacher.batch_key(record.height, record.width) is None:
                example = f"{record.id}: {record.height} x {record.width}"
                return _Prepared(record, 0, None, None, "image: too long and narrow", example, dropped)
            pixels = decode(record, "fast")  # the same pixels as Pillow, in half the time
            query = self._teacher.make_query(record.id, record.caption, spans, record.file, record.image_id)
            image = content_hash(record.image) ^ (
                record.orientation - 1
            )  # one file may be stored and upright in two records
            return _Prepared(record, image, pixels, query, "", "", dropped, surplus, doubt)
        except RecordError as error:
            reason = "image: cannot be decoded" if "field image" in str(error) else "record: corrupt"
            return _Prepared(None, 0, None, None, reason, str(error), {})

    def _count(self, item: _Prepared, source: str, statistics: LabelStatistics) -> Any:
        """Counts a record; returns the batch key of its image, None if the record is skipped."""
        statistics.captions += 1
        statistics.source(source, captions=1)
        for reason, count in item.dropped_phrases.items():
            example = f"{item.record.id}: {item.record.caption!r:.80}" if item.record else ""
            statistics.report.drop(f"phrase: {reason}", example, count)
        if item.record is None or item.query is None:
            statistics.report.drop(item.skip_reason, item.example)
            return None
        if item.doubt:
            statistics.report.note(f"caption: {item.doubt}", f"{item.record.id}: {item.record.caption!r:.80}")
        if len(item.query.plan.prompts) > 1:
            example = f"{item.record.id}: {len(item.query.plan.prompts)} prompts"
            statistics.report.note("caption: longer than the teacher's text limit, split into several prompts", example)
        size = item.record.height, item.record.width
        own = self._teacher.batch_key(*size)
        return own if self._verifier is None else (own, self._verifier.batch_key(*size))

    def _write(
        self, group: Sequence[list[_Prepared]], results_of: list[list[QueryResult]], verdicts_of: list[list[Verdict | None]],
        source: str, statistics: LabelStatistics, write: Callable[[Record], Any], progress: Callable[[int], Any],
    ) -> None:  # fmt: skip
        """Selects the boxes of a group and writes the records."""
        provenance = {**self._about, "threshold": self._rules.threshold_of(source), "code": self._code}
        text = json.dumps(provenance, ensure_ascii=False, separators=(",", ":"))
        for items, results, verdicts in zip(group, results_of, verdicts_of, strict=True):
            for item, result, verdict in zip(items, results, verdicts, strict=True):
                assert item.record is not None
                assert item.query is not None
                judge = None if self._verifier is None or verdict is None else (self._verifier, verdict)
                record = pseudo_record(
                    item.record, item.query, result, self._rules, source, text, statistics, item.surplus, judge
                )
                if record is not None:
                    write(record)
                    statistics.code[self._code] += 1
                progress(1)


def _queries(items: list[_Prepared]) -> ImageQueries:
    """The image of records that share it, and what they ask."""
    assert items[0].pixels is not None
    return ImageQueries(items[0].pixels, [item.query for item in items if item.query is not None])


def pseudo_record(
    record: Record, query: Query, result: QueryResult, rules: Rules, source: str, provenance: str, statistics: LabelStatistics,
    surplus: Sequence[Span] = (), judge: tuple[Verifier, Verdict] | None = None,
) -> Record | None:  # fmt: skip
    """Builds the pseudo record of a caption; returns None, and counts the reason, if no box was selected.

    Phrases without a box, phrases that the teacher skipped, those that `judge` vetoes and `surplus` phrases become `unknown`
    (unlabelled), not absent: a missed detection is no evidence that the object is not in the image.
    """
    report: Report = statistics.report
    where = f"{record.id}: {record.caption!r:.80}"
    if result.skip_reason:
        report.drop(result.skip_reason, where)
        return None
    if result.truncated:
        report.note(
            "caption: detector reached its maximum number of boxes, boxes of lower scores may be missing", where
        )
    boxes, spans, scores, unknown, vetoed_boxes = [], [], [], [], 0
    limit = np.array([record.width, record.height] * 2, np.float32) - 1
    for number, span in enumerate(query.spans):
        words = record.caption[slice(*span)]
        if number in result.skipped:
            report.note(f"phrase: {result.skipped[number]}", f"{record.id}: {words!r:.80}")
        detections = result.detections[number]
        clipped = np.clip(detections.boxes, 0, limit)
        has_area = (clipped[:, 2:] > clipped[:, :2]).all(1)
        best = float(detections.scores.max()) if len(detections.scores) else None
        without_area = ~has_area & (detections.scores > rules.threshold_of(source))
        report.drop("box: no area inside the image", where, int(without_area.sum()))
        selected, surplus_boxes = select_boxes(
            detections._replace(boxes=clipped[has_area], scores=detections.scores[has_area]),
            rules.threshold_of(source), rules.nms_iou, rules.max_boxes,
        )  # fmt: skip
        report.drop("box: more than the maximum of a phrase", f"{record.id}: {words!r:.80}", surplus_boxes)
        if judge is not None and len(selected.scores):
            before, selected = selected, _judged(selected, number, *judge, f"{record.id}: {words!r:.80}", statistics)
            vetoed_boxes += len(before.scores) - len(selected.scores)
        statistics.phrase(words, head_word(record.caption, span), best, len(selected.scores))
        if not len(selected.scores):
            unknown.append((span,))
        phrase_scores = [min(float(score), 1.0) for score in selected.scores]
        boxes += selected.boxes.tolist()
        spans += [(span,)] * len(phrase_scores)
        scores += phrase_scores
        statistics.box(phrase_scores)
    if not boxes:
        report.drop(
            "caption: every box vetoed by the verifier" if vetoed_boxes else "caption: no box above the threshold",
            where,
        )
        return None
    statistics.kept += 1
    statistics.source(source, kept=1, boxes=len(boxes))
    return dataclasses.replace(
        record, kind="pseudo", boxes=np.asarray(boxes, np.float32).reshape(-1, 4), spans=tuple(spans),
        scores=tuple(scores), unknown=(*unknown, *((span,) for span in surplus)), provenance=provenance,
    )  # fmt: skip


def _above(result: QueryResult, threshold: float) -> list[int]:
    """The phrases that have a box with a score above the threshold."""
    return [number for number, own in enumerate(result.detections) if (own.scores > threshold).any()]


def _judged(
    selected: PhraseDetections, number: int, verifier: Verifier, verdict: Verdict, where: str, statistics: LabelStatistics
) -> PhraseDetections:  # fmt: skip
    """The boxes of a phrase that the verifier leaves; counts what it says."""
    report = statistics.report
    if number in verdict.not_judged:
        statistics.not_judged += 1
        report.note(f"phrase: not judged by the verifier, {verdict.not_judged[number]}", where)
        return selected
    found = verdict.found[number]
    stays = verifier.confirmed(selected.boxes, found)
    statistics.judged += 1
    statistics.vetoed += not stays.any()
    report.note("phrase: vetoed by the verifier, which finds it nowhere", where, int(not len(found.scores)))
    elsewhere = bool(len(found.scores)) and not stays.any()
    report.note("phrase: vetoed by the verifier, which finds it elsewhere", where, int(elsewhere))
    report.drop("box: vetoed by the verifier", where, int((~stays).sum()))
    return PhraseDetections(selected.boxes[stays], selected.scores[stays])


def _prefetch(
    pool: ThreadPoolExecutor, make: Callable[[_In], _Out], items: Iterable[_In], depth: int
) -> Iterator[_Out]:  # fmt: skip
    """Yields `make(item)` for each item in order, with up to `depth` items being computed ahead."""
    pending: deque[Future[_Out]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
