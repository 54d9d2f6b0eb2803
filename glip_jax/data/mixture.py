"""The mixture: sources of shards become one endless, random-access stream of batches.

Example k of step t is element t * B + k of the stream, whatever the number of hosts, threads or worker processes; a host
reads its slice of each batch. So the step is the whole state of the data. Nothing is filtered: a corrupt record becomes
a masked-out example.

A step's batch has one canvas. Which one follows a fixed periodic schedule over the aspects of the canvases (by their
share of all examples) and the short sides (in turn). Records go to the aspect nearest to their own; per aspect and
source there is one list of records, shuffled anew in each pass, and per aspect the sources are mixed by weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.transforms import DatasetSelectionMap
from jaxtyping import Int32

from glip_jax.config import Config, ConfigError, SourceConfig
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.examples import Examples
from glip_jax.data.records import RecordError, decode_image
from glip_jax.data.shards import ShardError, Shards
from glip_jax.io.assets import AssetError, resolve
from glip_jax.structures.batch import Batch
from glip_jax.structures.canvas import canvas_size, nearest_aspect
from glip_jax.structures.prompts import PromptError, Tokenizer, clean_name, load_tokenizer, prompt_from_categories

__all__ = ["Mixture", "Schedule", "schedule"]

_PERIOD = 4096
"""Steps after which the sequence of aspects repeats; the rarest aspect gets at least one of them."""

_ELEMENTS = 2**52
"""Length of the endless stream; grain's arithmetic on lengths stays exact below 2**53."""


@dataclass(frozen=True)
class Schedule:
    """Which aspect and short side each step has."""

    aspects: Int32[np.ndarray, "period"]
    """Per step of a period, the index of the aspect."""
    before: Int32[np.ndarray, "period"]
    """Per step of a period, how many earlier ones have the same aspect."""
    counts: Int32[np.ndarray, "aspects"]
    """Steps of each aspect in a period."""

    def aspect(self, step: int) -> int:
        """Index of the step's aspect."""
        return int(self.aspects[step % len(self.aspects)])

    def occurrence(self, step: int) -> int:
        """How many earlier steps had this step's aspect."""
        periods, rest = divmod(step, len(self.aspects))
        return periods * int(self.counts[self.aspects[rest]]) + int(self.before[rest])


def schedule(shares: Sequence[float], period: int = _PERIOD) -> Schedule:
    """Spreads aspects over a period as evenly as their shares (non-negative, one at least positive) allow.

    Shares are rounded to whole steps of the period, none of a positive share to 0; the order is that of smooth
    weighted round robin.
    """
    weights = np.asarray(shares, float) / np.sum(shares)
    counts = np.maximum(np.floor(weights * period), weights > 0).astype(np.int32)
    for index in np.argsort(counts - weights * period, kind="stable")[: max(0, period - counts.sum())]:
        counts[index] += 1
    counts[np.argmax(counts)] += period - counts.sum()
    credit, seen = np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int32)
    order, before = np.zeros(period, np.int32), np.zeros(period, np.int32)
    for step in range(period):
        credit += counts
        chosen = int(np.argmax(credit))
        credit[chosen] -= period
        order[step], before[step] = chosen, seen[chosen]
        seen[chosen] += 1
    return Schedule(order, before, counts)


@dataclass(frozen=True)
class _Slots:
    """The records of one source with one aspect, as (source, record)."""

    source: int
    records: Int32[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.source, int(self.records[index])


@dataclass(frozen=True)
class _Slice(DatasetSelectionMap):
    """Element j of a host's stream: which aspect's mixture it comes from, and which element of it."""

    schedule: Schedule
    batch_size: int
    start: int
    host: int
    hosts: int

    def __len__(self) -> int:
        return _ELEMENTS

    def step(self, index: int) -> tuple[int, int]:
        """(step, place in the global batch) of element `index` of this host."""
        own = self.batch_size // self.hosts
        return self.start + index // own, self.host * own + index % own

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, place = self.step(index)
        return self.schedule.aspect(step), self.schedule.occurrence(step) * self.batch_size + place


@dataclass(frozen=True)
class _Made:
    """Turns the (source, record) pairs of a batch of a host's stream into that batch."""

    examples: Examples
    slice: _Slice

    def __call__(self, index: int, slots: Sequence[tuple[int, int]]) -> Batch:
        """Batch `index` of the stream, which is one of its step's canvas."""
        config = self.examples.config
        places = [self.slice.step(index * len(slots) + place) for place in range(len(slots))]
        rngs = [rng_of(config.train.seed, step * self.slice.batch_size + place) for step, place in places]
        return self.examples.batch(slots, *_bucket(config, self.slice.schedule, places[0][0]), rngs)


class Mixture:
    """The training data of a run."""

    source_names: tuple[str, ...]
    """Sorted; `Batch.source` indexes them."""

    def __init__(self, config: Config) -> None:
        """Opens the sources' manifests and side files. ConfigError names a source that is missing or damaged."""
        if not config.data.sources:
            raise ConfigError("data.sources is empty: name at least one folder of shards (python -m glip_jax data ...)")
        for field in ("short_sides", "aspects"):
            values = getattr(config.data, field)
            if not values or min(values) <= 0:
                raise ConfigError(f"data.{field} is {values}: expected one positive number at least")
        self.config = config
        self.source_names = tuple(sorted(config.data.sources))
        tokenizer = _tokenizer(config)
        self.shards = tuple(_open(name, config.data.sources[name]) for name in self.source_names)
        text = config.model.text
        asked = [config.data.sources[name] for name in self.source_names]
        self.captioners = tuple(
            Captioner(s.manifest.names, tokenizer, config.data.captions, text.max_tokens, source.negatives, s)
            for source, s in zip(asked, self.shards)
        )
        self._examples = Examples(config, self.shards, self.captioners)
        for name, opened in zip(self.source_names, self.shards):
            _check_kinds(name, opened)
            _check_names(name, opened.manifest.names, tokenizer, config)
        aspects = config.data.aspects
        self._lists = [  # [source][aspect] -> records
            [np.flatnonzero(nearest == a).astype(np.int32) for a in range(len(aspects))]
            for nearest in (nearest_aspect(s.height, s.width, aspects) for s in self.shards)
        ]
        weights = np.array([s.copies * len(own) if s.copies else s.weight for s, own in zip(asked, self.shards)])
        portions = np.array([[len(part) for part in lists] for lists in self._lists]) / [[len(s)] for s in self.shards]
        self._weights = weights[:, None] / weights.sum() * portions
        """[source, aspect]: share of all examples."""
        self.shares = tuple(float(share) for share in self._weights.sum(1))
        """Per source, its share of all examples."""
        self.records = tuple(len(s) for s in self.shards)
        self.schedule = schedule(self._weights.sum(0).tolist())

    def canvas(self, step: int) -> tuple[int, int]:
        """Height and width of the step's images."""
        return _bucket(self.config, self.schedule, step)[1]

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """Every canvas that the schedule holds: one compiled shape each."""
        data = self.config.data
        used = [a for a, count in zip(data.aspects, self.schedule.counts) if count]
        multiple = self.config.model.input.extent_multiple
        sizes = {canvas_size(side, a, data.long_side, multiple) for a in used for side in data.short_sides}
        return tuple(sorted(sizes))

    def describe(self, source: int, record: int) -> str:
        """Names an example for a message: source, record and, if readable, the image's id and its origin."""
        place = f"{self.source_names[source]}[{record}]"
        try:
            found = self.shards[source][record]
            decode_image(found)
        except RecordError as error:
            return f"{place} (corrupt: {error})"
        return f"{place} (image {found.id}, {found.provenance})"

    def batches(self, start_step: int = 0, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """This host's slice of the batches of steps start_step, start_step + 1, ... without end.

        Host h of n has the places h * B / n to (h + 1) * B / n of each batch. Close the iterator when done with it:
        that ends its threads and processes.
        """
        size, data = self.config.train.batch_size, self.config.data
        if size % hosts:
            raise ConfigError(f"train.batch_size {size} is not a multiple of the {hosts} hosts")
        if not 0 <= host < hosts or start_step < 0:
            raise ConfigError(f"host {host} of {hosts} from step {start_step}: expected 0 <= host < hosts, step >= 0")
        part = _Slice(self.schedule, size, start_step, host, hosts)
        stream = grain.MapDataset.select_from_datasets([self._mix(a) for a in range(len(data.aspects))], part)
        # Batched first, so that every picture is resized straight into its batch.
        stream = stream.batch(size // hosts, drop_remainder=True, batch_fn=list)
        stream = stream.map_with_index(_Made(self._examples, part))
        processes = max(data.workers, 1)
        ahead = -(-data.prefetch // processes)
        loader = stream.to_iter_dataset(
            grain.ReadOptions(num_threads=max(1, data.threads // processes), prefetch_buffer_size=max(1, ahead))
        )
        if data.workers:
            # Grain's workers read absl flags, which nobody parses in a program with another command line.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            loader = loader.mp_prefetch(
                grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=max(1, ahead))
            )
        return _drain(loader)

    def _mix(self, aspect: int) -> grain.MapDataset:
        """The endless mixture of all sources' records of one aspect; one idle element where there are none."""
        parents, weights = [], []
        for source, lists in enumerate(self._lists):
            if len(lists[aspect]):
                seed = np.random.SeedSequence([self.config.train.seed, source, aspect]).generate_state(1)[0]
                slots: Any = _Slots(source, lists[aspect])
                parents.append(grain.MapDataset.source(slots).shuffle(seed=int(seed)).repeat())
                weights.append(float(self._weights[source, aspect]))
        if not parents:
            return grain.MapDataset.source([(0, 0)]).repeat()
        return grain.MapDataset.mix(parents, weights)


def _bucket(config: Config, plan: Schedule, step: int) -> tuple[int, tuple[int, int]]:
    """Short side and canvas of a step."""
    data = config.data
    short_side = data.short_sides[plan.occurrence(step) % len(data.short_sides)]
    return short_side, canvas_size(
        short_side, data.aspects[plan.aspect(step)], data.long_side, config.model.input.extent_multiple
    )


def _open(name: str, source: SourceConfig) -> Shards:
    """The source's shards, or ConfigError with the command that makes them."""
    try:
        return Shards(source.path)
    except ShardError as error:
        raise ConfigError(
            f"data.sources.{name}: {error}; make them with "
            f"`python -m glip_jax data coco ANNOTATIONS.json --images=FOLDER --out={source.path}` (or `data mdetr`)"
        ) from None


def _check_kinds(source: str, opened: Shards) -> None:
    """ConfigError for captions of which nothing is known: they would teach that nothing is in their images."""
    count = opened.manifest.kinds.get("caption", 0)
    if count:
        raise ConfigError(
            f"data.sources.{source}: {opened.path} has {count} records of kind caption, which have no boxes: they are for "
            "the job `label`, whose teacher makes pseudo records of them; train on those"
        )


def _check_names(source: str, names: Sequence[str], tokenizer: Tokenizer, config: Config) -> None:
    """ConfigError for a category that no caption can hold: it would never be trained."""
    budget = config.model.text.max_tokens
    for name in config.data.sources[source].negatives:
        if not clean_name(name).strip():
            raise ConfigError(
                f"data.sources.{source}.negatives has {name!r}, of which nothing is left without its parentheses: remove it"
            )
    for name in (*names, *config.data.sources[source].negatives):
        encoded = tokenizer.encode(clean_name(name) + config.data.captions.separator)
        if len(encoded.ids) > budget:
            shown = name if len(name) <= 60 else f"{name[:60]}…"
            raise ConfigError(
                f"data.sources.{source}: the name {shown!r} takes {len(encoded.ids)} tokens with [CLS], separator and [SEP], "
                f"model.text.max_tokens is {budget}: import it again with a shorter text (`data coco --names=FILE.json`), "
                "or raise model.text.max_tokens"
            )
    if config.data.captions.mode == "all_names" and names:
        prompt = prompt_from_categories(names, config.data.captions.separator)
        tokens = len(tokenizer.encode(prompt.caption).ids)
        if tokens > budget:
            raise ConfigError(
                f"data.sources.{source}: its {len(names)} names take {tokens} tokens with [CLS] and [SEP], "
                f"model.text.max_tokens is {budget}: data.captions.mode all_names needs them all; set it to sampled"
            )


def _tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the text encoder, checked against the size of its embedding."""
    text = config.model.text
    try:
        tokenizer = load_tokenizer(str(resolve(text.vocabulary)))
    except (AssetError, PromptError) as error:
        raise ConfigError(str(error)) from None
    if tokenizer.get_vocab_size() > text.vocabulary_size:
        raise ConfigError(
            f"model.text.vocabulary {text.vocabulary} has {tokenizer.get_vocab_size()} tokens, "
            f"model.text.vocabulary_size is {text.vocabulary_size}: one of them is of another model"
        )
    return tokenizer


def _drain(loader: grain.IterDataset) -> Iterator[Batch]:
    """The loader's batches; closes its threads and processes at the end."""
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        iterator.close()
