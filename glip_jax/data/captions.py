"""Captions of training examples: category names for detection records, their own caption for grounding records.

Detection captions follow the pretraining rule of the original (glip-reference 4.2) with three corrections: the label that exceeds
the token budget does not reduce the budget of the negatives; a negative is skipped if its cleaned name equals that of a
positive; labels that do not fit are counted.

A phrase is present (it has boxes), absent (a negative), or unlabelled: the image may show it without a box. At tokens of
unlabelled phrases (`Captioned.token_loss_mask` False), anchors without a box give no loss.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from glip_jax.config import CaptionConfig
from glip_jax.data.negatives import Likeness, choose, number_of_names, number_of_texts, pack
from glip_jax.data.records import Record, RecordError
from glip_jax.structures.batch import Prompt, TokenizedPrompt
from glip_jax.structures.descriptions import Descriptions
from glip_jax.structures.prompts import (
    JoinedNames,
    Tokenizer,
    Truncation,
    clean_name,
    positive_map,
    prompt_from_categories,
    tokenize,
    words,
)

__all__ = ["Captioned", "Captioner", "CropResult", "RecordSequence", "rng_of", "says_side"]

_SIDE = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed|er|ers)?)?\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")


class Captioned(NamedTuple):
    """Text of one example."""

    prompt: Prompt
    """Phrases: the names of the caption for detection, distinct lists of spans for grounding."""
    tokens: Int32[np.ndarray, " T"]
    mask: Bool[np.ndarray, " T"]
    keep: Bool[np.ndarray, " N"]
    """False for boxes whose label is not in the caption or that the crop removed."""
    positive_map: Bool[np.ndarray, "N T"]
    """Tokens of each box of the record; all False for boxes that are not kept."""
    token_loss_mask: Bool[np.ndarray, " T"]
    """False at tokens of unlabelled phrases."""
    over_budget: int
    """Number of phrases that were truncated or left out because of the token budget."""
    without_token: int
    """Number of phrases without a token."""
    negatives: int
    """Number of negative names or packed texts in the prompt."""
    described: Int32[np.ndarray, " T"] | None = None
    """`Batch.described`; None without descriptions."""


class CropResult(NamedTuple):
    """Which boxes of a record a crop keeps."""

    kept: Bool[np.ndarray, " N"]
    """Boxes that are kept."""
    partial: Bool[np.ndarray, " N"]
    """Boxes that are removed although a part of them is still visible."""


@runtime_checkable
class RecordSequence(Protocol):
    """Records by index, as `Shards`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def rng_of(seed: int, element: int) -> np.random.Generator:
    """Random generator of one example, given the seed of the run and the index of the example in the endless stream."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, element])))


def says_side(text: str) -> bool:
    """Whether a text contains "left" or "right" as a word: "left-hand", "rightmost", "to the left", but not "upright"."""
    return _SIDE.search(text) is not None


@lru_cache(65536)
def _normalized(name: str) -> tuple[str, ...]:
    """What a text encoder reads of a name: names with equal results are the same name."""
    return words(clean_name(name))


@dataclass(frozen=True)
class Captioner:
    """Builds the captions of one source; `names` are the categories of the source."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    config: CaptionConfig
    max_tokens: int
    more_negatives: tuple[str, ...] = ()
    """`SourceConfig.negatives`."""
    others: RecordSequence | None = None
    """Records of the source, for packed captions and phrases."""
    descriptions: Descriptions | None = None

    @cached_property
    def _all(self) -> tuple[str, ...]:
        """Names of the source, then further negatives that are not among them."""
        taken = {_normalized(name) for name in self.names}
        return self.names + tuple(dict.fromkeys(n for n in self.more_negatives if _normalized(n) not in taken))

    @cached_property
    def _described(self) -> "Captioner":
        """The captioner of prompts with descriptions."""
        return replace(
            self, config=replace(self.config, descriptions=replace(self.config.descriptions, probability=1.0))
        )

    def _texts_behind(self, names: Sequence[str]) -> list[str]:
        """The descriptions that follow `names` in a prompt; "" where there is none."""
        always = self.config.descriptions.use == "prompt" and self.config.descriptions.probability == 1
        return [self.descriptions.in_prompt(name) if always and self.descriptions else "" for name in names]

    def described_costs(self) -> dict[str, int]:
        """Number of tokens of each name with its description and separator; {} where prompts have no descriptions."""
        return (
            {name: self._described._cost(name) for name in self._all}
            if self.config.descriptions.use == "prompt"
            else {}
        )

    def _cost(self, name: str) -> int:
        """Number of tokens of a name with its description and separator."""
        text = prompt_from_categories([name], descriptions=self._texts_behind([name])).caption
        return len(self.tokenizer.encode(text + self.config.separator).ids) - 2

    @cached_property
    def _costs(self) -> list[int]:
        return [self._cost(name) for name in self._all]

    @cached_property
    def _joined(self) -> JoinedNames:
        return JoinedNames(self._all, self.tokenizer, self.config.separator, self._texts_behind(self._all))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self._all)}

    @cached_property
    def _likeness(self) -> Likeness:
        return Likeness(tuple(clean_name(name) for name in self._all))

    def __call__(self, record: Record, rng: np.random.Generator, crop: CropResult | None = None) -> Captioned:
        """Prompt, tokens and positive map of `record`; names and their order are sampled with `rng`.

        `crop`: boxes that a crop keeps; None: all. Phrases that lost their last box, or a box that is partly visible, become
        unlabelled.
        """
        texts = self.config.descriptions
        if texts.use == "prompt" and texts.probability < 1 and rng.random() < texts.probability:
            return self._described(record, rng, crop)
        every = np.ones(len(record.boxes), bool)
        crop = crop or CropResult(every, ~every)
        return (self._detection if record.kind == "detection" else self._grounding)(record, rng, crop)

    def says_side(self, record: Record) -> bool:
        """Whether caption or names of the record contain "left" or "right", which a horizontal flip makes wrong."""
        return says_side(record.caption) or any(says_side(self.names[label]) for label in set(record.categories))

    def sample(
        self, positives: Sequence[int], absent: Sequence[str] | None, rng: np.random.Generator, unlabelled: Sequence[int] = (),
        empty: bool = False,
    ) -> tuple[list[int], int]:  # fmt: skip
        """Categories of a caption in their order, and the number of `positives` that did not fit.

        `absent` restricts negatives among the names of the source to these; None: no restriction. `unlabelled` labels are in
        the image without a box, so they are neither positive nor negative. `empty`: negatives alone, at least one. Positives are
        shuffled and kept while their tokens fit into max_tokens - 2; negatives while at least one token of it remains.
        """
        config, budget = self.config, self.max_tokens - 2
        kept: list[int] = []
        order = rng.permutation(np.array(sorted(set(positives)), np.int64)).tolist()
        if config.drop_positive_probability and order and rng.random() < config.drop_positive_probability:
            order = order[: int(rng.integers(1, len(order), endpoint=True))]
        order = [] if empty else order
        for label in order:
            if self._costs[label] > budget:
                break
            budget -= self._costs[label]
            kept.append(label)
        over = len(order) - len(kept)
        pool = np.arange(len(self._all))
        if absent is not None:
            known = [self._index[name] for name in absent if name in self._index]
            pool = np.asarray(list(dict.fromkeys([*known, *range(len(self.names), len(self._all))])), np.int64)
        taken = {_normalized(self.names[label]) for label in (*positives, *unlabelled)}
        if empty:
            pool = np.asarray(
                [label for label in pool.tolist() if _normalized(self._all[label]) not in taken], np.int64
            )
        count = max(number_of_names(len(pool), config, rng), int(empty and len(pool) > 0))
        if count:
            likeness = self._likeness_of(positives if empty else kept, pool, taken) if config.hard_share else None
            for label in pool[choose(likeness, len(pool), count, config.hard_share, rng)].tolist():
                if _normalized(self._all[label]) in taken:
                    continue
                budget -= self._costs[label]
                if budget <= 0:
                    break
                kept.append(label)
        return (rng.permutation(kept).astype(int).tolist() if config.shuffle else sorted(kept)), over

    def _likeness_of(
        self, positives: Sequence[int], pool: Int[np.ndarray, " P"], taken: set[tuple[str, ...]]
    ) -> Float[np.ndarray, " P"]:
        """Likeness of the names in `pool` to the positives; 0 for names in `taken`, which are never negatives."""
        likeness = self._likeness([clean_name(self.names[label]) for label in positives])[pool]
        return np.where([_normalized(self._all[label]) in taken for label in pool.tolist()], 0, likeness)

    def _detection(self, record: Record, rng: np.random.Generator, crop: CropResult) -> Captioned:
        labels = np.asarray(record.categories, np.int64)
        positives = set(labels[crop.kept].tolist())
        unlabelled = set(labels[crop.partial].tolist()) | {
            self._index[name] for name in record.not_exhaustive if name in self._index
        }
        removed = set(labels.tolist()) - positives
        if self.config.mode == "all_names":
            order, over = list(range(len(self.names))), 0
            if self.config.shuffle:
                order = rng.permutation(order).astype(int).tolist()
            present = {_normalized(self.names[label]) for label in positives}
            unlabelled |= removed | {i for i in order if i not in positives and _normalized(self.names[i]) in present}
            if record.known_absent is not None:
                unlabelled |= set(order) - positives - {self._index[n] for n in record.known_absent if n in self._index}
        else:
            given = sorted(positives), record.known_absent, rng, sorted(removed | unlabelled)
            empty = self._names_nothing(rng)
            order, over = self.sample(*given, empty)
            if empty and not order:  # no name is known to be absent
                order, over = self.sample(*given)
        phrase_of = {label: phrase for phrase, label in enumerate(order)}
        texts = self._joined.tokenize(order, self.max_tokens)
        phrases = [phrase_of.get(label, -1) if kept else -1 for label, kept in zip(labels.tolist(), crop.kept)]
        without_loss = [phrase_of[label] for label in sorted(unlabelled) if label in phrase_of]
        return self._finish(*texts, phrases, without_loss, over, len(set(order) - positives))

    def _grounding(self, record: Record, rng: np.random.Generator, crop: CropResult) -> Captioned:
        if self._names_nothing(rng) and (absent := self._known_absent(record)):
            return self._only_absent(absent, len(record.boxes), rng)
        caption, begin, packed = record.caption, 0, 0
        if record.kind in self.config.packing.kinds:
            texts = self._texts(record, number_of_texts(self.config.packing, rng), rng)
            caption, begin, packed = pack(caption, texts, self.tokenizer, self.max_tokens, rng)
        shifted = [tuple((b + begin, e + begin) for b, e in spans) for spans in (*record.spans, *record.unknown)]
        phrases = tuple(dict.fromkeys(shifted))
        phrase_of_box = [phrases.index(spans) for spans in shifted[: len(record.spans)]]
        partial = {name.lower() for name in record.not_exhaustive}
        unlabelled = [
            phrase
            for phrase, spans in enumerate(phrases)
            if not any(kept and of_box == phrase for of_box, kept in zip(phrase_of_box, crop.kept))
            or any(part and of_box == phrase for of_box, part in zip(phrase_of_box, crop.partial))
            or (partial and " ".join(caption[b:e] for b, e in spans).lower() in partial)
        ]
        kept_phrases = [phrase if kept else -1 for phrase, kept in zip(phrase_of_box, crop.kept)]
        prompt = Prompt(caption, phrases)
        texts = tokenize(prompt, self.tokenizer, self.max_tokens, truncate=True)
        result = self._finish(prompt, *texts, kept_phrases, unlabelled, 0, packed)
        if self.config.words_without_box == "unknown":
            without_box = self._words_without_box(caption, (begin, begin + len(record.caption)), phrases)
            result = result._replace(token_loss_mask=result.token_loss_mask & ~without_box)
        return result

    def _names_nothing(self, rng: np.random.Generator) -> bool:
        """Whether the prompt is one of those without a positive."""
        return self.config.empty_probability > 0 and rng.random() < self.config.empty_probability

    def _known_absent(self, record: Record) -> list[str]:
        """Names that a record with a caption knows to be absent, and that its caption does not hold."""
        names = (clean_name(name) for name in (*(record.known_absent or ()), *self.more_negatives))
        return list(
            dict.fromkeys(name for name in names if name.strip() and name.lower() not in record.caption.lower())
        )

    def _only_absent(self, absent: Sequence[str], boxes: int, rng: np.random.Generator) -> Captioned:
        """A prompt of some of the names `absent`, as many as fit; none of the record's `boxes` is kept."""
        count, budget = max(1, number_of_names(len(absent), self.config, rng)), self.max_tokens - 2
        names: list[str] = []
        for index in rng.permutation(len(absent))[:count].tolist():
            name = absent[int(index)]
            budget -= self._cost(name)
            if names and budget < 0:
                break
            names.append(name)
        prompt = prompt_from_categories(names, self.config.separator, self._texts_behind(names))
        texts = tokenize(prompt, self.tokenizer, self.max_tokens, truncate=True)
        return self._finish(prompt, *texts, [-1] * boxes, [], 0, len(names))

    def _texts(self, record: Record, count: int, rng: np.random.Generator) -> list[str]:
        """Candidates of negative texts for a caption, in order; none of them is part of the caption."""
        if not count:
            return []
        caption = record.caption.lower()
        if self.config.packing.take == "captions":
            captions = [other.caption for other in self._sampled(count, rng)]
            return [text for text in captions if text.strip() and text.lower() != caption]
        if self.config.packing.take == "names":
            pool = self._known_absent(record)
        else:
            pool = [
                " ".join(other.caption[b:e] for b, e in spans)
                for other in self._sampled(count, rng)
                for spans in dict.fromkeys(other.spans)
            ]
        pool = list(dict.fromkeys(text for text in pool if text.strip() and text.lower() not in caption))
        likeness = Likeness(tuple(pool))([record.caption]) if self.config.hard_share and pool else None
        return [pool[i] for i in choose(likeness, len(pool), count, self.config.hard_share, rng)]

    def _sampled(self, count: int, rng: np.random.Generator) -> list[Record]:
        """`count` random records of the source; their images are not decoded.

        Corrupt records are skipped: they are counted when they are the example themselves.
        """
        assert self.others is not None, "packing needs the source's records"
        records = []
        for index in rng.integers(0, len(self.others), count).tolist():
            try:
                records.append(self.others[index])
            except RecordError:
                continue
        return records

    def _words_without_box(
        self, caption: str, part: tuple[int, int], phrases: Sequence[Sequence[tuple[int, int]]]
    ) -> np.ndarray:
        """Bool[T]: tokens of words in the characters `part` (begin, end) that no phrase covers; punctuation is no word."""
        covered = np.zeros(len(caption), bool)
        for begin, end in (span for spans in phrases for span in spans):
            covered[begin:end] = True
        words = [
            match.span() for match in _WORD.finditer(caption, *part) if not covered[match.start() : match.end()].any()
        ]
        offsets = np.asarray(self.tokenizer.encode(caption).offsets, np.int32).reshape(-1, 2)[: self.max_tokens]
        result = np.zeros(self.max_tokens, bool)
        result[: len(offsets)] = positive_map(offsets, [words])[0]
        return result

    def _finish(
        self, prompt: Prompt, tokenized: TokenizedPrompt, losses: Truncation, phrases: list[int], unlabelled: list[int], over: int,
        negatives: int,
    ) -> Captioned:  # fmt: skip
        """`phrases`: phrase of each box, -1 for none; `unlabelled`: phrases without loss at anchors without a box."""
        index = np.asarray(phrases, np.int64)
        keep = index >= 0
        rows = np.zeros((len(index), self.max_tokens), bool)
        rows[keep] = tokenized.phrase_map[index[keep]]
        loss_mask = ~tokenized.phrase_map[unlabelled].any(0)
        return Captioned(
            prompt, tokenized.tokens, tokenized.mask, keep, rows, loss_mask, over + losses.cut, losses.without_token, negatives,
            None if self.descriptions is None else self.descriptions.token_rows(prompt, tokenized),
        )  # fmt: skip
