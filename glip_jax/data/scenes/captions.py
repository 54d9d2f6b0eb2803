"""Generates captions of scenes with counts, colors, sizes and relations, and the character span of every phrase.

A phrase is either plain, and refers to all boxes of its name, or relational: the scene shows several objects of the name, and
the phrase refers to those selected by a relation to another group ("a snail left of two red apples") or by a size word ("the
smaller snail"). Every statement holds for the visible boxes with a margin; statements that nearly fail are not made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from glip_jax.data.scenes.nouns import noun_phrase, says_color

__all__ = ["Phrase", "Relation", "describe", "relation_holds"]

Relation = Literal["left", "right", "above", "below"]
_RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
_WORDS: Mapping[Relation, tuple[str, ...]] = {
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
    "above": ("above",), "below": ("below", "under"),
}  # fmt: skip
_OPENINGS = ("", "", "", "a picture of ", "there is ", "we see ")
# Minimum ratio of lengths between objects of one name that differ by a size word.
_RATIO = 1.5
_RELATIONAL = 0.62
"""Probability that a caption uses a relational phrase if its scene allows one, so that about half of the captions have one."""
_MARGIN = 16.0
"""Minimum distance of centers in pixels for a relation to be stated."""


class Phrase(NamedTuple):
    """A phrase of a caption."""

    span: tuple[int, int]
    """Characters of the caption, end exclusive."""
    kind: Literal["plain", "relational"]
    boxes: tuple[int, ...]
    """Indices of the boxes that it refers to."""


@dataclass(frozen=True)
class _Group:
    """A text, and the boxes that it refers to."""

    words: str
    members: tuple[int, ...]
    kind: Literal["plain", "relational"]


def relation_holds(
    relation: Relation, first: Float32[np.ndarray, "M 4"], second: Float32[np.ndarray, "K 4"]
) -> Bool[np.ndarray, "M K"]:
    """For every pair of xyxy boxes whether the first is clearly `relation` of the second.

    Along the axis of the relation, the centers must be more than 16 pixels, and more than half of their distance along the
    other axis, apart.
    """
    a, b = ((boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (first, second))
    along, across = (0, 1) if relation in ("left", "right") else (1, 0)
    forward = b[None, :, along] - a[:, None, along]
    if relation in ("right", "below"):
        forward = -forward
    across_distance = np.abs(b[None, :, across] - a[:, None, across])
    return forward > np.maximum(_MARGIN, across_distance / 2)


def describe(
    rng: np.random.Generator,
    names: Sequence[str],
    colors: Sequence[str],
    boxes: Float32[np.ndarray, "N 4"],
    sides: tuple[float, float],
) -> tuple[str, tuple[Phrase, ...]]:
    """Generates a caption of one to four groups of objects, and its phrases; the caption is empty without boxes.

    Boxes are xyxy in pixels; `colors`: color of each box ("": not to be mentioned); `sides`: smallest and largest side of
    objects: those in the lowest or highest quarter of that range may be called small or big.
    """
    kinds = list(dict.fromkeys(names))
    if not kinds:
        return "", ()
    rng.shuffle(kinds)
    groups = {kind: tuple(i for i, name in enumerate(names) if name == kind) for kind in kinds}
    writer = _CaptionWriter(rng, groups, colors, boxes, sides)
    parts: list[str | _Group] = []
    chosen = writer.relational() if rng.random() < _RELATIONAL else None
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
        parts += writer.pair(*(writer.whole(kind) for kind in kinds[position : position + 2]))
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
        # Only before an indefinite phrase: "there is a snail", not "there is the snail".
        if first.words.startswith("the "):
            return ""
        return opening if first.words.startswith(("a ", "an ")) else "there are "
    return opening


@dataclass(frozen=True)
class _CaptionWriter:
    """Generates the texts of the groups of one scene."""

    rng: np.random.Generator
    groups: Mapping[str, tuple[int, ...]]
    colors: Sequence[str]
    boxes: Float32[np.ndarray, "N 4"]
    sides: tuple[float, float]

    def whole(self, name: str) -> _Group:
        """All objects of a name: "two small red apples"."""
        members = self.groups[name]
        words = noun_phrase(name, len(members), self._size(members), self._color(name, members))
        return _Group(words, members, "plain")

    def pair(self, first: _Group, second: _Group | None = None) -> list[str | _Group]:
        """Two groups joined by a relation that holds between all of their boxes, or by "and"."""
        if second is None:
            return [first]
        a, b = self.boxes[list(first.members)], self.boxes[list(second.members)]
        true: list[Relation] = [relation for relation in _RELATIONS if relation_holds(relation, a, b).all()]
        if not true or self.rng.random() < 0.1:
            return [first, " and ", second]
        return [first, f" {self._relation_text(true)} ", second]

    def relational(self) -> tuple[list[str | _Group], tuple[str, ...]] | None:
        """A relational phrase with its anchor, and the names that they use; None if the scene allows none."""
        by_relation: list[tuple[str, str, Relation, tuple[int, ...]]] = [
            (name, anchor, relation, selected)
            for name, members in self.groups.items() if len(members) > 1
            for anchor in self.groups if anchor != name
            for relation in _RELATIONS if (selected := self._selected_by_relation(members, self.groups[anchor], relation))
        ]  # fmt: skip
        by_size = [
            (name, word, selected)
            for name, members in self.groups.items() if len(members) > 1
            for word in ("small", "big") if (selected := self._selected_by_size(members, word))
        ]  # fmt: skip
        if by_relation and (not by_size or self.rng.random() < 0.7):
            name, anchor, relation, selected = by_relation[int(self.rng.integers(len(by_relation)))]
            words = noun_phrase(name, len(selected), "", self._color(name, selected), definite=self.rng.random() < 0.5)
            group = _Group(words, selected, "relational")
            return [group, f" {self._relation_text([relation])} ", self.whole(anchor)], (name, anchor)
        if by_size:
            name, word, selected = by_size[int(self.rng.integers(len(by_size)))]
            group = _Group(self._size_words(name, word, selected), selected, "relational")
            others = [other for other in self.groups if other != name]
            if others and self.rng.random() < 0.5:
                other = others[int(self.rng.integers(len(others)))]
                return self.pair(group, self.whole(other)), (name, other)
            return [group], (name,)
        return None

    def _selected_by_relation(
        self, members: tuple[int, ...], anchors: tuple[int, ...], relation: Relation
    ) -> tuple[int, ...]:
        """The `members` that are `relation` of all anchors, if the others are clearly on the opposite side; else empty."""
        group, others = self.boxes[list(members)], self.boxes[list(anchors)]
        inside = relation_holds(relation, group, others).all(1)
        axis = 0 if relation in ("left", "right") else 1
        a, b = ((boxes[:, axis] + boxes[:, axis + 2]) / 2 for boxes in (group, others))
        beyond = a > b.max() + _MARGIN if relation in ("left", "above") else a < b.min() - _MARGIN
        if not inside.any() or inside.all() or not (inside | beyond).all():
            return ()
        return tuple(members[int(i)] for i in np.flatnonzero(inside))

    def _selected_by_size(self, members: tuple[int, ...], word: str) -> tuple[int, ...]:
        """The `members` that are clearly smaller (bigger) than all others, if their sizes form two classes; else empty."""
        lengths = self._lengths(members)
        order = np.argsort(lengths, kind="stable")
        ordered = lengths[order]
        gaps = ordered[1:] / ordered[:-1]
        cut = int(gaps.argmax()) + 1
        if gaps[cut - 1] < _RATIO:
            return ()
        selected = order[:cut] if word == "small" else order[cut:]
        return tuple(sorted(members[int(i)] for i in selected))

    def _size_words(self, name: str, word: str, selected: tuple[int, ...]) -> str:
        """A phrase such as "the small snail", "the smaller snail" (of two), "the smallest snail" or "the two small snails"."""
        adjective = word
        if len(selected) == 1 and self.rng.random() < 0.5:
            ending = "er" if len(self.groups[name]) == 2 else "est"
            adjective = word + "g" * (word == "big") + ending
        return noun_phrase(name, len(selected), adjective, self._color(name, selected), definite=True)

    def _size(self, members: tuple[int, ...]) -> str:
        lengths = self._lengths(members)
        quarter = (self.sides[1] - self.sides[0]) / 4
        if self.rng.random() < 0.5:
            return ""
        if (lengths >= self.sides[1] - quarter).all():
            return str(self.rng.choice(("big", "large")))
        return str(self.rng.choice(("small", "little"))) if (lengths <= self.sides[0] + quarter).all() else ""

    def _color(self, name: str, members: tuple[int, ...]) -> str:
        found = {self.colors[member] for member in members}
        if len(found) > 1 or says_color(name) or self.rng.random() < 0.5:
            return ""
        return found.pop()

    def _lengths(self, members: tuple[int, ...]) -> np.ndarray:
        group = self.boxes[list(members)]
        return (group[:, 2:] - group[:, :2]).max(1)

    def _relation_text(self, relations: Sequence[Relation]) -> str:
        return str(self.rng.choice(_WORDS[relations[int(self.rng.integers(len(relations)))]]))
