"""Negatives of captions: number and choice of names that are absent from the image, likeness, and packing of texts around a caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int

from glip_jax.config import CaptionConfig, PackingConfig
from glip_jax.data.negatives.dictionary import stems
from glip_jax.structures.prompts import Tokenizer

__all__ = ["Likeness", "LikenessOfMeaning", "NameVectors", "choose", "number_of_names", "number_of_texts", "pack"]

_CACHED = 4096
"""Texts whose likeness to a list of names is cached."""


def number_of_names(available: int, config: CaptionConfig, rng: np.random.Generator) -> int:
    """Number of negative names to sample of `available` ones (CONTROL_PROB of the original, glip-reference 4.2 step 3)."""
    limit = min(config.max_negatives, available)
    if limit <= 0:
        return 0
    number = rng.random()
    for probability, count in (
        (config.one_negative_probability, 1),
        (config.one_positive_probability, 0),
        (config.full_probability, limit),
    ):
        if number < probability:
            return count
        number -= probability
    return int(rng.integers(1, limit, endpoint=True))


def number_of_texts(config: PackingConfig, rng: np.random.Generator) -> int:
    """Number of texts to pack with a caption (glip-reference 4.6)."""
    if not config.number or rng.random() < config.none_probability:
        return 0
    if rng.random() < config.full_probability:
        return config.number
    return int(rng.integers(0, config.number))


def choose(
    likeness: Float[np.ndarray, " P"] | None, available: int, count: int, hard_share: float, rng: np.random.Generator,
    weights: Float[np.ndarray, " P"] | None = None,
) -> list[int]:  # fmt: skip
    """At most `count` distinct indices below `available`, in random order.

    The fraction `hard_share` of them is sampled from the indices of highest positive `likeness`, twice as many as needed; the others
    from all, with probabilities by `weights` if given.
    """
    if likeness is None or hard_share <= 0:
        return _drawn(np.arange(available), count, rng, weights)
    similar = np.argsort(-likeness, kind="stable")[: 2 * round(hard_share * count)]
    similar = similar[likeness[similar] > 0]
    hard = rng.permutation(similar)[: round(hard_share * count)]
    rest = _drawn(np.setdiff1d(np.arange(available), hard), max(0, count - len(hard)), rng, weights)
    return rng.permutation(np.concatenate([hard, rest]).astype(np.int64)).tolist()


def _drawn(
    indices: Int[np.ndarray, " I"], count: int, rng: np.random.Generator, weights: Float[np.ndarray, " P"] | None
) -> list[int]:
    """At most `count` of `indices` in random order, without replacement."""
    if weights is None:
        return rng.permutation(indices)[:count].tolist()
    # The largest of log(weight) + Gumbel noise are a weighted sample.
    keys = np.log(weights[indices]) + rng.gumbel(size=len(indices))
    return indices[np.argsort(-keys, kind="stable")[:count]].tolist()


@dataclass(frozen=True)
class Likeness:
    """Likeness of a text to each of `names`: Jaccard index of words plus Jaccard index of letter trigrams, in [0, 2].

    "traffic light" is like "traffic sign" and "trafficker", not like "dog".
    """

    names: tuple[str, ...]

    @cached_property
    def _parts(self) -> list[tuple[set[str], set[str]]]:
        return [_parts(name) for name in self.names]

    @cached_property
    def _cache(self) -> dict[str, np.ndarray]:
        return {}

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, " P"]:
        """Per name: the maximum of its likeness to `texts`."""
        likeness = np.zeros(len(self.names), np.float32)
        for text in texts:
            if text not in self._cache:
                if len(self._cache) >= _CACHED:
                    self._cache.clear()
                words, trigrams = _parts(text)
                rows = [_shared(words, other) + _shared(trigrams, others) for other, others in self._parts]
                self._cache[text] = np.array(rows, np.float32)
            likeness = np.maximum(likeness, self._cache[text])
        return likeness


_NORM = 1024.0
"""Length of a vector whose values are whole numbers: sums of their products are exact in float32, so alike on every machine."""


@dataclass(frozen=True)
class NameVectors:
    """A vector for each of `names`, by its meaning."""

    names: tuple[str, ...]
    vectors: Float32[np.ndarray, "N C"]
    """Whole numbers, length 1024."""

    @classmethod
    def of(cls, names: Sequence[str], states: Float[np.ndarray, "N C"]) -> "NameVectors":
        """From states of a text encoder: without their mean, since states of all names point in one direction (any two of BERT have a
        cosine of 0.6 or more).
        """
        centered = states.astype(np.float64) - states.mean(0, dtype=np.float64)
        lengths = np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)
        return cls(tuple(names), np.round(centered / lengths * _NORM).astype(np.float32))

    @cached_property
    def _row(self) -> dict[frozenset[str], int]:
        return {stems(name): row for row, name in reversed(list(enumerate(self.names)))}

    def rows(self, names: Sequence[str]) -> Int[np.ndarray, " P"]:
        """The row of each name, read without determiners and plurals; -1 for a name that has none."""
        return np.array([self._row.get(stems(name), -1) for name in names], np.int64)


@dataclass(frozen=True)
class LikenessOfMeaning:
    """Likeness of a text to each of `names`: the cosine of their vectors, at least 0; 0 where one has none."""

    names: tuple[str, ...]
    vectors: NameVectors

    @cached_property
    def _own(self) -> Float32[np.ndarray, "P C"]:
        rows = self.vectors.rows(self.names)
        return np.where(rows[:, None] >= 0, self.vectors.vectors[rows], np.float32(0))

    @cached_property
    def _cache(self) -> dict[int, np.ndarray]:
        return {}

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, " P"]:
        """Per name: the maximum of its likeness to `texts`."""
        likeness = np.zeros(len(self.names), np.float32)
        for row in self.vectors.rows(texts).tolist():
            if row < 0:
                continue
            if row not in self._cache:
                if len(self._cache) >= _CACHED:
                    self._cache.clear()
                self._cache[row] = self._own @ self.vectors.vectors[row] / np.float32(_NORM**2)
            likeness = np.maximum(likeness, self._cache[row])
        return likeness


def pack(
    caption: str, texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int, rng: np.random.Generator
) -> tuple[str, int, int]:
    """The caption shuffled among those of `texts` that fit: (new text, offset of the caption in it, number of packed texts).

    Texts are tried in the given order; a text fits if its tokens, [CLS] and [SEP] included, are fewer than the tokens of `max_tokens` that are still free.
    Each part ends with ". " (glip-reference 4.6). If no text fits, the caption is returned unchanged.
    """
    left = max_tokens - len(tokenizer.encode(caption).ids)
    parts = [caption]
    for text in texts:
        cost = len(tokenizer.encode(text).ids)
        if cost < left:
            parts.append(text)
            left -= cost
    if len(parts) == 1:
        return caption, 0, 0
    packed, begin = "", 0
    for index in rng.permutation(len(parts)).tolist():
        begin = len(packed) if index == 0 else begin
        packed += parts[index] + ("" if parts[index].endswith(".") else ".") + " "
    return packed, begin, len(parts) - 1


def _parts(text: str) -> tuple[set[str], set[str]]:
    """Words and letter trigrams; the boundaries of a word count as letters."""
    words = text.lower().replace("_", " ").replace("(", " ").replace(")", " ").split()
    return set(words), {f" {word} "[i : i + 3] for word in words for i in range(len(word))}


def _shared(one: set[str], other: set[str]) -> float:
    """Jaccard index."""
    return len(one & other) / len(one | other) if one and other else 0.0
