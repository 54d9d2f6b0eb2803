"""The grammar that speaks of a scene: counts, colours, sizes and relations, with the characters of every phrase.

A phrase is plain, and then means all boxes of its name, or relational: the scene shows several things of the name, and
only those are meant that a relation to another group ("a snail left of two red apples") or a size word ("the smaller
snail") picks. Everything said holds for the visible boxes with a margin; what is near a limit is not said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from glip_jax.data.scenes.nouns import noun_phrase, says_colour

__all__ = ["Phrase", "Relation", "describe", "relation_holds"]

Relation = Literal["left", "right", "above", "below"]
_RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
_WORDS: Mapping[Relation, tuple[str, ...]] = {
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
    "above": ("above",), "below": ("below", "under"),
}  # fmt: skip
_OPENINGS = ("", "", "", "a picture of ", "there is ", "we see ")
# What a size word is worth between things of one name: how many times as long.
_RATIO = 1.5
_RELATIONAL = 0.62
"""Chance that a caption uses a relational phrase that its scene gives: so about half of the captions have one."""
_MARGIN = 16.0
"""Pixels between centres from which on a relation is said."""


class Phrase(NamedTuple):
    """A phrase of a caption."""

    span: tuple[int, int]
    """Characters of the caption, end exclusive."""
    kind: Literal["plain", "relational"]
    boxes: tuple[int, ...]
    """Indices of the boxes it means."""


@dataclass(frozen=True)
class _Group:
    """Words, and the boxes they mean."""

    words: str
    members: tuple[int, ...]
    kind: Literal["plain", "relational"]


def relation_holds(
    relation: Relation, first: Float32[np.ndarray, "M 4"], second: Float32[np.ndarray, "K 4"]
) -> Bool[np.ndarray, "M K"]:
    """For every pair of xyxy boxes whether the first is `relation` of the second, clearly.

    Clearly: the centres are more than 16 pixels and more than half of their distance across apart along the axis.
    """
    a, b = ((boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (first, second))
    along, across = (0, 1) if relation in ("left", "right") else (1, 0)
    forward = b[None, :, along] - a[:, None, along]
    if relation in ("right", "below"):
        forward = -forward
    beside = np.abs(b[None, :, across] - a[:, None, across])
    return forward > np.maximum(_MARGIN, beside / 2)


def describe(
    rng: np.random.Generator,
    names: Sequence[str],
    colours: Sequence[str],
    boxes: Float32[np.ndarray, "N 4"],
    sides: tuple[float, float],
) -> tuple[str, tuple[Phrase, ...]]:
    """A caption of one to four groups of things and its phrases; for no boxes an empty one.

    Boxes are xyxy pixels, `colours` their colours ("": not to be said), `sides` the smallest and largest side of
    things: what lies in the lowest or highest quarter between them may be called small or big.
    """
    kinds = list(dict.fromkeys(names))
    if not kinds:
        return "", ()
    rng.shuffle(kinds)
    groups = {kind: tuple(i for i, name in enumerate(names) if name == kind) for kind in kinds}
    speaker = _Speaker(rng, groups, colours, boxes, sides)
    parts: list[str | _Group] = []
    chosen = speaker.relational() if rng.random() < _RELATIONAL else None
    if chosen is not None:
        parts += chosen[0]
        kinds = [kind for kind in kinds if kind not in chosen[1]]
        kinds = kinds[: int(rng.integers(0, 3))]
        parts += [", "] if kinds else []
    else:
        kinds = kinds[: int(rng.integers(2, 5))]
    for position in range(0, len(kinds), 2):
        # Pairs: "A left of B, C above D", so that every relation has one subject and one object.
        parts += [", "] if position else []
        parts += speaker.pair(*(speaker.whole(kind) for kind in kinds[position : position + 2]))
    caption, phrases = _opening(rng, parts), []
    for part in parts:
        if isinstance(part, str):
            caption += part
        else:
            phrases.append(Phrase((len(caption), len(caption) + len(part.words)), part.kind, part.members))
            caption += part.words
    return caption, tuple(phrases)


def _opening(rng: np.random.Generator, parts: Sequence[str | _Group]) -> str:
    opening = str(rng.choice(_OPENINGS))
    first = parts[0]
    if opening == "there is " and isinstance(first, _Group):
        # Only before what is new to the listener: "there is a snail", not "there is the snail".
        if first.words.startswith("the "):
            return ""
        return opening if first.words.startswith(("a ", "an ")) else "there are "
    return opening


@dataclass(frozen=True)
class _Speaker:
    """Words for parts of one scene."""

    rng: np.random.Generator
    groups: Mapping[str, tuple[int, ...]]
    colours: Sequence[str]
    boxes: Float32[np.ndarray, "N 4"]
    sides: tuple[float, float]

    def whole(self, name: str) -> _Group:
        """All of a name: "two small red apples"."""
        members = self.groups[name]
        words = noun_phrase(name, len(members), self._size(members), self._colour(name, members))
        return _Group(words, members, "plain")

    def pair(self, first: _Group, second: _Group | None = None) -> list[str | _Group]:
        """Two groups joined by a relation that holds between all of their boxes, or by "and"."""
        if second is None:
            return [first]
        a, b = self.boxes[list(first.members)], self.boxes[list(second.members)]
        true: list[Relation] = [relation for relation in _RELATIONS if relation_holds(relation, a, b).all()]
        if not true or self.rng.random() < 0.1:
            return [first, " and ", second]
        return [first, f" {self._word(true)} ", second]

    def relational(self) -> tuple[list[str | _Group], tuple[str, ...]] | None:
        """A relational phrase with what it needs, and the names that it uses up; None if the scene gives none."""
        by_relation: list[tuple[str, str, Relation, tuple[int, ...]]] = [
            (name, anchor, relation, picked)
            for name, members in self.groups.items() if len(members) > 1
            for anchor in self.groups if anchor != name
            for relation in _RELATIONS if (picked := self._picked(members, self.groups[anchor], relation))
        ]  # fmt: skip
        by_size = [
            (name, word, picked)
            for name, members in self.groups.items() if len(members) > 1
            for word in ("small", "big") if (picked := self._sized(members, word))
        ]  # fmt: skip
        if by_relation and (not by_size or self.rng.random() < 0.7):
            name, anchor, relation, picked = by_relation[int(self.rng.integers(len(by_relation)))]
            words = noun_phrase(name, len(picked), "", self._colour(name, picked), definite=self.rng.random() < 0.5)
            group = _Group(words, picked, "relational")
            return [group, f" {self._word([relation])} ", self.whole(anchor)], (name, anchor)
        if by_size:
            name, word, picked = by_size[int(self.rng.integers(len(by_size)))]
            group = _Group(self._size_words(name, word, picked), picked, "relational")
            others = [other for other in self.groups if other != name]
            if others and self.rng.random() < 0.5:
                other = others[int(self.rng.integers(len(others)))]
                return self.pair(group, self.whole(other)), (name, other)
            return [group], (name,)
        return None

    def _picked(self, members: tuple[int, ...], anchors: tuple[int, ...], relation: Relation) -> tuple[int, ...]:
        """Those of `members` that are `relation` of all anchors, if the others are clearly on the other side."""
        group, others = self.boxes[list(members)], self.boxes[list(anchors)]
        inside = relation_holds(relation, group, others).all(1)
        axis = 0 if relation in ("left", "right") else 1
        a, b = ((boxes[:, axis] + boxes[:, axis + 2]) / 2 for boxes in (group, others))
        beyond = a > b.max() + _MARGIN if relation in ("left", "above") else a < b.min() - _MARGIN
        if not inside.any() or inside.all() or not (inside | beyond).all():
            return ()
        return tuple(members[int(i)] for i in np.flatnonzero(inside))

    def _sized(self, members: tuple[int, ...], word: str) -> tuple[int, ...]:
        """Those of `members` that are clearly smaller (bigger) than all others, if sizes fall into two classes."""
        lengths = self._lengths(members)
        order = np.argsort(lengths, kind="stable")
        ordered = lengths[order]
        gaps = ordered[1:] / ordered[:-1]
        cut = int(gaps.argmax()) + 1
        if gaps[cut - 1] < _RATIO:
            return ()
        picked = order[:cut] if word == "small" else order[cut:]
        return tuple(sorted(members[int(i)] for i in picked))

    def _size_words(self, name: str, word: str, picked: tuple[int, ...]) -> str:
        """Words like "the small snail", "the smaller snail" of two, "the smallest snail" of more, "the two small snails"."""
        form = word
        if len(picked) == 1 and self.rng.random() < 0.5:
            ending = "er" if len(self.groups[name]) == 2 else "est"
            form = word + "g" * (word == "big") + ending
        return noun_phrase(name, len(picked), form, self._colour(name, picked), definite=True)

    def _size(self, members: tuple[int, ...]) -> str:
        lengths = self._lengths(members)
        quarter = (self.sides[1] - self.sides[0]) / 4
        if self.rng.random() < 0.5:
            return ""
        if (lengths >= self.sides[1] - quarter).all():
            return str(self.rng.choice(("big", "large")))
        return str(self.rng.choice(("small", "little"))) if (lengths <= self.sides[0] + quarter).all() else ""

    def _colour(self, name: str, members: tuple[int, ...]) -> str:
        found = {self.colours[member] for member in members}
        if len(found) > 1 or says_colour(name) or self.rng.random() < 0.5:
            return ""
        return found.pop()

    def _lengths(self, members: tuple[int, ...]) -> np.ndarray:
        group = self.boxes[list(members)]
        return (group[:, 2:] - group[:, :2]).max(1)

    def _word(self, relations: Sequence[Relation]) -> str:
        return str(self.rng.choice(_WORDS[relations[int(self.rng.integers(len(relations)))]]))
