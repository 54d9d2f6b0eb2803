"""Negatives of captions: number and choice of names that are absent from the image, and packing of texts around a caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from glip_jax.config import CaptionConfig, PackingConfig
from glip_jax.structures.prompts import Tokenizer

__all__ = ["Likeness", "choose", "number_of_names", "number_of_texts", "pack"]

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
    likeness: Float[np.ndarray, " P"] | None, available: int, count: int, hard_share: float, rng: np.random.Generator
) -> list[int]:
    """At most `count` distinct indices below `available`, in random order.

    The fraction `hard_share` of them is sampled from the indices of highest positive `likeness`, twice as many as needed.
    """
    if likeness is None or hard_share <= 0:
        return rng.permutation(available)[:count].tolist()
    similar = np.argsort(-likeness, kind="stable")[: 2 * round(hard_share * count)]
    similar = similar[likeness[similar] > 0]
    hard = rng.permutation(similar)[: round(hard_share * count)]
    rest = rng.permutation(np.setdiff1d(np.arange(available), hard))[: max(0, count - len(hard))]
    return rng.permutation(np.concatenate([hard, rest]).astype(np.int64)).tolist()


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
