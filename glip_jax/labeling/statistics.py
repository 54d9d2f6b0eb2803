"""Statistics of labelled captions: counted per shard and added up for the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glip_jax.data.importers.entry import Report

__all__ = ["BINS", "LabelStatistics", "rarest", "summary"]

BINS = 50
"""Number of bins of the score histograms, over [0, 1]."""

_RENAMED_REASONS = {
    "box: beyond the most of a phrase": "box: more than the maximum of a phrase",
    "caption: as many boxes as the detector gives, worse ones may be missing":
        "caption: detector reached its maximum number of boxes, boxes of lower scores may be missing",
    "caption: longer than the teacher's text, asked in several prompts":
        "caption: longer than the teacher's text limit, split into several prompts",
    "caption: perhaps not English, over three tenths of its words are in no English list":
        "caption: perhaps not English, over 30 % of its words are not in the English word list",
    "image: of another size than where it was detected in": "image: size differs from the one that was detected in",
    "image: unknown to the detections": "image: not among the detections",
    "phrase: longer than the teacher's text": "phrase: more tokens than the teacher's text limit",
}  # fmt: skip
"""Reasons as a labelling that an earlier version began wrote them, and today's."""

_TEXTS = 500_000
"""Maximum number of distinct phrases to count; beyond it, phrases that occurred once are discarded (`texts_forgotten`)."""


def _bins() -> list[int]:
    return [0] * BINS


@dataclass
class LabelStatistics:
    """Counts over captions; `add` merges those of two parts."""

    captions: int = 0
    """Records read."""
    kept: int = 0
    """Pseudo records made."""
    phrases: int = 0
    """Phrases of the captions that were given to the teacher."""
    phrases_with_boxes: int = 0
    boxes: int = 0
    judged: int = 0
    """Phrases with boxes of the teacher that a verifier judged."""
    vetoed: int = 0
    """Those of them that lost all their boxes."""
    not_judged: int = 0
    """Phrases with boxes of the teacher that the verifier could not judge; they keep them."""
    report: Report = field(default_factory=Report)
    """Dropped captions, phrases and boxes, and notes, by reason."""
    best: list[int] = field(default_factory=_bins)
    """Histogram of the highest score of each phrase, including scores below the threshold."""
    scores: list[int] = field(default_factory=_bins)
    """Histogram of the scores of the kept boxes."""
    boxes_of: Counter[int] = field(default_factory=Counter)
    """Number of phrases by their number of kept boxes."""
    concepts: dict[str, list[int]] = field(default_factory=dict)
    """By head noun: phrases, phrases with a box, boxes."""
    texts: dict[str, list[int]] = field(default_factory=dict)
    """By text of the phrase: phrases, phrases with a box."""
    texts_forgotten: int = 0
    """Distinct phrases that were discarded from `texts`."""
    sources: dict[str, list[int]] = field(default_factory=dict)
    """By source: captions, records kept, boxes."""
    code: Counter[str] = field(default_factory=Counter)
    """Records by the version of the code that wrote them."""
    seconds: float = 0.0
    """Working time, summed over processes."""

    def phrase(self, words: str, head: str, best: float | None, boxes: int) -> None:
        """Counts a phrase; `best`: its highest score, None without detections; `boxes`: how many are kept."""
        self.phrases += 1
        if best is not None:
            self.best[_bin(best)] += 1
        self.boxes_of[boxes] += 1
        self.phrases_with_boxes += boxes > 0
        concept = self.concepts.setdefault(head, [0, 0, 0])
        concept[0], concept[1], concept[2] = concept[0] + 1, concept[1] + (boxes > 0), concept[2] + boxes
        text = self.texts.setdefault(" ".join(words.lower().split()), [0, 0])
        text[0], text[1] = text[0] + 1, text[1] + (boxes > 0)

    def box(self, scores: Sequence[float]) -> None:
        """Counts kept boxes."""
        self.boxes += len(scores)
        for score in scores:
            self.scores[_bin(score)] += 1

    def source(self, name: str, captions: int = 0, kept: int = 0, boxes: int = 0) -> None:
        """Adds to the counts of a source."""
        counts = self.sources.setdefault(name, [0, 0, 0])
        counts[0], counts[1], counts[2] = counts[0] + captions, counts[1] + kept, counts[2] + boxes

    def add(self, other: "LabelStatistics") -> None:
        """Adds the statistics of another part."""
        added = (
            "captions",
            "kept",
            "phrases",
            "phrases_with_boxes",
            "boxes",
            "judged",
            "vetoed",
            "not_judged",
            "seconds",
        )
        for name in (*added, "texts_forgotten"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.report.merge(other.report)
        self.best = [a + b for a, b in zip(self.best, other.best, strict=True)]
        self.scores = [a + b for a, b in zip(self.scores, other.scores, strict=True)]
        self.boxes_of.update(other.boxes_of)
        self.code.update(other.code)
        for table, added in ((self.concepts, other.concepts), (self.texts, other.texts), (self.sources, other.sources)):
            for key, counts in added.items():
                before = table.get(key)
                table[key] = list(counts) if before is None else [a + b for a, b in zip(before, counts, strict=True)]
        if len(self.texts) > _TEXTS:
            kept = {text: counts for text, counts in self.texts.items() if counts[0] > 1}
            self.texts_forgotten += len(self.texts) - len(kept)
            self.texts = kept

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values; `from_json` reverses it."""
        report_fields = {key: getattr(self.report, key) for key in ("kept", "dropped", "first", "noted")}
        return {**vars(self), "report": report_fields}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "LabelStatistics":
        """Statistics from the result of `as_json`, also after it was written as JSON and read again."""
        found = fields["report"]
        report = Report(
            Counter(_renamed(found["kept"])),
            Counter(_renamed(found["dropped"])),
            _renamed(found["first"]),
            Counter(_renamed(found["noted"])),
        )
        boxes_of = Counter({int(number): count for number, count in fields["boxes_of"].items()})
        return cls(**{**fields, "report": report, "boxes_of": boxes_of, "code": Counter(fields["code"])})


def _renamed(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED_REASONS.get(reason, reason): value for reason, value in counts.items()}


def _bin(score: float) -> int:
    return min(BINS - 1, max(0, int(score * BINS)))


def rarest(counts: Mapping[str, Sequence[int]], number: int) -> list[tuple[str, int]]:
    """The `number` names with the fewest boxes (at least one) and their counts; ties in alphabetical order."""
    with_boxes = [(name, int(count[2])) for name, count in counts.items() if count[2]]
    return sorted(with_boxes, key=lambda item: (item[1], item[0]))[:number]


def summary(statistics: LabelStatistics, listed: int = 40) -> dict[str, Any]:
    """The `summary` of report.json; tables hold up to `listed` names."""
    frequent = sorted(statistics.concepts.items(), key=lambda item: (-item[1][2], item[0]))
    never = [(text, counts[0]) for text, counts in statistics.texts.items() if not counts[1]]
    never_concepts = [(name, counts[0]) for name, counts in statistics.concepts.items() if not counts[1]]

    def examples(counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return {what: {"count": count, "first": statistics.report.first.get(what, "")} for what, count in ordered}

    return {
        "captions": statistics.captions,
        "kept": statistics.kept,
        "kept_share": statistics.kept / statistics.captions if statistics.captions else 0.0,
        "phrases": statistics.phrases,
        "phrases_with_boxes": statistics.phrases_with_boxes,
        "boxes": statistics.boxes,
        "phrases_judged": statistics.judged,
        "phrases_vetoed": statistics.vetoed,
        "phrases_not_judged": statistics.not_judged,
        "boxes_per_phrase": statistics.boxes / max(statistics.phrases, 1),
        "boxes_per_phrase_with_boxes": statistics.boxes / max(statistics.phrases_with_boxes, 1),
        "phrases_by_boxes": {str(number): statistics.boxes_of[number] for number in sorted(statistics.boxes_of)},
        "best_scores": statistics.best,
        "box_scores": statistics.scores,
        "sources": {
            name: dict(zip(("captions", "kept", "boxes"), counts)) for name, counts in statistics.sources.items()
        },
        "concepts": len(statistics.concepts),
        "concepts_with_boxes": sum(counts[2] > 0 for counts in statistics.concepts.values()),
        "frequent_concepts": [[name, counts[2]] for name, counts in frequent[:listed] if counts[2]],
        "rarest_concepts": [list(item) for item in rarest(statistics.concepts, listed)],
        "concepts_never_found": len(never_concepts),
        "most_asked_concepts_never_found": [list(i) for i in sorted(never_concepts, key=_by_count)[:listed]],
        "different_phrases": len(statistics.texts),
        "phrases_never_found": len(never),
        "most_asked_phrases_never_found": [list(item) for item in sorted(never, key=_by_count)[:listed]],
        "phrases_forgotten": statistics.texts_forgotten,
        "drops": examples(statistics.report.dropped),
        "notes": examples(statistics.report.noted),
        "code": dict(statistics.code),
        "seconds": statistics.seconds,
    }


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
