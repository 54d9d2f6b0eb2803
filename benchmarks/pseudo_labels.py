r"""Precision and recall of pseudo labels by score threshold, against ground-truth boxes of the captions.

    python -m glip_jax label SHARDS --workdir=runs/teacher --out=labelled --threshold=0.05
    python -m benchmarks.pseudo_labels labelled truth.json --plot=labels.png

TRUTH is one or more JSON files in MDETR's format for the same captions (`captions/truth.json` of synthetic scenes, GoldG, COCO's
captions with boxes). Label with a low threshold: boxes below it are not in the shards. A pseudo box is correct if its IoU (plain
corners) with a true box of the matching true phrase is at least 0.5; the matching phrase is the one that shares most characters, and
each true box is matched once, in the order of descending scores. Boxes of phrases that overlap no true phrase are not judged, but
counted, since the ground truth need not mark every phrase.

Alternatively TRUTH is COCO's annotations of the images, boxes with classes but without phrases. The true boxes of a phrase are then
all boxes of the class that its head noun names, so a correct box has the right class; whether it is the instance that the phrase
refers to ("a dog" beside two dogs) is not annotated: such phrases are listed separately as "one of several". Not judged, but counted:
phrases that name no class, two phrases of a caption that name the same class, and phrases whose class has a crowd box in the image.
Recall is over captions that have a record. `--classes=0.5` lists precision by class above 0.5.

`--before=FOLDER` sets beside the labels those of the same captions without the verifier (`label --verifier`), at the same thresholds, and
the precision that they have where a higher threshold alone leaves them the recall of the verified ones: a veto that only cuts low scores
gains nothing there. The captions of FOLDER are judged in both.

`--names=ANNOTATIONS.json` (COCO's format) lists phrases that contain one of its names separately, such as names that the teacher
never saw.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glip_jax.cli.reports.drawing import draw_curves
from glip_jax.cli.reports.run_cards import match
from glip_jax.data.records import Record
from glip_jax.data.scenes.nouns import plural
from glip_jax.data.shards import Shards
from glip_jax.evaluation.recall import CaptionedImage, Phrase, load_grounding
from glip_jax.labeling.outside import category_of, category_words
from glip_jax.labeling.phrases.finders import head, head_word

__all__ = ["Judged", "by_class", "compared", "judge", "measured", "named_truth"]

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
_APART = "these names"


@dataclass
class Judged:
    """Pseudo boxes of a group of phrases with their scores, and the number of true boxes."""

    true: int = 0
    scores: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    """Record id of each box."""

    def at(self, threshold: float) -> tuple[int, float, float]:
        """Boxes above the threshold, their precision (nan for none) and recall."""
        kept: Any = np.asarray(self.scores) > threshold
        right = int(np.asarray(self.right, bool)[kept].sum())
        return int(kept.sum()), right / int(kept.sum()) if kept.any() else math.nan, right / max(self.true, 1)

    def precision_at_recall(self, recall: float) -> float:
        """Precision of the best-scored boxes, as few as reach `recall`; nan if they never do, or for a recall of 0."""
        order = np.argsort(-np.asarray(self.scores), kind="stable")
        right: Any = np.cumsum(np.asarray(self.right, bool)[order])
        reached = np.flatnonzero(right / max(self.true, 1) >= recall - 1e-9)
        return float(right[reached[0]] / (reached[0] + 1)) if len(reached) and recall > 0 else math.nan


def judge(
    records: Iterable[Record], images: Sequence[CaptionedImage], groups: Mapping[str, Any]
) -> tuple[dict[str, Judged], Counter[str]]:
    """Judges pseudo records; returns what was found by group, and counts of what could not be judged.

    `groups`: per name a function that says of (caption's words of a true phrase, its kind) whether it belongs.
    """
    judged = {name: Judged() for name in groups}
    not_judged: Counter[str] = Counter()
    by_caption: defaultdict[str, list[CaptionedImage]] = defaultdict(list)
    for image in images:
        by_caption[image.caption.strip()].append(image)
        for phrase in image.phrases:
            for name in _groups(image, phrase, groups):
                judged[name].true += len(phrase.boxes)
    # Keyed by object, as ids of several files may be equal.
    seen: set[int] = set()
    for record in records:
        image = _of(record, by_caption[record.caption.strip()])
        if image is None or id(image) in seen:
            not_judged["captions without ground truth"] += 1
            continue
        seen.add(id(image))
        owners = [_owner(spans, image.phrases) for spans in record.spans]
        not_judged["boxes of phrases that touch no true phrase"] += owners.count(-1)
        order = sorted((row for row, owner in enumerate(owners) if owner >= 0), key=lambda row: -record.scores[row])
        numbers = np.array([owners[row] for row in order], np.int64)
        # Pseudo boxes are in inclusive pixels, true boxes have plain corners.
        found = record.boxes[order] + np.array([0, 0, 1, 1], np.float32)
        true = np.concatenate([np.asarray(phrase.boxes, np.float32) for phrase in image.phrases])
        true_numbers = np.repeat(np.arange(len(image.phrases)), [len(phrase.boxes) for phrase in image.phrases])
        for row, owner, met in zip(order, numbers.tolist(), match(found, numbers, true, true_numbers)):
            for name in _groups(image, image.phrases[owner], groups):
                judged[name].scores.append(record.scores[row])
                judged[name].right.append(bool(met >= 0))
                judged[name].captions.append(record.id)
    not_judged["captions without a record (nothing was found)"] = sum(bool(i.phrases) for i in images) - len(seen)
    return judged, not_judged


def named_truth(
    records: Iterable[Record], names: Mapping[int, str], annotations: Iterable[Mapping[str, Any]]
) -> tuple[list[CaptionedImage], Counter[str]]:
    """What COCO's `annotations` say of the phrases of records (IMAGE#CAPTION) whose head noun names one of the classes
    `names`; and counts of phrases that are not judged, and of judged ones by kind: "one" that has at most one true box,
    "one of several", or "several" (a plural).
    """
    numbers = {category_words(name): number for number, name in names.items()}
    boxes: defaultdict[tuple[str, int], list[Any]] = defaultdict(list)
    crowds: set[tuple[str, int]] = set()
    for note in annotations:
        thing = str(note["image_id"]), note["category_id"]
        x, y, width, height = note["bbox"]
        if note.get("iscrowd"):
            crowds.add(thing)
        elif width > 0 and height > 0:
            boxes[thing].append((x, y, x + width, y + height))
    images, counts = [], Counter[str]()
    for record in records:
        spans = sorted({phrase[0] for phrase in (*record.spans, *record.unknown)})
        classes = [category_of(record.caption, span, numbers) for span in spans]
        picture, _, caption = record.id.rpartition("#")
        phrases = []
        for span, number in zip(spans, classes):
            if number is None:
                counts["phrases that name no class"] += 1
            elif classes.count(number) > 1:
                counts["phrases that share their class with another"] += 1
            elif (picture, number) in crowds:
                counts["phrases whose class has a crowd box"] += 1
            else:
                begin, end = head(record.caption, span)
                true = np.asarray(boxes[picture, number], np.float32).reshape(-1, 4)
                one = record.caption[begin:end].casefold() == head_word(record.caption, span)
                kind = ("one" if len(true) < 2 else "one of several") if one else "several"
                counts[f'judged phrases: "{kind}"'] += 1
                counts["judged phrases: no true box of their class"] += not len(true)
                phrases.append(Phrase((span,), true, kind))
        images.append(CaptionedImage(record.id, {"caption_id": caption}, record.caption, tuple(phrases)))
    return images, counts


def by_class(records: Iterable[Record], images: Sequence[CaptionedImage], names: Sequence[str]) -> dict[str, Judged]:
    """`judge` with a group for each class that a judged phrase's head noun names."""
    numbers = {category_words(name): number for number, name in enumerate(names)}

    def of(number: int) -> Any:
        return lambda words, kind: category_of(words, (0, len(words)), numbers) == number  # noqa: ARG005

    judged, _ = judge(records, images, {name: of(number) for number, name in enumerate(names)})
    return {name: group for name, group in judged.items() if group.scores or group.true}


def _groups(image: CaptionedImage, phrase: Phrase, groups: Mapping[str, Any]) -> list[str]:
    words = " ".join(image.caption[begin:end] for begin, end in phrase.spans)
    return [name for name, belongs in groups.items() if belongs(words, phrase.kind)]


def _of(record: Record, candidates: Sequence[CaptionedImage]) -> CaptionedImage | None:
    """The image with the record's caption; of several the one whose id is in the record's (IMAGE#CAPTION)."""
    if len(candidates) > 1:
        parts = set(record.id.split("#"))
        ids = ("id", "original_img_id", "caption_id")
        candidates = [image for image in candidates if parts & {str(image.entry.get(name)) for name in ids}]
    return candidates[0] if len(candidates) == 1 and candidates[0].phrases else None


def _owner(spans: Sequence[tuple[int, int]], phrases: Sequence[Phrase]) -> int:
    """Number of the phrase that shares most characters with `spans`, the shorter one of equals; -1 for none."""

    def shared(phrase: Phrase) -> int:
        return sum(max(0, min(e, end) - max(b, begin)) for b, e in spans for begin, end in phrase.spans)

    best = max(range(len(phrases)), key=lambda n: (shared(phrases[n]), -sum(e - b for b, e in phrases[n].spans)))
    return best if shared(phrases[best]) else -1


def _saying(names: Sequence[str], known: Sequence[str]) -> Any:
    """Whether words say one of `names`: the longest of all known names in them is meant ("green apple", not "apple")."""
    every = {form: name for name in {*names, *known} for form in (name, plural(name))}
    pattern = re.compile(r"\b(" + "|".join(re.escape(form) for form in sorted(every, key=len, reverse=True)) + r")\b")

    def says(words: str, kind: str) -> bool:  # noqa: ARG001
        found = max(pattern.findall(words.lower()), key=len, default="")
        return every.get(found) in names

    return says


def measured(judged: Mapping[str, Judged]) -> str:
    """A Markdown table with a row per threshold: captions with a box, and boxes, precision and recall of each group."""
    every = judged["all"]
    head = [
        "score above",
        "captions",
        *(f"{name}: {what}" for name in judged for what in ("boxes", "precision", "recall")),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for threshold in _thresholds(every):
        kept = {caption for caption, score in zip(every.captions, every.scores) if score > threshold}
        cells = [f"{threshold:.2f}", f"{len(kept):,}"]
        for group in judged.values():
            count, precision, recall = group.at(threshold)
            cells += [f"{count:,}", f"{precision:.3f}" if count else "-", f"{recall:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compared(before: Judged, after: Judged) -> str:
    """A Markdown table with a row per threshold: labels without and with a verifier, and those without at the recall of those with."""
    head = [
        "score above",
        *(f"{what} {which}" for which in ("without", "with") for what in ("captions", "boxes", "precision", "recall")),
    ]
    lines = ["| " + " | ".join([*head, "precision without, at that recall"]) + " |", "|---" * (len(head) + 1) + "|"]
    for threshold in _thresholds(before):
        cells, recall = [f"{threshold:.2f}"], 0.0
        for judged in (before, after):
            kept = {caption for caption, score in zip(judged.captions, judged.scores) if score > threshold}
            count, precision, recall = judged.at(threshold)
            cells += [f"{len(kept):,}", f"{count:,}", f"{precision:.3f}" if count else "-", f"{recall:.3f}"]
        equal = before.precision_at_recall(recall)
        lines.append("| " + " | ".join([*cells, "-" if math.isnan(equal) else f"{equal:.3f}"]) + " |")
    return "\n".join(lines)


def _thresholds(judged: Judged) -> list[float]:
    """The thresholds of the table; below that of the labelling nothing is known."""
    min_score = min(judged.scores, default=0.0)
    return [
        threshold for threshold in THRESHOLDS if threshold >= max((t for t in THRESHOLDS if t < min_score), default=0.0)
    ]


def _classes(judged: Mapping[str, Judged], threshold: float) -> str:
    """A Markdown table with a row per class, ordered by the number of boxes above the threshold."""
    lines = [f"| class, score above {threshold} | boxes | precision | true boxes | recall |", "|---" * 5 + "|"]
    for name, group in sorted(judged.items(), key=lambda item: -item[1].at(threshold)[0]):
        count, precision, recall = group.at(threshold)
        columns = f"{precision:.3f}" if count else "-", f"{recall:.3f}" if group.true else "-"
        lines.append(f"| {name} | {count:,} | {columns[0]} | {group.true:,} | {columns[1]} |")
    return "\n".join(lines)


def _plot(judged: Mapping[str, Judged]) -> bytes:
    lines = {}
    # Kinds are plotted only without --names: more curves would overlap.
    shown = {name: group for name, group in judged.items() if name in ("all", _APART)} if _APART in judged else judged
    thresholds = _thresholds(judged["all"])
    for name, group in shown.items():
        for column, what in ((1, "precision"), (2, "recall")):
            # More curves would overlap, and recall is not meaningful for "one of several".
            if len(shown) <= 3 or name == "all" or what == "precision":
                lines[f"{name}: {what}"] = (thresholds, [group.at(threshold)[column] for threshold in thresholds])
    return draw_curves(lines, "share", across="score from which boxes are kept")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shards", help="folder of pseudo records")
    parser.add_argument(
        "truth", nargs="+", help="MDETR's JSON for the same captions, or COCO's annotations of the images"
    )
    parser.add_argument(
        "--before", default="", help="folder of pseudo records of the same captions, labelled without a verifier"
    )
    parser.add_argument("--names", default="", help="COCO annotations with the names to show apart")
    parser.add_argument(
        "--classes", type=float, help="with COCO's annotations: list precision by class above this score"
    )
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    records, *others = [
        [shards[index] for index in range(len(shards))]
        for shards in map(Shards, filter(None, (arguments.shards, arguments.before)))
    ]
    # Captions that lost every box have a record there only.
    every_record = others[0] if others else records
    if missing := {record.id for record in records} - {record.id for record in every_record}:
        parser.error(
            f"--before={arguments.before} lacks {min(missing)} of {arguments.shards}: expected labels of the same captions"
        )
    content = [json.loads(Path(path).read_text()) for path in arguments.truth]
    counts: Counter[str] = Counter()
    names: dict[int, str] = {}
    if "caption" in content[0]["images"][0]:
        images = [image for path in arguments.truth for image in load_grounding(path).images]
    else:
        names = {item["id"]: item["name"] for file in content for item in file["categories"]}
        images, counts = named_truth(every_record, names, (note for file in content for note in file["annotations"]))
    kinds = sorted({phrase.kind for image in images for phrase in image.phrases} - {""})
    groups: dict[str, Any] = {"all": lambda words, kind: True}  # noqa: ARG005
    groups |= {kind: lambda words, group, kind=kind: group == kind for kind in kinds}  # noqa: ARG005
    if arguments.names:
        apart = [item["name"] for item in json.loads(Path(arguments.names).read_text())["categories"]]
        groups[_APART] = _saying(apart, [name for file in content for name in file.get("info", {}).get("names", [])])
    judged, not_judged = judge(records, images, groups)
    print(", ".join(f"{name}: {group.true:,} true boxes" for name, group in judged.items()))
    for what, count in (counts + not_judged).items():
        print(f"{what}: {count:,}")
    print(measured(judged))
    if others:
        without, _ = judge(others[0], images, groups)
        for name, group in judged.items():
            print(f"{name}, without and with the verifier:\n{compared(without[name], group)}")
    if arguments.classes is not None:
        print(_classes(by_class(records, images, list(names.values())), arguments.classes))
    if arguments.plot:
        arguments.plot.write_bytes(_plot(judged))
        print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
