"""The negative dictionary: the names of all sources with their frequencies, and which of them may be true of what an image shows.

Detection sources give the names of their manifest, sources with captions the phrases that have boxes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
from jaxtyping import Bool, Float32

from glip_jax.data.records import Record, RecordError
from glip_jax.data.shards import Shards
from glip_jax.structures.prompts import Tokenizer, clean_name, unread_names, words

__all__ = ["DETERMINERS", "Dictionary", "dictionary", "stems"]

_SAMPLED = 1024
"""Records of a source whose boxes are counted, evenly spaced: reading all would take as long as an epoch."""
_READERS = 16
_MOST_WORDS = 3
"""Longer phrases are descriptions of one image ("the man who holds a red umbrella")."""
_POWER = 0.5
"""Weight of a name: its number of boxes among the sampled records, plus one, to this power. 1: by frequency, 0: uniform."""

DETERMINERS = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "both", "all", "several", "many", "few", "more",
    "most", "other", "another", "such", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "his", "her", "its",
    "their", "my", "your", "our",
))  # fmt: skip
"""Words at the begin of a phrase that are no part of the thing's name, numbers among them."""
_PRONOUNS = frozenset((
    "it", "they", "them", "he", "him", "she", "i", "me", "we", "us", "you", "who", "whom", "which", "what", "where", "there", "here",
    "everyone", "everything", "someone", "something", "anyone", "anything", "nobody", "nothing", "none", "himself", "herself", "itself",
    "themselves", "left", "right", "smaller", "smallest", "bigger", "biggest", "larger", "largest",
))  # fmt: skip
"""Phrases with one of these name nothing, or compare or place something in their own image."""
_SINGULAR = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "mice": "mouse", "oxen": "ox", "dice": "die",
}  # fmt: skip


@lru_cache(65536)
def stems(text: str) -> frozenset[str]:
    """The words of a text without determiners and numbers, a plural as its singular: "Two red apples" and "the red apple" are equal."""
    return frozenset(_stem(word) for word in words(clean_name(text)) if word.isalnum() and word not in DETERMINERS)


def _stem(word: str) -> str:
    """One form of singular and plural (boxes, knives, berries and cookies too); not always a word."""
    word = _SINGULAR.get(word, word)
    if word.endswith("men"):
        return word[:-2] + "an"
    if len(word) > 3 and not word.endswith(("ss", "us", "is")):
        word = word.removesuffix("s")
    word = word.removesuffix("e") if len(word) > 3 else word
    return word[:-1] + {"y": "i", "v": "f"}.get(word[-1], word[-1])


@dataclass(frozen=True)
class Dictionary:
    """Distinct names in a fixed order."""

    names: tuple[str, ...]
    """As they stand in a prompt."""
    weights: Float32[np.ndarray, " D"]
    """Relative probability of each."""
    left_out: int = 0
    """Number of different phrases and names that are not in it: a phrase of more than three words or with a pronoun, or what the
    vocabulary or the token budget cannot take."""

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([len(stems(name)) for name in self.names], np.int64)

    @cached_property
    def _with_stem(self) -> dict[str, np.ndarray]:
        """Indices of the names with each word stem."""
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            for stem in stems(name):
                found.setdefault(stem, []).append(index)
        return {stem: np.array(indices) for stem, indices in found.items()}

    def alike(self, texts: Iterable[str]) -> Bool[np.ndarray, " D"]:
        """Names that may be true of what a text says: with the same words, more words or fewer ("black cat" and "cat")."""
        result = np.zeros(len(self.names), bool)
        for text in set(texts):
            own = stems(text)
            if found := [self._with_stem[stem] for stem in own if stem in self._with_stem]:
                shared = np.bincount(np.concatenate(found), minlength=len(self.names))
                result |= (shared == len(own)) | ((shared > 0) & (shared == self._sizes))
        return result


def dictionary(sources: Sequence[Shards], tokenizer: Tokenizer, separator: str, max_tokens: int) -> Dictionary:
    """The dictionary of `sources`. Reads up to 1,024 records of each; corrupt ones are passed over, as examples count them."""
    boxes: Counter[str] = Counter()
    left_out: set[str] = set()
    for shards in sources:
        names = [clean_name(name).strip() for name in shards.manifest.names]
        boxes.update(dict.fromkeys(names, 0))
        indices = np.unique(np.linspace(0, len(shards) - 1, _SAMPLED).astype(int)).tolist()
        with ThreadPoolExecutor(_READERS) as pool:
            records = [record for record in pool.map(partial(_read, shards), indices) if record is not None]
        boxes.update(names[label] for record in records for label in record.categories)
        phrases = Counter(phrase for record in records for phrase in _phrases(record))
        named = {phrase: _name(phrase) for phrase in phrases}
        left_out |= {phrase for phrase, name in named.items() if not name}
        for phrase, name in named.items():
            boxes.update({name: phrases[phrase]} if name else {})
    # Names of equal words are one, also in singular and plural: the first, which is one of a manifest where there is any.
    first: dict[frozenset[str], str] = {}
    merged: Counter[str] = Counter()
    for name, count in boxes.items():
        merged.update({first.setdefault(stems(name), name): count})
    unread = unread_names(list(merged), tokenizer)
    too_long = [name for name in merged if len(tokenizer.encode(name + separator).ids) > max_tokens]
    left_out |= {*unread, *too_long} - {""}
    kept = sorted(set(merged) - {*unread, *too_long})
    weights = (1 + np.array([merged[name] for name in kept], np.float32)) ** _POWER
    return Dictionary(tuple(kept), weights.astype(np.float32), len(left_out))


def _read(shards: Shards, index: int) -> Record | None:
    try:
        return shards[index]
    except RecordError:
        return None


def _phrases(record: Record) -> list[str]:
    """The phrase of each box."""
    return [" ".join(record.caption[begin:end] for begin, end in spans) for spans in record.spans]


def _name(phrase: str) -> str:
    """A phrase as a name: in lower case, without the determiners at its begin; "" if it is none."""
    parts = clean_name(phrase).lower().split()
    while parts and parts[0] in DETERMINERS:
        del parts[0]
    if len(parts) > _MOST_WORDS or any(part in _PRONOUNS or part in DETERMINERS for part in parts):
        return ""
    return " ".join(parts) if stems(" ".join(parts)) else ""
