"""The small grammar that speaks of a scene: counts, sizes and relations, with the characters of every phrase."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

__all__ = ["describe", "noun_phrase", "plural"]

_COUNTS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Names that are plural, or no countable thing, as they stand: "some jeans", "some corn".
_UNCOUNTED = frozenset((
    "blueberries", "cherries", "chopsticks", "corn", "eyeglasses", "fries", "garlic", "gloves", "grapes", "jeans", "peanuts",
    "shorts", "socks",
))  # fmt: skip
_IRREGULAR = {
    "mouse": "mice", "deer": "deer", "fish": "fish", "sheep": "sheep", "tooth": "teeth", "ox": "oxen", "bison": "bison",
    "die": "dice", "squid": "squid", "shrimp": "shrimp", "leaf": "leaves", "scarf": "scarves", "blowfish": "blowfish",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "buffalo": "buffaloes",
}  # fmt: skip


def plural(name: str) -> str:
    """The plural of a name, by its last word: red apple -> red apples, bus -> buses, mouse -> mice."""
    *before, last = name.split(" ")
    if last in _UNCOUNTED:
        form = last
    elif last in _IRREGULAR:
        form = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        form = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        form = last[:-1] + "ies"
    else:
        form = last + "s"
    return " ".join([*before, form])


def noun_phrase(name: str, count: int, size: str = "") -> str:
    """Words for `count` things: "a big snail", "two red apples", "some jeans". `size` may be empty."""
    words = f"{size} {name}".strip()
    if name.split(" ")[-1] in _UNCOUNTED:
        return f"some {words}"
    if count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    number = _COUNTS[count] if count < len(_COUNTS) else str(count)
    return f"{number} {plural(words)}"


def describe(
    rng: np.random.Generator, names: Sequence[str], boxes: Float32[np.ndarray, "N 4"], sides: tuple[int, int]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A caption of two to four kinds of things (or the one there is) and per box the (begin, end) of its phrase.

    Boxes are xyxy pixels. All boxes of a name share a phrase; a name that the caption leaves out has (0, 0). Two
    groups are joined by a relation only where it holds for all of their boxes' centres. `sides` are the smallest and
    largest side of things: what lies in the lowest or highest quarter may be called small or big.
    """
    kinds = list(dict.fromkeys(names))
    rng.shuffle(kinds)
    kinds = kinds[: int(rng.integers(2, 5))]
    caption, spans = "", [(0, 0)] * len(names)
    previous: np.ndarray | None = None
    for position, kind in enumerate(kinds):
        members = [i for i, name in enumerate(names) if name == kind]
        group = boxes[members]
        if previous is not None:
            # Pairs: "A left of B, C above D", so that every relation has one subject and one object.
            caption += _joint(rng, previous, group) if position % 2 else ", "
        phrase = noun_phrase(kind, len(members), _size(rng, group, sides))
        for member in members:
            spans[member] = (len(caption), len(caption) + len(phrase))
        caption += phrase
        previous = group
    return caption, tuple(spans)


def _size(rng: np.random.Generator, group: Float32[np.ndarray, "M 4"], sides: tuple[int, int]) -> str:
    longest = (group[:, 2:] - group[:, :2]).max(1)
    quarter = (sides[1] - sides[0]) / 4
    if rng.random() < 0.5:
        return ""
    if (longest >= sides[1] - quarter).all():
        return "big"
    return "small" if (longest <= sides[0] + quarter).all() else ""


def _joint(rng: np.random.Generator, first: Float32[np.ndarray, "M 4"], second: Float32[np.ndarray, "K 4"]) -> str:
    a, b = (first[:, :2] + first[:, 2:]) / 2, (second[:, :2] + second[:, 2:]) / 2
    # Some pixels of margin: nobody calls two things at the same height one above the other.
    margin = 12
    relations = [
        word
        for word, holds in (
            ("left of", a[:, 0].max() + margin < b[:, 0].min()),
            ("right of", a[:, 0].min() > b[:, 0].max() + margin),
            ("above", a[:, 1].max() + margin < b[:, 1].min()),
            ("below", a[:, 1].min() > b[:, 1].max() + margin),
        )
        if holds
    ]
    return f" {relations[int(rng.integers(len(relations)))]} " if relations else " and "
