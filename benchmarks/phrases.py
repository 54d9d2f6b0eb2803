"""Agreement of the two phrase finders on a file of captions, and their speed.

    python -m benchmarks.phrases captions.tsv.gz
    python -m benchmarks.phrases captions_val2017.json --limit 2000

Captions are given one per line (the last field of lines with tabs; also .gz) or as COCO's JSON. Precision and recall are relative to the
second finder (spaCy), which is no ground truth. Needs requirements-spacy.txt and requirements-spacy-model.txt.
"""

import argparse
import gzip
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from glip_jax.labeling.phrases.finders import Phrases, head, phrase_finder

__all__ = ["Agreement", "agreement", "captions_of"]

Span = tuple[int, int]


class Agreement(NamedTuple):
    """Agreement of the phrases of two finders on the same captions."""

    found: int
    expected: int
    same: int
    """Phrases with the same span."""
    same_head: int
    """Phrases with the same head noun at the same place."""
    extra: Counter[str]
    """Lower-case phrases that only the first finder has."""
    missed: Counter[str]

    @property
    def precision(self) -> float:
        """Fraction of the first finder's phrases that the second one has."""
        return self.same / max(self.found, 1)

    @property
    def recall(self) -> float:
        """Fraction of the second finder's phrases that the first one has."""
        return self.same / max(self.expected, 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.same / max(self.found + self.expected, 1)

    @property
    def head_f1(self) -> float:
        """F1 of head nouns."""
        return 2 * self.same_head / max(self.found + self.expected, 1)


def captions_of(path: Path) -> list[str]:
    """The captions of a file, in order; empty lines are skipped."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8-sig")
    if path.name.removesuffix(".gz").endswith(".json"):
        return [annotation["caption"] for annotation in json.loads(text)["annotations"]]
    captions = (line.rsplit("\t", 1)[-1] for line in text.splitlines())
    return [caption for caption in captions if caption.strip()]


def agreement(
    captions: Sequence[str], found: Sequence[Sequence[Span]], expected: Sequence[Sequence[Span]]
) -> Agreement:
    """Counts over all captions; spans of one list are distinct."""
    numbers, extra, missed = Counter(), Counter(), Counter()
    for caption, first_spans, second_spans in zip(captions, found, expected, strict=True):
        numbers["found"] += len(first_spans)
        numbers["expected"] += len(second_spans)
        numbers["same"] += len({*first_spans} & {*second_spans})
        numbers["head"] += len(
            {head(caption, span) for span in first_spans} & {head(caption, span) for span in second_spans}
        )
        extra.update(caption[slice(*span)].lower() for span in {*first_spans} - {*second_spans})
        missed.update(caption[slice(*span)].lower() for span in {*second_spans} - {*first_spans})
    return Agreement(numbers["found"], numbers["expected"], numbers["same"], numbers["head"], extra, missed)


def _run(name: Literal["lexicon", "spacy"], captions: Sequence[str]) -> list[Phrases]:
    finder = phrase_finder(name)
    # Warm-up: the first captions fill caches and load libraries.
    for caption in captions[:100]:
        finder.find(caption)
    start = time.perf_counter()
    results = [finder.find(caption) for caption in captions]
    rate = len(captions) / (time.perf_counter() - start)
    dropped = sum((Counter(result.dropped) for result in results), Counter())
    phrases = sum(len(result.spans) for result in results)
    drops = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common())
    print(f"| {name} | {phrases:,} | {phrases / len(captions):.2f} | {rate:,.0f} | {drops} |")
    print(f"    {name} {finder.version}")
    return results


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("captions", type=Path)
    parser.add_argument("--limit", type=int, default=0, help="only so many captions; 0: all")
    parser.add_argument("--most", type=int, default=20, help="lines of disagreements")
    arguments = parser.parse_args()
    captions = captions_of(arguments.captions)[: arguments.limit or None]
    if not captions:
        raise SystemExit(f"{arguments.captions} has no captions: expected one a line, or COCO's JSON")
    print(
        f"{len(captions):,} captions\n| finder | phrases | per caption | captions/s | dropped |\n|---|---|---|---|---|"
    )
    first, second = ([result.spans for result in _run(name, captions)] for name in ("lexicon", "spacy"))
    result = agreement(captions, first, second)
    print(
        f"lexicon against spacy: precision {result.precision:.3f}, recall {result.recall:.3f}, F1 {result.f1:.3f}, "
        f"heads F1 {result.head_f1:.3f}"
    )
    same = sum({*first_spans} == {*second_spans} for first_spans, second_spans in zip(first, second))
    print(f"captions with the same phrases: {same / len(captions):.3f}")
    for title, counts in (("only lexicon", result.extra), ("only spacy", result.missed)):
        print(f"{title}: " + ", ".join(f"{text!r} {count}" for text, count in counts.most_common(arguments.most)))


if __name__ == "__main__":
    main()
