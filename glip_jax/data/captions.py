"""Captions of training examples: category names for detection records, their own caption for grounding records.

Detection captions follow the pretraining rule of the original (glip-reference 4.2) with three corrections: the label that exceeds
the token budget does not reduce the budget of the negatives; a negative is skipped if its cleaned name equals that of a
positive; labels that do not fit are counted.

A phrase is present (it has boxes), absent (a negative), or unlabelled: the image may show it without a box. At tokens of
unlabelled phrases (`Captioned.token_loss_mask` False), anchors without a box give no loss.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from glip_jax.config import CaptionConfig
from glip_jax.data.negatives.choice import (
    Likeness,
    LikenessOfMeaning,
    NameVectors,
    choose,
    number_of_names,
    number_of_texts,
    pack,
)
from glip_jax.data.negatives.dictionary import Dictionary
from glip_jax.data.negatives.look_alikes import LookAlike, look_alike
from glip_jax.data.records import Record, RecordError
from glip_jax.structures.batch import Prompt, TokenizedPrompt
from glip_jax.structures.boxes import pairwise_iou
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
_SAME_BOX = 0.5
"""IoU from which two boxes may be of one object."""


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
    dictionary: Dictionary | None = None
    """The names of all sources, for `CaptionConfig.dictionary`."""
    complete: bool = False
    """Whether `SourceConfig.complete` is "all"."""
    vectors: NameVectors | None = None
    """For likeness by meaning; None: by letters."""
    sides: bool = False
    """Whether look-alikes may change left and right: images are neither mirrored nor cropped."""
    descriptions: Descriptions | None = None

    @cached_property
    def _guaranteed(self) -> tuple[str, ...]:
        """Names of the source, then further negatives that are not among them."""
        taken = {_normalized(name) for name in self.names}
        return self.names + tuple(dict.fromkeys(n for n in self.more_negatives if _normalized(n) not in taken))

    @cached_property
    def _all(self) -> tuple[str, ...]:
        """`_guaranteed`, then those of the dictionary that are not among them."""
        taken = {_normalized(name) for name in self._guaranteed}
        listed = self.dictionary.names if self.dictionary is not None else ()
        return self._guaranteed + tuple(name for name in listed if _normalized(name) not in taken)

    @cached_property
    def _labels_of(self) -> dict[tuple[str, ...], list[int]]:
        """Labels in `_all` by what a text encoder reads of their names."""
        found: dict[tuple[str, ...], list[int]] = {}
        for label, name in enumerate(self._all):
            found.setdefault(_normalized(name), []).append(label)
        return found

    @cached_property
    def _listed(self) -> tuple[Int[np.ndarray, " D"], Float[np.ndarray, " A"]]:
        """The label in `_all` of each name of the dictionary, and the weight of every label."""
        labels, weights = np.zeros(0, np.int64), np.zeros(len(self._all))
        if self.dictionary is not None:
            labels = np.array([self._labels_of[_normalized(name)][0] for name in self.dictionary.names], np.int64)
            weights[labels] = self.dictionary.weights
        return labels, weights

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
    def _likeness(self) -> Callable[[Sequence[str]], Float[np.ndarray, " A"]]:
        return self._likeness_to(tuple(clean_name(name) for name in self._all))

    def _likeness_to(self, names: tuple[str, ...]) -> Callable[[Sequence[str]], Float[np.ndarray, " P"]]:
        return Likeness(names) if self.vectors is None else LikenessOfMeaning(names, self.vectors)

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
        guaranteed = len(self._guaranteed)
        pool = np.arange(guaranteed)
        if absent is not None:
            known = [self._index[name] for name in absent if self._index.get(name, guaranteed) < guaranteed]
            pool = np.asarray(list(dict.fromkeys([*known, *range(len(self.names), guaranteed)])), np.int64)
        taken = {_normalized(self._all[label]) for label in (*positives, *unlabelled)}
        if empty:
            pool = np.asarray(
                [label for label in pool.tolist() if _normalized(self._all[label]) not in taken], np.int64
            )
        shown = [self._all[label] for label in (*positives, *unlabelled)]
        listed = self._absent_in_dictionary(absent, shown, named=True) if self.dictionary is not None else pool[:0]
        available = len(pool) + int((~np.isin(listed, pool)).sum() if len(listed) else 0)
        count = max(number_of_names(available, config, rng), int(empty and available > 0))
        if count:
            likeness = self._likeness_of(positives if empty else kept, taken) if config.hard_share else None
            for label in self._draw(pool, listed, count, likeness, rng):
                if _normalized(self._all[label]) in taken:
                    continue
                budget -= self._costs[label]
                if budget <= 0:
                    break
                kept.append(label)
        return (rng.permutation(kept).astype(int).tolist() if config.shuffle else sorted(kept)), over

    def _draw(
        self, pool: Int[np.ndarray, " P"], listed: Int[np.ndarray, " L"], count: int, likeness: Float[np.ndarray, " A"] | None,
        rng: np.random.Generator,
    ) -> list[int]:  # fmt: skip
        """At most `count` labels: the share `config.dictionary` of them from `listed`, by frequency, the others from `pool`."""
        hard = self.config.hard_share
        if not len(listed):
            own = None if likeness is None else likeness[pool]
            return pool[choose(own, len(pool), count, hard, rng)].tolist()
        number = min(len(listed), max(int(rng.binomial(count, self.config.dictionary)), count - len(pool)))
        own = None if likeness is None else likeness[listed]
        chosen = listed[choose(own, len(listed), number, hard, rng, self._listed[1][listed])]
        rest = pool[~np.isin(pool, chosen)]
        own = None if likeness is None else likeness[rest]
        rest = rest[choose(own, len(rest), count - len(chosen), hard, rng)]
        return rng.permutation(np.concatenate([chosen, rest])).tolist()

    def _absent_in_dictionary(
        self, absent: Sequence[str] | None, shown: Sequence[str], named: bool
    ) -> Int[np.ndarray, " L"]:
        """Labels of those names of the dictionary that are known to be absent from an image that shows what `shown` names.

        These are the names of a source with exhaustive labels (`named`), its `negatives`, what the record lists as absent, and, if the
        source's labels are complete, all others. A name that may be true of what is shown is left out: one with the same words, more or
        fewer; of another source also one whose meaning is as close as that of a synonym.
        """
        assert self.dictionary is not None
        labels, guaranteed = self._listed[0], len(self._guaranteed)
        known, stated = np.zeros(len(self._all), bool), np.zeros(len(self._all), bool)
        stated[[label for name in absent or () for label in self._labels_of.get(_normalized(name), ())]] = True
        known[: len(self.names)] = named and absent is None
        known[guaranteed:] = self.complete and absent is None
        stated[len(self.names) : guaranteed] = True
        fits = (known | stated)[labels] & ~self.dictionary.alike(shown)
        if self.vectors is not None and shown:
            synonyms = self._likeness(shown) > self.config.synonym_cosine
            synonyms[:guaranteed] = False
            fits &= ~(synonyms & ~stated)[labels]
        return labels[fits]

    def _likeness_of(self, positives: Sequence[int], taken: set[tuple[str, ...]]) -> Float[np.ndarray, " A"]:
        """Likeness of all names to the positives; 0 for names in `taken`, which are never negatives."""
        likeness = self._likeness([clean_name(self.names[label]) for label in positives])
        likeness = likeness.copy()
        likeness[[label for key in taken for label in self._labels_of[key]]] = 0
        return likeness

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
        if self._names_nothing(rng) and (absent := self._known_absent(record, rng)):
            return self._only_absent(absent, len(record.boxes), rng)
        caption, begin, packed, texts = record.caption, 0, 0, []
        if record.kind in self.config.packing.kinds:
            texts = self._texts(record, number_of_texts(self.config.packing, rng), rng)
        changed = self._look_alike(record, crop, rng)
        if changed is not None:
            texts = [changed.text, *texts]
        if texts:
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
        if changed is not None and not (self.complete and changed.everywhere):
            # Boxes of the caption do not show it; whether anything else does is unknown.
            around = ((0, begin), (begin + len(record.caption), len(caption)))
            for start in (place for part in around if (place := caption.find(changed.text, *part)) >= 0):
                part = (start, start + len(changed.text))
                unknown = self._words_without_box(caption, part, [])
                result = result._replace(token_loss_mask=result.token_loss_mask & ~unknown)
        return result

    def _look_alike(self, record: Record, crop: CropResult, rng: np.random.Generator) -> LookAlike | None:
        """A phrase of the caption with another attribute, with the probability of `look_alikes`."""
        if not self.config.look_alikes or rng.random() >= self.config.look_alikes:
            return None
        spans = tuple(dict.fromkeys((*record.spans, *record.unknown)))
        phrase_of_box = np.array([spans.index(own) for own in record.spans], np.int64)
        phrases = [" ".join(record.caption[begin:end] for begin, end in own) for own in spans]
        same = pairwise_iou(record.boxes, record.boxes) >= _SAME_BOX
        beside = [
            [phrases[other] for other in set(phrase_of_box[same[phrase_of_box == phrase].any(0)].tolist()) - {phrase}]
            for phrase in range(len(phrases))
        ]
        boxed = phrase_of_box[crop.kept].tolist()
        return look_alike(record.caption, (*phrases, *record.not_exhaustive), boxed, beside, self.sides, rng)

    def _names_nothing(self, rng: np.random.Generator) -> bool:
        """Whether the prompt is one of those without a positive."""
        return self.config.empty_probability > 0 and rng.random() < self.config.empty_probability

    def _known_absent(self, record: Record, rng: np.random.Generator) -> list[str]:
        """Names that a record with a caption knows to be absent, and that its caption does not hold; with a dictionary its share of it."""
        given = (clean_name(name) for name in (*(record.known_absent or ()), *self.more_negatives))
        names = [name for name in dict.fromkeys(given) if name.strip() and name.lower() not in record.caption.lower()]
        if self.dictionary is None:
            return names
        phrases = [" ".join(record.caption[b:e] for b, e in spans) for spans in (*record.spans, *record.unknown)]
        shown = [record.caption, *phrases, *record.not_exhaustive]
        labels, share = self._absent_in_dictionary(record.known_absent, shown, named=False), self.config.dictionary
        if share == 1 and len(labels):
            names = []
        number = round(len(names) * share / (1 - share)) if names else self.config.max_negatives
        chosen = labels[choose(None, len(labels), number, 0.0, rng, self._listed[1][labels])].tolist()
        return list(dict.fromkeys([*names, *(clean_name(self._all[label]) for label in chosen)]))

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
            pool = self._known_absent(record, rng)
        else:
            pool = [
                " ".join(other.caption[b:e] for b, e in spans)
                for other in self._sampled(count, rng)
                for spans in dict.fromkeys(other.spans)
            ]
        pool = list(dict.fromkeys(text for text in pool if text.strip() and text.lower() not in caption))
        phrases = [" ".join(record.caption[b:e] for b, e in spans) for spans in record.spans]
        like = [record.caption] if self.vectors is None else phrases
        likeness = self._likeness_to(tuple(pool))(like) if self.config.hard_share and pool else None
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
