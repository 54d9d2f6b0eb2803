"""Records become prompts: detection records get a caption of category names, grounding records keep theirs.

The rule for detection is the original's for pretraining (glip-reference 4.2), corrected in three places: the label that
overflows the budget does not count against the negatives; a negative whose cleaned name equals a positive's is not
drawn, as the caption would contradict itself; labels with text left over are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from glip_jax.config import CaptionConfig
from glip_jax.data.records import Record
from glip_jax.prompts import Tokenizer, clean_name, prompt_from_categories, tokenize
from glip_jax.structures import Prompt

__all__ = ["Captioned", "Captioner", "rng_of"]


class Captioned(NamedTuple):
    """The text side of one example."""

    prompt: Prompt
    """Detection: one phrase per name in the caption. Grounding: one per distinct list of spans."""
    tokens: Int32[np.ndarray, "T"]
    mask: Bool[np.ndarray, "T"]
    keep: Bool[np.ndarray, "N"]
    """Boxes that stay: False where the box's label did not fit into the budget."""
    positive_map: Bool[np.ndarray, "N T"]
    """Tokens of each box of the record, also of those not kept (all False)."""
    over_budget: int
    """Phrases (labels) cut or left out for want of tokens."""
    without_token: int
    """Phrases that have no token at all."""


def rng_of(seed: int, element: int) -> np.random.Generator:
    """The random numbers of one example: a function of the run's seed and the example's index in the endless stream."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, element])))


@dataclass(frozen=True)
class Captioner:
    """Makes the captions of one source; `names` is the source's list of category names."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    config: CaptionConfig
    max_tokens: int

    @cached_property
    def _costs(self) -> list[int]:
        """Tokens of each name with its separator."""
        return [len(self.tokenizer.encode(clean_name(n) + self.config.separator).ids) - 2 for n in self.names]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def __call__(self, record: Record, rng: np.random.Generator) -> Captioned:
        """Prompt, tokens and positive map of `record`; `rng` decides what is sampled and in which order."""
        if record.kind == "detection":
            return self._detection(record, rng)
        phrases = tuple(dict.fromkeys(record.spans))
        return self._finish(Prompt(record.caption, phrases), [phrases.index(spans) for spans in record.spans], 0)

    def sample(
        self, positives: Sequence[int], absent: Sequence[str] | None, rng: np.random.Generator
    ) -> tuple[list[int], int]:
        """The categories of a caption in their order, and how many of `positives` did not fit.

        `absent` restricts negatives to these names; None: all names. Positives are shuffled and kept while their
        tokens stay within max_tokens - 2; negatives while more than nothing of it remains.
        """
        config, budget = self.config, self.max_tokens - 2
        kept: list[int] = []
        for label in rng.permutation(np.unique(np.asarray(positives, np.int64))).tolist():
            if self._costs[label] > budget:
                break
            budget -= self._costs[label]
            kept.append(label)
        over = len(set(positives)) - len(kept)
        pool = range(len(self.names)) if absent is None else [self._index[n] for n in absent if n in self._index]
        most = min(config.max_negatives, len(pool))
        if most > 0:
            full = rng.random() < config.full_probability
            count = most if full else min(int(rng.integers(1, config.max_negatives, endpoint=True)), most)
            taken = {clean_name(self.names[label]) for label in positives}
            for label in np.asarray(pool)[rng.permutation(len(pool))[:count]].tolist():
                if clean_name(self.names[label]) in taken:
                    continue
                budget -= self._costs[label]
                if budget <= 0:
                    break
                kept.append(label)
        return (rng.permutation(kept).astype(int).tolist() if config.shuffle else sorted(kept)), over

    def _detection(self, record: Record, rng: np.random.Generator) -> Captioned:
        order, over = self.sample(record.categories, record.known_absent, rng)
        phrase_of = {label: phrase for phrase, label in enumerate(order)}
        prompt = prompt_from_categories([self.names[label] for label in order], self.config.separator)
        return self._finish(prompt, [phrase_of.get(label, -1) for label in record.categories], over)

    def _finish(self, prompt: Prompt, phrases: list[int], over: int) -> Captioned:
        """Tokenizes; `phrases` gives each box's phrase, -1 for none."""
        tokenized, losses = tokenize(prompt, self.tokenizer, self.max_tokens, truncate=True)
        index = np.asarray(phrases, np.int64)
        keep = index >= 0
        rows = np.zeros((len(index), self.max_tokens), bool)
        rows[keep] = tokenized.phrase_map[index[keep]]
        return Captioned(prompt, tokenized.tokens, tokenized.mask, keep, rows, over + losses.cut, losses.without_token)
