"""Checks of a data set before time is spent on it: what is wrong with its boxes, images, splits and names, a sentence each.

`layouts.find` has mended ids and left out dummy classes already, and says so in `Dataset.notes`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from etils import epath

from glip_jax.data.importers.entry import as_numbers
from glip_jax.data.importers.layouts import Dataset, Split
from glip_jax.data.records import content_hash
from glip_jax.structures.prompts import PromptError, Tokenizer, check_names, clean_name, listed, words

__all__ = ["MOST_BOXES", "Finding", "findings", "names_findings"]

MOST_BOXES = 100
"""Boxes of an image that COCO's evaluation counts."""

_GENERIC = {
    "class",
    "category",
    "item",
    "label",
    "object",
    "obj",
    "thing",
    "target",
    "unknown",
    "null",
    "none",
    "other",
}
"""Words that say nothing about what is to be found."""

_NOT_SIDES = {"bright", "copyright", "cleft", "downright", "fright", "outright", "upright", "wright"}


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    """Name of the check, such as "same image in two splits"."""
    text: str
    error: bool = False
    """Whether the data set cannot be used as it is."""
    no_flip: bool = False
    """Whether mirrored images would have wrong names."""


def findings(
    dataset: Dataset, rename: Mapping[str, str] | None = None, tokenizer: Tokenizer | None = None, max_tokens: int = 256
) -> list[Finding]:
    """What is wrong, or worth knowing, about a data set.

    `rename`: text in the prompt by name in the files, as `--names` has it. `tokenizer`: of the text encoder; without one the
    characters and the number of names are not checked. `max_tokens`: tokens of a prompt.
    """
    texts = {name: (rename or {}).get(name, name) for name in dataset.names}
    found = [finding for split in dataset.splits.values() for finding in _of_boxes(split)]
    return [*found, *_of_splits(dataset), *_of_images(dataset), *names_findings(texts, tokenizer, max_tokens)]


def _of_boxes(split: Split) -> Iterator[Finding]:
    sizes = {str(image["id"]): (image.get("width"), image.get("height")) for image in split.coco["images"]}
    thin, outside = [], []
    for note in split.coco["annotations"]:
        box = as_numbers(note["bbox"], 4)
        if box is None:
            continue  # the reader counts it
        width, height = sizes.get(str(note["image_id"]), (None, None))
        if box[2] <= 1 or box[3] <= 1:
            thin.append(note)
        elif isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
            # A pixel more is rounding of the annotation tool, as in the importers.
            if box[0] < -1 or box[1] < -1 or box[0] + box[2] > width + 1 or box[1] + box[3] > height + 1:
                outside.append(note)
    if thin:
        yield Finding("boxes of at most one pixel", f"{_some(thin, split)} at most one pixel wide or high: left out")
    if outside:
        yield Finding("boxes outside the image", f"{_some(outside, split)} beyond the edge of the image: cut there")
    counts = Counter(str(note["image_id"]) for note in split.coco["annotations"])
    many = [identity for identity, count in counts.items() if count > MOST_BOXES]
    if many:
        identity, most = counts.most_common(1)[0]
        yield Finding(
            "many boxes in an image",
            f"{split.name}: {len(many)} images have more than {MOST_BOXES} boxes (image {identity}: {most}); COCO's evaluation counts "
            f"{MOST_BOXES} detections of an image, so that not all can be found",
        )  # fmt: skip


def _some(notes: list[dict[str, Any]], split: Split) -> str:
    of = len(split.coco["annotations"])
    return f"{split.name}: {len(notes)} of {of} boxes (first: annotation {notes[0].get('id')}) are"


def _of_splits(dataset: Dataset) -> Iterator[Finding]:
    train = set()
    for name, split in dataset.splits.items():
        used = Counter(str(note["category_id"]) for note in split.coco["annotations"])
        missing = [item["name"] for item in split.coco["categories"] if not used[str(item["id"])]]
        empty = len(split.coco["images"]) - len({str(note["image_id"]) for note in split.coco["annotations"]})
        if name == "train":
            train = set(missing)
        if not used:
            remedy = "; remove it, and a part of the training images is taken" if name == "valid" else ""
            yield Finding(
                "split without a box", f"{name}: no image has a box, so that nothing can be measured{remedy}", True
            )
        elif missing:
            effect = "nothing is learned for them" if name == "train" else "nothing is measured for them"
            also = "" if name == "train" or not train & set(missing) else "; some have no box to train on either"
            yield Finding("classes without a box", f"{name}: no box of {listed(missing)}: {effect}{also}")
        if empty and used:
            yield Finding("images without a box", f"{name}: {empty} of {len(split.coco['images'])} images have no box; they stay, as negatives")  # fmt: skip


def _of_images(dataset: Dataset) -> Iterator[Finding]:
    """Images of the same content in two splits, or twice in one."""
    files = [
        (name, split, image["file_name"]) for name, split in dataset.splits.items() for image in split.coco["images"]
    ]
    paths = [epath.Path(split.images) / file for _, split, file in files]
    seen: dict[int, tuple[str, str]] = {}
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(lambda path: path.stat().length, paths))
        several = {length for length, count in Counter(lengths).items() if count > 1}
        chosen = [index for index, length in enumerate(lengths) if length in several]
        for index, digest in zip(chosen, pool.map(lambda index: content_hash(paths[index].read_bytes()), chosen)):
            name, _, file = files[index]
            if digest in seen:
                other, earlier = seen[digest]
                pairs.setdefault((other, name), []).append((earlier, file))
            else:
                seen[digest] = name, file
    for (one, other), same in pairs.items():
        said = f"{len(same)} images (first: {same[0][0]} and {same[0][1]})"
        if one == other:
            yield Finding("same image twice", f"{one}: {said} are there twice")
        else:
            yield Finding(
                "same image in two splits",
                f"{said} are in {one} and in {other}: what is measured there is better than on new images",
            )


def names_findings(
    texts: Mapping[str, str], tokenizer: Tokenizer | None = None, max_tokens: int = 256
) -> Iterator[Finding]:
    """What is wrong with names; `texts`: text in the prompt by name in the files."""
    advice = 'give them a text with --names, a JSON file like {"RBC": "red blood cell"}'
    if vague := [name for name, text in texts.items() if _is_vague(clean_name(text))]:
        yield Finding("names without meaning", f"{listed(vague)} may mean nothing to the text encoder: {advice}")
    if sides := [name for name, text in texts.items() if _says_side(text)]:
        yield Finding(
            "left or right", f"{listed(sides)} tell left from right: images are not mirrored in training", no_flip=True
        )
    own = {name: words(clean_name(text)) for name, text in texts.items()}
    inside = [f"{a} in {b}" for a in own for b in own if a != b and own[a] != own[b] and _contains(own[b], own[a])]
    if inside:
        yield Finding("one name inside another", f"a name is part of another, and is easily found in its place: {listed(inside)}")  # fmt: skip
    if tokenizer is None:
        return
    remedy = 'give them English text with --names, as in {"\u732b": "cat"}, or take a model of that language'
    effect = "what it lacks becomes [UNK], the same for all such names"
    try:
        notes = check_names(list(texts.values()), tokenizer, "names", remedy, "note")
        for note in notes:
            is_vocabulary = "vocabulary" in note
            check = "names the vocabulary lacks" if is_vocabulary else "names that are the same to the model"
            yield Finding(check, f"{note}; {effect}: {remedy}" if is_vocabulary else note, not is_vocabulary)
    except PromptError as error:
        yield Finding("names the vocabulary lacks", f"{error} ({effect})", True)
    # A separator stands between names; [CLS] and [SEP], which `encode` adds to each, enclose the prompt.
    tokens = 1 + sum(len(tokenizer.encode(clean_name(text)).ids) - 1 for text in texts.values())
    if tokens > max_tokens:
        yield Finding(
            "many names",
            f"{len(texts)} names have {tokens} tokens, and a prompt {max_tokens}: training draws names for each image, evaluation "
            "prompts them in chunks, and scores of different chunks compare less well",
        )


def _is_vague(text: str) -> bool:
    """Whether a name is a number, a letter, a general word, or seems to be an abbreviation."""
    tokens = re.findall(r"[^\W_]+", text)
    plain = [token for token in tokens if not token.isdecimal()]
    return all(
        (len(token) == 1 and token.isascii())
        or token.lower().rstrip("0123456789") in _GENERIC
        or _is_abbreviation(token)
        for token in plain
    )


def _is_abbreviation(token: str) -> bool:
    """CoW, RBC, plt: a short word with capitals inside, or of three or four letters without a vowel."""
    mixed = not token.isupper() and any(letter.isupper() for letter in token[1:])
    return (
        token.isascii() and len(token) <= 4 and (mixed or (len(token) > 2 and not re.search("[aeiouy]", token.lower())))
    )


def _says_side(text: str) -> bool:
    parts = re.findall(r"[A-Z]*[a-z]+|[A-Z]+", text)
    return any(part.lower().endswith(("left", "right")) and part.lower() not in _NOT_SIDES for part in parts)


def _contains(name: tuple[str, ...], part: tuple[str, ...]) -> bool:
    """Whether the words of `part` follow one another in `name`."""
    return any(name[i : i + len(part)] == part for i in range(len(name) - len(part) + 1))
