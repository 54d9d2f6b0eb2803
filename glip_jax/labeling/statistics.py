"""What is counted while captions are labelled: per shard, and summed up over all of them for the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glip_jax.data.importers.entry import Report

__all__ = ["BINS", "LabelStatistics", "rarest", "summary"]

BINS = 50
"""Of the histograms of scores, over [0, 1]."""

_TEXTS = 500_000
"""Different phrases that are counted by their words; beyond, those asked for once are forgotten (and that is said)."""


def _bins() -> list[int]:
    return [0] * BINS


@dataclass
class LabelStatistics:
    """Counts over captions; those of two parts add up."""

    captions: int = 0
    """Records read."""
    kept: int = 0
    """Pseudo records made."""
    phrases: int = 0
    """Found in captions that had any and whose image could be looked at."""
    phrases_with_boxes: int = 0
    boxes: int = 0
    report: Report = field(default_factory=Report)
    """Captions left out, boxes and phrases left out, and what should be known, by reason."""
    best: list[int] = field(default_factory=_bins)
    """Phrases by the score of their best box, also of those below the threshold."""
    scores: list[int] = field(default_factory=_bins)
    """Boxes kept by score."""
    boxes_of: Counter[int] = field(default_factory=Counter)
    """Phrases that were asked for by their number of boxes kept."""
    concepts: dict[str, list[int]] = field(default_factory=dict)
    """By head word: phrases, phrases with a box, boxes."""
    texts: dict[str, list[int]] = field(default_factory=dict)
    """By the words of the phrase: phrases, phrases with a box."""
    texts_forgotten: int = 0
    """Phrases asked for once whose words were forgotten."""
    sources: dict[str, list[int]] = field(default_factory=dict)
    """By source: captions, records kept, boxes."""
    code: Counter[str] = field(default_factory=Counter)
    """Records by the version of the code that made them."""
    seconds: float = 0.0
    """Of the processes that did the work, added up."""

    def phrase(self, words: str, head: str, best: float | None, boxes: int) -> None:
        """Counts a phrase: its best score (None: it was not asked for, or nothing was found) and its boxes kept."""
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
        """Counts boxes that are kept."""
        self.boxes += len(scores)
        for score in scores:
            self.scores[_bin(score)] += 1

    def source(self, name: str, captions: int = 0, kept: int = 0, boxes: int = 0) -> None:
        """Adds to the counts of a source."""
        own = self.sources.setdefault(name, [0, 0, 0])
        own[0], own[1], own[2] = own[0] + captions, own[1] + kept, own[2] + boxes

    def add(self, other: "LabelStatistics") -> None:
        """Adds another part."""
        for name in ("captions", "kept", "phrases", "phrases_with_boxes", "boxes", "seconds", "texts_forgotten"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.report.merge(other.report)
        self.best = [a + b for a, b in zip(self.best, other.best, strict=True)]
        self.scores = [a + b for a, b in zip(self.scores, other.scores, strict=True)]
        self.boxes_of.update(other.boxes_of)
        self.code.update(other.code)
        for mine, theirs in ((self.concepts, other.concepts), (self.texts, other.texts), (self.sources, other.sources)):
            for key, counts in theirs.items():
                own = mine.get(key)
                mine[key] = list(counts) if own is None else [a + b for a, b in zip(own, counts, strict=True)]
        if len(self.texts) > _TEXTS:
            kept = {text: counts for text, counts in self.texts.items() if counts[0] > 1}
            self.texts_forgotten += len(self.texts) - len(kept)
            self.texts = kept

    def as_json(self) -> dict[str, Any]:
        """All of it, for `from_json`."""
        told = {key: getattr(self.report, key) for key in ("kept", "dropped", "first", "noted")}
        return {**vars(self), "report": told}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "LabelStatistics":
        """What `as_json` gave, also after a way through JSON."""
        told = fields["report"]
        report = Report(Counter(told["kept"]), Counter(told["dropped"]), dict(told["first"]), Counter(told["noted"]))
        boxes_of = Counter({int(number): count for number, count in fields["boxes_of"].items()})
        return cls(**{**fields, "report": report, "boxes_of": boxes_of, "code": Counter(fields["code"])})


def _bin(score: float) -> int:
    return min(BINS - 1, max(0, int(score * BINS)))


def rarest(counts: Mapping[str, Sequence[int]], number: int) -> list[tuple[str, int]]:
    """Names with the fewest boxes, but at least one, and their boxes; names beside one another in the alphabet's order."""
    with_boxes = [(name, int(own[2])) for name, own in counts.items() if own[2]]
    return sorted(with_boxes, key=lambda item: (item[1], item[0]))[:number]


def summary(tally: LabelStatistics, listed: int = 40) -> dict[str, Any]:
    """The report in numbers: what `report.json` holds of the counts, `listed` names of each table."""
    frequent = sorted(tally.concepts.items(), key=lambda item: (-item[1][2], item[0]))
    never = [(text, own[0]) for text, own in tally.texts.items() if not own[1]]
    never_concepts = [(name, own[0]) for name, own in tally.concepts.items() if not own[1]]

    def examples(counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return {what: {"count": count, "first": tally.report.first.get(what, "")} for what, count in ordered}

    return {
        "captions": tally.captions,
        "kept": tally.kept,
        "kept_share": tally.kept / tally.captions if tally.captions else 0.0,
        "phrases": tally.phrases,
        "phrases_with_boxes": tally.phrases_with_boxes,
        "boxes": tally.boxes,
        "boxes_per_phrase": tally.boxes / max(tally.phrases, 1),
        "boxes_per_phrase_with_boxes": tally.boxes / max(tally.phrases_with_boxes, 1),
        "phrases_by_boxes": {str(number): tally.boxes_of[number] for number in sorted(tally.boxes_of)},
        "best_scores": tally.best,
        "box_scores": tally.scores,
        "sources": {name: dict(zip(("captions", "kept", "boxes"), own)) for name, own in tally.sources.items()},
        "concepts": len(tally.concepts),
        "concepts_with_boxes": sum(own[2] > 0 for own in tally.concepts.values()),
        "frequent_concepts": [[name, own[2]] for name, own in frequent[:listed] if own[2]],
        "rarest_concepts": [list(item) for item in rarest(tally.concepts, listed)],
        "concepts_never_found": len(never_concepts),
        "most_asked_concepts_never_found": [list(i) for i in sorted(never_concepts, key=_by_count)[:listed]],
        "different_phrases": len(tally.texts),
        "phrases_never_found": len(never),
        "most_asked_phrases_never_found": [list(item) for item in sorted(never, key=_by_count)[:listed]],
        "phrases_forgotten": tally.texts_forgotten,
        "drops": examples(tally.report.dropped),
        "notes": examples(tally.report.noted),
        "code": dict(tally.code),
        "seconds": tally.seconds,
    }


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
