"""Recall of phrases at 1, 5, 10 and all boxes on the original release of Flickr30k Entities, any-box and merged-box.

A phrase is found at k if one of its k best boxes has an IoU of at least 0.5 with a true box of it (*any-box*), or with the box
around all of its true boxes (*merged-box*). As in the evaluator of MDETR (arXiv 2104.12763, section 4.2; `datasets/flickr_eval.py`
of its repository), which GLIP uses unchanged. Every occurrence of a phrase counts. Phrases without a box, such as those that are
not visual, do not; and a sentence without any other phrase is not scored.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError

import numpy as np
from defusedxml.ElementTree import fromstring
from etils import epath
from jaxtyping import Float, Float64

from glip_jax import UserError
from glip_jax.data.importers.readers import as_integer
from glip_jax.evaluation.metrics.files import MetricError, box_array, objects, required
from glip_jax.evaluation.metrics.matching import iou
from glip_jax.io import gcs, text_files

__all__ = ["RANKS", "Phrase", "Sentence", "read_sentences", "score"]

logger = logging.getLogger(__name__)

RANKS = (1, 5, 10, -1)
"""-1: all boxes of a phrase."""
_MIN_IOU = 0.5
_SPLITS = ("test.txt", "val.txt", "train.txt")
"""Lists of image ids in the release; where a folder is given, the first that it has."""
_THREADS = 16


class Phrase(NamedTuple):
    """A phrase of a sentence."""

    text: str
    chain: str
    """Id of what it names; phrases of the sentences of an image share it."""
    types: tuple[str, ...]
    """One or more, such as people; a phrase of two types counts in both."""
    boxes: Float64[np.ndarray, "N 4"]
    """True boxes xyxy as the release has them; at least one."""
    span: tuple[int, int] = (0, 0)
    """Begin and end of the phrase in the caption, end exclusive."""


class Sentence(NamedTuple):
    """A sentence of an image, with its phrases that have a box, in order."""

    image: str
    index: int
    """Among the sentences of the image, from 0: `sentence_id` of predictions."""
    phrases: tuple[Phrase, ...]
    caption: str = ""
    """The words of the sentence without markup, joined by spaces."""


def score(annotations: str, predictions: str, release: str = "") -> dict[str, Any]:
    """`any_box` and `merged_boxes`: recall by rank ("1", "5", "10", "-1") and by type of phrase, "all" for all of them.

    `annotations`, `release`: as of `read_sentences`. `predictions`: JSON list of `{"image_id", "sentence_id", "boxes"}`, where boxes holds a
    list of [x1, y1, x2, y2] in descending score for each phrase of `read_sentences`. A phrase with an empty list is missed. Also
    `phrases` and `sentences`, their numbers, and `counts`: as in the official evaluator, a second prediction for a sentence and
    predictions for sentences that are not scored do not count.

    Raises:
        MetricError: files cannot be used, a sentence has no prediction, or another number of lists than it has phrases.
    """
    sentences = {(each.image, each.index): each for each in read_sentences(annotations, release) if each.phrases}
    if not sentences:
        raise MetricError(f"{annotations}: no sentence has a phrase with a box")
    totals = defaultdict[str, int](int)
    hits = {"any_box": defaultdict[tuple[int, str], int](int), "merged_boxes": defaultdict[tuple[int, str], int](int)}
    scored, duplicates, unlisted = set[tuple[str, int]](), 0, 0
    for number, entry in enumerate(objects(predictions)):
        where = f"the predictions {predictions}, item [{number}]"
        key, lists = _answer(entry, where)
        sentence = sentences.get(key)
        if sentence is None:
            unlisted += any(len(each) > 0 for each in lists)
            continue
        if key in scored:
            duplicates += 1
            continue
        scored.add(key)
        if len(lists) != len(sentence.phrases):
            raise MetricError(
                f"{where}, sentence {key[1]} of image {key[0]}: boxes has {len(lists)} lists, expected {len(sentence.phrases)}, "
                "one for each phrase that has a true box"
            )
        for row, (found, phrase) in enumerate(zip(lists, sentence.phrases, strict=True)):
            boxes = box_array(found, where, f"boxes[{row}]")
            kinds = ("all", *phrase.types)
            for kind in kinds:
                totals[kind] += 1
            for protocol, true in (("any_box", phrase.boxes), ("merged_boxes", _merged(phrase.boxes))):
                for rank, hit in zip(RANKS, _hits(boxes, true), strict=True):
                    for kind in kinds:
                        hits[protocol][rank, kind] += hit
    if missing := [key for key in sentences if key not in scored]:
        image, index = missing[0]
        raise MetricError(
            f"the predictions {predictions} lack {len(missing)} of {len(sentences)} sentences of {annotations}, first sentence "
            f"{index} of image {image}: expected an entry for each, with empty lists where nothing was found"
        )
    if duplicates or unlisted:
        logger.warning(
            f"note: {predictions}: {duplicates} second predictions of a sentence and {unlisted} of sentences that are not scored "
            "count for nothing"
        )
    return {
        protocol: {str(rank): {kind: found[rank, kind] / count for kind, count in totals.items()} for rank in RANKS}
        for protocol, found in hits.items()
    } | {
        "phrases": totals["all"], "sentences": len(sentences),
        "counts": {"duplicate_predictions": duplicates, "unlisted_predictions": unlisted},
    }  # fmt: skip


def _answer(entry: dict[str, Any], where: str) -> tuple[tuple[str, int], list[Any]]:
    """The sentence of a prediction, and its lists of boxes."""
    image, sentence, lists = (required(entry, key, where) for key in ("image_id", "sentence_id", "boxes"))
    index = as_integer(sentence)
    if index is None:
        raise MetricError(f"{where} has the sentence_id {sentence!r:.40}, expected an integer from 0")
    if not isinstance(lists, list) or not all(isinstance(each, list) for each in lists):
        raise MetricError(f"{where} has the boxes {lists!r:.60}, expected a list of boxes for each phrase")
    return (image if isinstance(image, str) else str(as_integer(image)), index), lists


def _hits(found: Float[np.ndarray, "n 4"], true: Float64[np.ndarray, "N 4"]) -> list[bool]:
    """Whether a phrase is found at each rank."""
    if not len(found):
        return [False] * len(RANKS)
    overlap = iou(found, true)
    # The overlap of two boxes without an area is nan, as then is the maximum in the official evaluator: no hit.
    return [bool((overlap if rank < 0 else overlap[:rank]).max() >= _MIN_IOU) for rank in RANKS]


def _merged(boxes: Float64[np.ndarray, "N 4"]) -> Float64[np.ndarray, "1 4"]:
    """The box around all boxes."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])[None]


def read_sentences(annotations: str, release: str = "") -> Iterator[Sentence]:
    """Yields the sentences of a split, those without a phrase that has a box included.

    `annotations`: the folder of the release, with Annotations/ID.xml and Sentences/ID.txt; its images are those of test.txt, or
    of val.txt or train.txt where it has no test.txt. Or the path of such a list of ids. `release`: the folder of the release where the
    list lies elsewhere.

    Raises:
        MetricError: there is no such folder or list, a file of a listed image is missing or cannot be read, or an image is
            listed twice.
    """
    split = epath.Path(annotations)
    kind = gcs.kind(split)
    if kind == "folder":
        found = [name for name in _SPLITS if gcs.kind(split / name) == "file"]
        if not found:
            raise MetricError(
                f"the folder {annotations} has none of {', '.join(_SPLITS)}: expected the release of Flickr30k Entities"
            )
        split /= found[0]
    elif not kind:
        raise MetricError(
            f"the annotations {annotations} do not exist: expected the folder of Flickr30k Entities, or a split in it"
        )
    images = [line.strip() for line in (_read(split) or "").splitlines() if line.strip()]
    if repeated := [image for image, count in Counter(images).items() if count > 1]:
        raise MetricError(f"{split} lists {len(repeated)} images twice, first {repeated[0]:.40}: ids must be unique")
    if not images:
        raise MetricError(f"{split} lists nothing: expected one image id per line")
    folder = epath.Path(release) if release else split.parent
    places = [folder / "Annotations" / f"{image}.xml" for image in images]
    places += [folder / "Sentences" / f"{image}.txt" for image in images]
    with ThreadPoolExecutor(_THREADS) as pool:
        texts = list(pool.map(_read, places))
    if missing := [place for place, text in zip(places, texts, strict=True) if text is None]:
        raise MetricError(
            f"{len(missing)} of the {len(places)} files of the images in {split} do not exist, first {missing[0]}: is the release "
            "complete?"
        )
    for image, place, xml, text in zip(images, places, texts, texts[len(images) :], strict=False):
        boxes = _boxes(xml or "", place)
        lines = [line for line in (text or "").split("\n") if line]
        for index, line in enumerate(lines):
            caption, found = _parsed(line, f"image {image}, {place}")
            phrases = (
                Phrase(words, chain, types, boxes[chain], span) for words, chain, types, span in found if chain in boxes
            )
            yield Sentence(image, index, tuple(phrases), caption)


def _read(path: epath.Path) -> str | None:
    """The text of a file with the line ends of Unix; None if there is no such file."""
    try:
        with gcs.open_file(path) as file:
            return text_files.decoded(file.read()).replace("\r\n", "\n").replace("\r", "\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except OSError as error:
        if isinstance(error, UserError):  # of the storage, with its own exit code
            raise
        raise MetricError(f"{path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise MetricError(f"{path}: {error}") from None


def _boxes(xml: str, place: epath.Path) -> dict[str, Float64[np.ndarray, "N 4"]]:
    """The boxes of each chain; scenes and what is not visible have none."""
    found = defaultdict[str, list[list[int]]](list)
    try:
        for item in fromstring(xml).findall("object"):
            box = item.find("bndbox")
            if box is None:
                continue
            corners = [int(box.findtext(side) or "") for side in ("xmin", "ymin", "xmax", "ymax")]
            for name in item.findall("name"):
                found[name.text or ""].append(corners)
    except (ParseError, ValueError) as error:  # defusedxml raises ValueError for forbidden content
        raise MetricError(f"{place} cannot be read ({error}): expected the XML of Flickr30k Entities") from None
    return {chain: np.array(rows, np.float64) for chain, rows in found.items()}


def _parsed(line: str, where: str) -> tuple[str, list[tuple[str, str, tuple[str, ...], tuple[int, int]]]]:
    """The caption of a sentence, and of its phrases "[/EN#CHAIN/TYPE/... words]" the words, chain, types and span in the caption.

    Markup is read word by word, as the release's own reader does: "[" begins a phrase at the begin of a word, "]" ends it at the
    end of one.
    """
    caption: list[str] = []
    phrases = []
    words: list[str] | None = None
    chain, types, begin = "", (), 0
    for token in line.split():
        if words is None and token.startswith("["):
            parts = token.split("/")
            if len(parts) < 2:
                raise MetricError(
                    f"{where}: the sentence {line!r:.80} has the word {token!r:.40}, expected [/EN#CHAIN/TYPE words]"
                )
            chain, types, words, begin = parts[1][3:], tuple(parts[2:]), [], sum(len(word) + 1 for word in caption)
        elif words is not None and token.endswith("]"):
            text = " ".join([*words, token[:-1]])
            caption += [*words, token[:-1]] if token != "]" else words
            phrases.append((text, chain, types, (begin, begin + len(text.rstrip()))))
            words = None
        elif words is not None:
            words.append(token)
        else:
            caption.append(token)
    return " ".join([*caption, *(words or [])]), phrases
