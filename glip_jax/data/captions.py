"""Records become prompts: detection records get a caption of category names, grounding records keep theirs.

The rule for detection is the original's for pretraining (glip-reference 4.2), corrected in three places: the label that
overflows the budget does not count against the negatives; a negative whose cleaned name equals a positive's is not
drawn, as the caption would contradict itself; labels with text left over are counted.

What a caption says is present, absent or unknown. At tokens of what is unknown (`Captioned.token_loss_mask` False) a
place without a box is no evidence, and gives no loss.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from glip_jax.config import CaptionConfig
from glip_jax.data.negatives import Likeness, choose, number_of_names, number_of_texts, pack
from glip_jax.data.records import Record, RecordError
from glip_jax.structures.batch import Prompt, TokenizedPrompt
from glip_jax.structures.prompts import JoinedNames, Losses, Tokenizer, clean_name, positive_map, tokenize

__all__ = ["Captioned", "Captioner", "Others", "View", "rng_of", "says_side"]

_SIDE = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed|er|ers)?)?\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")


class Captioned(NamedTuple):
    """The text side of one example."""

    prompt: Prompt
    """Detection: one phrase per name in the caption. Grounding: one per distinct list of spans."""
    tokens: Int32[np.ndarray, "T"]
    mask: Bool[np.ndarray, "T"]
    keep: Bool[np.ndarray, "N"]
    """Boxes that stay: False where the box's label is not in the caption, or where the box was out of view."""
    positive_map: Bool[np.ndarray, "N T"]
    """Tokens of each box of the record, also of those not kept (all False)."""
    token_loss_mask: Bool[np.ndarray, "T"]
    """False at tokens of what is unknown."""
    over_budget: int
    """Phrases (labels) cut or left out for want of tokens."""
    without_token: int
    """Phrases that have no token at all."""
    negatives: int
    """Names, phrases or captions in the prompt that are not of the image."""


class View(NamedTuple):
    """What a crop left of a record's boxes."""

    shown: Bool[np.ndarray, "N"]
    """Boxes that stay."""
    traces: Bool[np.ndarray, "N"]
    """Boxes that went although something of them can still be seen."""


@runtime_checkable
class Others(Protocol):
    """The records of a source, by index: its `Shards`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def rng_of(seed: int, element: int) -> np.random.Generator:
    """The random numbers of one example: a function of the run's seed and the example's index in the endless stream."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, element])))


def says_side(text: str) -> bool:
    """Whether a text says left or right as words: "left-hand", "rightmost" and "to the left" do, "upright" does not."""
    return _SIDE.search(text) is not None


@lru_cache(65536)
def _read(name: str) -> str:
    """A name as it reads in a caption: names that differ in nothing but this are one."""
    return clean_name(name).strip().lower()


@dataclass(frozen=True)
class Captioner:
    """Makes the captions of one source; `names` is the source's list of category names."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    config: CaptionConfig
    max_tokens: int
    more_negatives: tuple[str, ...] = ()
    """`SourceConfig.negatives`."""
    others: Others | None = None
    """Where packed captions and phrases come from."""

    @cached_property
    def _all(self) -> tuple[str, ...]:
        """The source's names, then the further negatives that do not read like one of them."""
        taken = {_read(name) for name in self.names}
        return self.names + tuple(dict.fromkeys(n for n in self.more_negatives if _read(n) not in taken))

    @cached_property
    def _costs(self) -> list[int]:
        """Tokens of each name with its separator."""
        return [len(self.tokenizer.encode(clean_name(n) + self.config.separator).ids) - 2 for n in self._all]

    @cached_property
    def _joined(self) -> JoinedNames:
        return JoinedNames(self._all, self.tokenizer, self.config.separator)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self._all)}

    @cached_property
    def _likeness(self) -> Likeness:
        return Likeness(tuple(clean_name(name) for name in self._all))

    def __call__(self, record: Record, rng: np.random.Generator, view: View | None = None) -> Captioned:
        """Prompt, tokens and positive map of `record`; `rng` decides what is sampled and in which order.

        `view`: which boxes a crop left; None: all. What lost its last box, or one of which traces are left, is unknown.
        """
        every = np.ones(len(record.boxes), bool)
        view = view or View(every, ~every)
        return (self._detection if record.kind == "detection" else self._grounding)(record, rng, view)

    def says_side(self, record: Record) -> bool:
        """Whether a mirrored picture would make the record's own caption or names wrong."""
        return says_side(record.caption) or any(says_side(self.names[label]) for label in set(record.categories))

    def sample(
        self,
        positives: Sequence[int],
        absent: Sequence[str] | None,
        rng: np.random.Generator,
        unseen: Sequence[int] = (),
    ) -> tuple[list[int], int]:
        """The categories of a caption in their order, and how many of `positives` did not fit.

        `absent` restricts negatives of the source's names to these; None: all of them. `unseen` labels are in the image
        without a box, so they are neither. Positives are shuffled and kept while their tokens stay within
        max_tokens - 2; negatives while more than nothing of it remains.
        """
        config, budget = self.config, self.max_tokens - 2
        kept: list[int] = []
        order = rng.permutation(np.array(sorted(set(positives)), np.int64)).tolist()
        if config.drop_positive_probability and order and rng.random() < config.drop_positive_probability:
            order = order[: int(rng.integers(1, len(order), endpoint=True))]
        for label in order:
            if self._costs[label] > budget:
                break
            budget -= self._costs[label]
            kept.append(label)
        over = len(order) - len(kept)
        pool = np.arange(len(self._all))
        if absent is not None:
            own = [self._index[name] for name in absent if name in self._index]
            pool = np.asarray(list(dict.fromkeys([*own, *range(len(self.names), len(self._all))])), np.int64)
        count = number_of_names(len(pool), config, rng)
        if count:
            taken = {_read(self.names[label]) for label in (*positives, *unseen)}
            alike = self._alike(kept, pool, taken) if config.hard_share else None
            for label in pool[choose(alike, len(pool), count, config.hard_share, rng)].tolist():
                if _read(self._all[label]) in taken:
                    continue
                budget -= self._costs[label]
                if budget <= 0:
                    break
                kept.append(label)
        return (rng.permutation(kept).astype(int).tolist() if config.shuffle else sorted(kept)), over

    def _alike(self, positives: Sequence[int], pool: Int[np.ndarray, "P"], taken: set[str]) -> Float[np.ndarray, "P"]:
        """Likeness of the names in `pool` to the positives; 0 for those that are `taken` and so never negatives."""
        alike = self._likeness([clean_name(self.names[label]) for label in positives])[pool]
        return np.where([_read(self._all[label]) in taken for label in pool.tolist()], 0, alike)

    def _detection(self, record: Record, rng: np.random.Generator, view: View) -> Captioned:
        labels = np.asarray(record.categories, np.int64)
        positives = set(labels[view.shown].tolist())
        unclear = set(labels[view.traces].tolist()) | {
            self._index[name] for name in record.not_exhaustive if name in self._index
        }
        gone = set(labels.tolist()) - positives
        if self.config.mode == "all_names":
            order, over = list(range(len(self.names))), 0
            if self.config.shuffle:
                order = rng.permutation(order).astype(int).tolist()
            read = {_read(self.names[label]) for label in positives}
            unclear |= gone | {i for i in order if i not in positives and _read(self.names[i]) in read}
            if record.known_absent is not None:
                unclear |= set(order) - positives - {self._index[n] for n in record.known_absent if n in self._index}
        else:
            order, over = self.sample(sorted(positives), record.known_absent, rng, sorted(gone | unclear))
        phrase_of = {label: phrase for phrase, label in enumerate(order)}
        texts = self._joined.tokenize(order, self.max_tokens)
        phrases = [phrase_of.get(label, -1) if shown else -1 for label, shown in zip(labels.tolist(), view.shown)]
        unknown = [phrase_of[label] for label in sorted(unclear) if label in phrase_of]
        return self._finish(*texts, phrases, unknown, over, len(set(order) - positives))

    def _grounding(self, record: Record, rng: np.random.Generator, view: View) -> Captioned:
        caption, begin, packed = record.caption, 0, 0
        if record.kind in self.config.packing.kinds:
            texts = self._texts(record, number_of_texts(self.config.packing, rng), rng)
            caption, begin, packed = pack(caption, texts, self.tokenizer, self.max_tokens, rng)
        listed = (*record.spans, *record.unknown)
        moved = [tuple((b + begin, e + begin) for b, e in spans) for spans in listed]
        phrases = tuple(dict.fromkeys(moved))
        numbers = [phrases.index(spans) for spans in moved[: len(record.spans)]]
        partial = {name.lower() for name in record.not_exhaustive}
        unknown = [
            number
            for number, spans in enumerate(phrases)
            if not any(shown and own == number for own, shown in zip(numbers, view.shown))
            or any(trace and own == number for own, trace in zip(numbers, view.traces))
            or (partial and " ".join(caption[b:e] for b, e in spans).lower() in partial)
        ]
        shown = [number if there else -1 for number, there in zip(numbers, view.shown)]
        prompt = Prompt(caption, phrases)
        texts = tokenize(prompt, self.tokenizer, self.max_tokens, truncate=True)
        result = self._finish(prompt, *texts, shown, unknown, 0, packed)
        if self.config.words_without_box == "unknown":
            own = self._without_box(caption, (begin, begin + len(record.caption)), phrases)
            result = result._replace(token_loss_mask=result.token_loss_mask & ~own)
        return result

    def _texts(self, record: Record, count: int, rng: np.random.Generator) -> list[str]:
        """Negative texts for a caption in the order in which they are tried; none says what the caption says."""
        if not count:
            return []
        caption = record.caption.lower()
        if self.config.packing.take == "captions":
            captions = [other.caption for other in self._drawn(count, rng)]
            return [text for text in captions if text.strip() and text.lower() != caption]
        if self.config.packing.take == "names":
            pool = [clean_name(name) for name in (*(record.known_absent or ()), *self.more_negatives)]
        else:
            pool = [
                " ".join(other.caption[b:e] for b, e in spans)
                for other in self._drawn(count, rng)
                for spans in dict.fromkeys(other.spans)
            ]
        pool = list(dict.fromkeys(text for text in pool if text.strip() and text.lower() not in caption))
        alike = Likeness(tuple(pool))([record.caption]) if self.config.hard_share and pool else None
        return [pool[i] for i in choose(alike, len(pool), count, self.config.hard_share, rng)]

    def _drawn(self, count: int, rng: np.random.Generator) -> list[Record]:
        """Other records of the source, as the example's random numbers say; their images are not decoded.

        One that cannot be read is passed over: it is counted where it is itself the example.
        """
        assert self.others is not None, "packing needs the source's records"
        found = []
        for index in rng.integers(0, len(self.others), count).tolist():
            try:
                found.append(self.others[index])
            except RecordError:
                continue
        return found

    def _without_box(
        self, caption: str, own: tuple[int, int], phrases: Sequence[Sequence[tuple[int, int]]]
    ) -> np.ndarray:
        """Bool[T]: tokens of words in the characters `own` that no phrase covers; punctuation is nobody's name."""
        covered = np.zeros(len(caption), bool)
        for begin, end in (span for spans in phrases for span in spans):
            covered[begin:end] = True
        words = [
            match.span() for match in _WORD.finditer(caption, *own) if not covered[match.start() : match.end()].any()
        ]
        offsets = np.asarray(self.tokenizer.encode(caption).offsets, np.int32).reshape(-1, 2)[: self.max_tokens]
        result = np.zeros(self.max_tokens, bool)
        result[: len(offsets)] = positive_map(offsets, [words])[0]
        return result

    def _finish(
        self,
        prompt: Prompt,
        tokenized: TokenizedPrompt,
        losses: Losses,
        phrases: list[int],
        unknown: list[int],
        over: int,
        negatives: int,
    ) -> Captioned:
        """`phrases` gives each box's phrase, -1 for none; `unknown` phrases give no loss without a box."""
        index = np.asarray(phrases, np.int64)
        keep = index >= 0
        rows = np.zeros((len(index), self.max_tokens), bool)
        rows[keep] = tokenized.phrase_map[index[keep]]
        known = ~tokenized.phrase_map[unknown].any(0)
        return Captioned(
            prompt,
            tokenized.tokens,
            tokenized.mask,
            keep,
            rows,
            known,
            over + losses.cut,
            losses.without_token,
            negatives,
        )
