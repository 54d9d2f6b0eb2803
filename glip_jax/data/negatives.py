"""What a caption says that is not in the image: how many names, which ones, and text packed beside a caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from glip_jax.config import CaptionConfig, PackingConfig
from glip_jax.structures.prompts import Tokenizer

__all__ = ["Likeness", "choose", "number_of_names", "number_of_texts", "pack"]

_REMEMBERED = 4096
"""Positives whose likeness to a list of names is kept."""


def number_of_names(available: int, config: CaptionConfig, rng: np.random.Generator) -> int:
    """How many of `available` negative names to draw (CONTROL_PROB of the original, glip-reference 4.2 step 3).

    The original draws a number of positives as well and never uses it; so does nothing here.
    """
    most = min(config.max_negatives, available)
    if most <= 0:
        return 0
    number = rng.random()
    for probability, count in (
        (config.one_negative_probability, 1),
        (config.one_positive_probability, 0),
        (config.full_probability, most),
    ):
        if number < probability:
            return count
        number -= probability
    return int(rng.integers(1, most, endpoint=True))


def number_of_texts(config: PackingConfig, rng: np.random.Generator) -> int:
    """How many texts to pack with a caption (glip-reference 4.6)."""
    if not config.number or rng.random() < config.none_probability:
        return 0
    if rng.random() < config.full_probability:
        return config.number
    return int(rng.integers(0, config.number))


def choose(
    likeness: Float[np.ndarray, " P"] | None, available: int, count: int, hard_share: float, rng: np.random.Generator
) -> list[int]:
    """`count` of the indices below `available` in random order, without repetition, fewer if there are not so many.

    A share of them, `hard_share`, is drawn from twice as many that are most alike (`likeness` above 0).
    """
    if likeness is None or hard_share <= 0:
        return rng.permutation(available)[:count].tolist()
    alike = np.argsort(-likeness, kind="stable")[: 2 * round(hard_share * count)]
    alike = alike[likeness[alike] > 0]
    hard = rng.permutation(alike)[: round(hard_share * count)]
    rest = rng.permutation(np.setdiff1d(np.arange(available), hard))[: max(0, count - len(hard))]
    return rng.permutation(np.concatenate([hard, rest]).astype(np.int64)).tolist()


@dataclass(frozen=True)
class Likeness:
    """How alike the words of any text are to each of `names`: shared words, then shared runs of three letters.

    The sum of two Jaccard indices, 0 to 2; "traffic light" is like "traffic sign" and "trafficker", not like "dog".
    """

    names: tuple[str, ...]

    @cached_property
    def _parts(self) -> list[tuple[set[str], set[str]]]:
        return [_parts(name) for name in self.names]

    @cached_property
    def _known(self) -> dict[str, np.ndarray]:
        return {}

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, " P"]:
        """Per name, the likeness to the nearest of `texts`."""
        found = np.zeros(len(self.names), np.float32)
        for text in texts:
            if text not in self._known:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                words, runs = _parts(text)
                rows = [_shared(words, other) + _shared(runs, others) for other, others in self._parts]
                self._known[text] = np.array(rows, np.float32)
            found = np.maximum(found, self._known[text])
        return found


def pack(
    caption: str, texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int, rng: np.random.Generator
) -> tuple[str, int, int]:
    """The caption among those of `texts` that fit: new text, where the caption begins in it, how many were packed.

    Texts are tried in the given order; each costs its tokens, [CLS] and [SEP] included, of what `max_tokens` leaves
    beside the caption. All are shuffled; each ends with "." and a space follows (glip-reference 4.6). Without texts the
    caption stays as it is. Positions are counted, not searched, so equal texts do no harm.
    """
    left = max_tokens - len(tokenizer.encode(caption).ids)
    taken = [caption]
    for text in texts:
        cost = len(tokenizer.encode(text).ids)
        if cost < left:
            taken.append(text)
            left -= cost
    if len(taken) == 1:
        return caption, 0, 0
    packed, begin = "", 0
    for index in rng.permutation(len(taken)).tolist():
        begin = len(packed) if index == 0 else begin
        packed += taken[index] + ("" if taken[index].endswith(".") else ".") + " "
    return packed, begin, len(taken) - 1


def _parts(text: str) -> tuple[set[str], set[str]]:
    """Words and runs of three letters; a word's ends count as letters."""
    words = text.lower().replace("_", " ").replace("(", " ").replace(")", " ").split()
    return set(words), {f" {word} "[i : i + 3] for word in words for i in range(len(word))}


def _shared(one: set[str], other: set[str]) -> float:
    """Jaccard index."""
    return len(one & other) / len(one | other) if one and other else 0.0
