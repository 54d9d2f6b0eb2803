"""Look-alikes: phrases of a caption with one attribute changed, such as "a yellow apple" for "a red apple", as negative texts.

Colors and materials are replaced by another one that cannot be taken for the same, sizes and sides by their opposite.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glip_jax.data.negatives.dictionary import stems

__all__ = ["LookAlike", "look_alike"]

_WORD = re.compile(r"\w+")
_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
_CLOSE = {
    "red": "orange pink brown purple", "orange": "yellow brown pink", "yellow": "brown green white", "green": "blue gray",
    "blue": "purple gray black", "purple": "pink", "brown": "black gray", "black": "gray", "white": "gray pink",
}  # fmt: skip
"""Colors that may be taken for one another in some light."""
_SPELLED = {"grey": "gray", "violet": "purple", "silver": "gray", "golden": "yellow", "tan": "brown", "beige": "brown", "blond": "yellow",
            "blonde": "yellow"}  # fmt: skip
_MATERIALS = ("wooden", "metal", "plastic", "leather", "stone")
_OPPOSITES = (
    (("small", "little", "tiny"), ("big", "large", "huge")), (("smaller",), ("bigger", "larger")), (("smallest",), ("biggest", "largest")),
    (("tall",), ("short",)), (("empty",), ("full",)), (("wet",), ("dry",)), (("young",), ("old",)),
)  # fmt: skip
_SIDES = {"left": "right", "right": "left"}
_AFTER = frozenset((
    "of", "on", "in", "with", "at", "by", "and", "or", "to", "from", "near", "that", "which", "who", "is", "are",
))  # fmt: skip
"""What follows a noun: in "an orange on a plate" the word is no attribute."""


class LookAlike(NamedTuple):
    """A phrase with one word changed."""

    text: str
    everywhere: bool
    """Whether it is true of nothing in an image whose labels are complete. A size or a side tells an object from another one of the
    same name: "the bigger dog" is likely to be there where "the smaller dog" has a box.
    """


def look_alike(
    caption: str, phrases: Sequence[str], eligible: Sequence[int], beside: Sequence[Sequence[str]], sides: bool,
    rng: np.random.Generator,
) -> LookAlike | None:  # fmt: skip
    """One phrase of `phrases[i]`, i in `eligible`, with one attribute changed; None where there is none.

    No other phrase may be true of it (the same words, fewer or more). The new word stands neither outside of the phrases nor in those that
    name the same box (`beside[i]`). `sides`: whether left and right may be changed, which a mirrored or cropped image forbids.
    """
    outside = caption.lower()
    for phrase in phrases:
        outside = outside.replace(phrase.lower(), " ")
    free = {*_WORD.findall(outside)}
    choices: list[list[LookAlike]] = []
    for index in dict.fromkeys(eligible):
        taken = free | {word for phrase in beside[index] for word in _WORD.findall(phrase.lower())}
        others = [stems(phrase) for number, phrase in enumerate(phrases) if number != index]
        own = [
            LookAlike(text, everywhere)
            for text, new, everywhere in _changes(phrases[index], sides)
            if new not in taken and not any(_alike(stems(text), other) for other in others)
        ]
        if own:
            choices.append(own)
    if not choices:
        return None
    chosen = choices[int(rng.integers(len(choices)))]
    return chosen[int(rng.integers(len(chosen)))]


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    return one <= other or other <= one


def _changes(phrase: str, sides: bool) -> list[tuple[str, str, bool]]:
    """(changed phrase, new word, whether it is true of nothing else) for every attribute and every word in its place."""
    found = list(_WORD.finditer(phrase))
    said = [match[0].lower() for match in found]
    changes = []
    for place, (match, word) in enumerate(zip(found, said)):
        following = said[place + 1] if place + 1 < len(said) else ""
        before = said[place - 1] if place else ""
        options: list[str] = []
        everywhere = False
        if following and following not in _AFTER:
            options, everywhere = _replacements(word)
        if sides and word in _SIDES and (before in ("the", "on") or following == "of"):
            options = [_SIDES[word]]
        for new in options:
            if new not in said:
                changes.append((_replaced(phrase, match.span(), new, before, found[place - 1].span()), new, everywhere))
    return changes


def _replacements(word: str) -> tuple[list[str], bool]:
    """Words in the place of an attribute, and whether they say something that complete labels exclude."""
    color = _SPELLED.get(word, word)
    if color in _COLORS:
        far = [other for other in _COLORS if other != color and not _close(color, other)]
        return far, True
    if word in _MATERIALS:
        return [other for other in _MATERIALS if other != word], True
    for one, other in itertools.chain(_OPPOSITES, ((second, first) for first, second in _OPPOSITES)):
        if word in one:
            return list(other[:2]), False
    return [], False


def _close(one: str, other: str) -> bool:
    return other in _CLOSE.get(one, "").split() or one in _CLOSE.get(other, "").split()


def _replaced(phrase: str, span: tuple[int, int], new: str, before: str, article: tuple[int, int]) -> str:
    """`phrase` with `new` at `span`, and the article before it as its first letter demands."""
    head = phrase[: span[0]]
    if before in ("a", "an"):
        fitting = "an" if new[0] in "aeiou" else "a"
        fitting = fitting.capitalize() if head[article[0]].isupper() else fitting
        head = head[: article[0]] + fitting + head[article[1] :]
    return head + new + phrase[span[1] :]
