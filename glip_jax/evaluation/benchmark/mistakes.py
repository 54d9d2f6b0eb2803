"""The images of a set on which its detections are most wrong: confident boxes of what is not there.

A box is wrong if it overlaps no true box of its name by one half that a better one has not met. Images are ordered by their most
confident wrong box; Flickr30k's predictions have no scores, and its images are those with most phrases missed.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from glip_jax.evaluation.benchmark.sets import BenchmarkSet
from glip_jax.evaluation.metrics.files import boxes_by_image, objects, prediction_files
from glip_jax.evaluation.metrics.flickr import read_sentences
from glip_jax.evaluation.recall import match

__all__ = ["Mistake", "mistakes"]

_BEST = 20
"""Highest scores of an image that are looked at."""


class Mistake(NamedTuple):
    """An image with its true boxes and its best detections."""

    file: str
    """Below the folder of images."""
    text: str
    """The caption or expression; "" for names."""
    true: Any
    """Float[N 4], xyxy in pixels."""
    true_names: tuple[str, ...]
    found: Any
    """Float[D 4], best first."""
    names: tuple[str, ...]
    scores: tuple[float, ...]
    """NaN: not stored."""
    right: tuple[bool, ...]
    missed: tuple[bool, ...] = ()
    """Of each true box, whether nothing has found it; (): not known."""

    @property
    def badness(self) -> float:
        """Score of the most confident wrong box, or the share of wrong ones where no scores are stored."""
        wrong = [score for score, right in zip(self.scores, self.right, strict=True) if not right]
        return (len(wrong) / len(self.scores) if np.isnan(wrong[0]) else max(wrong)) if wrong else 0.0


class _Truth(NamedTuple):
    """True boxes of an image or expression, each with its key."""

    boxes: list[tuple[float, ...]]
    keys: list[Any]


def mistakes(
    item: BenchmarkSet,
    annotations: str,
    predictions: epath.Path,
    files: Mapping[str, str],
    count: int,
    release: str = "",
) -> list[Mistake]:
    """The `count` images with the worst detections, worst first.

    `annotations`, `release`: what the metric of the set reads; `files`: the file of each image or expression by its id as text. Raises MetricError for files that cannot be read.
    """
    if item.form == "flickr":
        found = _flickr(annotations, release, predictions, files)
    elif item.form == "expressions":
        found = _expressions(annotations, predictions, files)
    else:
        found = _named(item, annotations, predictions, files)
    worst = heapq.nlargest(count, ((each.badness, -number, each) for number, each in enumerate(found)))
    return [each for badness, _, each in worst if badness > 0]


def _mistake(
    file: str, text: str, truth: _Truth, found: Any, keys: list[Any], scores: Any, names: Mapping[Any, str]
) -> Mistake:
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*truth.keys, *keys]))}
    true = np.asarray(truth.boxes, np.float64).reshape(-1, 4)
    met = match(
        found,
        np.array([numbers[key] for key in keys], np.int64),
        true,
        np.array([numbers[key] for key in truth.keys], np.int64),
    )
    return Mistake(
        file, text, true, tuple(names.get(key, str(key)) for key in truth.keys), found,
        tuple(names.get(key, str(key)) for key in keys), tuple(np.asarray(scores, float).tolist()), tuple((met >= 0).tolist()),
    )  # fmt: skip


def _corners(box: Any) -> tuple[float, ...]:
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height


def _named(
    item: BenchmarkSet, annotations: str, predictions: epath.Path, files: Mapping[str, str]
) -> Iterator[Mistake]:
    """Sets of names or descriptions. Of LVIS only names that are annotated on an image, or known to be absent, can be wrong."""
    descriptions = item.form == "omnilabel"
    listed = "descriptions" if descriptions else "categories"
    names = {
        entry["id"]: entry.get("text", entry.get("name", "")) for entry in objects(annotations, listed, "annotations")
    }
    truth, best = defaultdict[Any, _Truth](lambda: _Truth([], [])), defaultdict[Any, list[Any]](list)
    for entry in objects(annotations, "annotations", "annotations"):
        if not entry.get("iscrowd"):
            for key in entry["description_ids"] if descriptions else [entry["category_id"]]:
                truth[entry["image_id"]].boxes.append(_corners(entry["bbox"]))
                truth[entry["image_id"]].keys.append(key)
    counted = {
        entry["id"]: {*truth[entry["id"]].keys, *entry["neg_category_ids"]}
        for entry in objects(annotations, "images", "annotations")
        if "neg_category_ids" in entry
    }
    number = 0
    for path in prediction_files(str(predictions)):
        for row in objects(path):
            image, pairs = row["image_id"], [(row.get("category_id"), row.get("score"))]
            pairs = list(zip(row["description_ids"], row["scores"], strict=True)) if descriptions else pairs
            for key, score in pairs:
                number += 1
                if key in counted.get(image, names):
                    push = heapq.heappush if len(best[image]) < _BEST else heapq.heappushpop
                    push(best[image], (score, -number, key, _corners(row["bbox"])))
    for image, rows in best.items():
        rows.sort(reverse=True)
        boxes, keys, scores = (
            np.array([row[3] for row in rows], np.float64),
            [row[2] for row in rows],
            [row[0] for row in rows],
        )
        yield _mistake(files.get(str(image), ""), "", truth[image], boxes, keys, scores, names)


def _expressions(annotations: str, predictions: epath.Path, files: Mapping[str, str]) -> Iterator[Mistake]:
    """Referring expressions: the best box is right or wrong; without a target every box is wrong."""
    truth = defaultdict[str, _Truth](lambda: _Truth([], []))
    for entry in objects(annotations, "annotations", "annotations"):
        if not entry.get("empty"):
            truth[str(entry["image_id"])].boxes.append(_corners(entry["bbox"]))
            truth[str(entry["image_id"])].keys.append("")
    captions = {str(entry["id"]): entry["caption"] for entry in objects(annotations, "images", "annotations")}
    for key, scored in boxes_by_image(str(predictions)).items():
        order = np.argsort(-scored.scores, kind="stable")[: max(1, len(truth[key].boxes))]
        yield _mistake(
            files.get(key, ""), captions.get(key, ""), truth[key], scored.boxes[order], [""] * len(order), scored.scores[order], {}
        )  # fmt: skip


def _flickr(annotations: str, release: str, predictions: epath.Path, files: Mapping[str, str]) -> Iterator[Mistake]:
    """Sentences of Flickr30k Entities: of each phrase the first box."""
    sentences = {(each.image, each.index): each for each in read_sentences(annotations, release)}
    for row in objects(predictions):
        sentence = sentences.get((str(row["image_id"]), int(row["sentence_id"])))
        if sentence is None or not sentence.phrases:
            continue
        truth, found, keys = _Truth([], []), [], []
        for number, (phrase, own) in enumerate(zip(sentence.phrases, row["boxes"], strict=True)):
            truth.boxes.extend(tuple(box) for box in phrase.boxes.tolist())
            truth.keys.extend([number] * len(phrase.boxes))
            found += own[:1]
            keys += [number] * len(own[:1])
        names = {number: phrase.text for number, phrase in enumerate(sentence.phrases)}
        text, boxes = "; ".join(names.values()), np.asarray(found, np.float64).reshape(-1, 4)
        yield _mistake(files.get(sentence.image, ""), text, truth, boxes, keys, [float("nan")] * len(found), names)
