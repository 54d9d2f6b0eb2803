"""The mixture: all sources of shards as one endless, random-access stream of batches.

Example k of step t is element t * B + k of the stream for any number of hosts, threads or worker processes; each host reads its
slice of the batch. The step number is therefore the whole state of the data. No record is filtered out: a corrupt one becomes an
example with `valid` False.

All images of a batch have the same canvas. A fixed periodic schedule selects it: aspects by their share of all examples, short
sides in turn. A record belongs to the aspect nearest to its own. Per aspect and source, the records are shuffled in each epoch;
per aspect, the sources are mixed by weight.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.transforms import DatasetSelectionMap
from jaxtyping import Float32, Int32

from glip_jax import UserError
from glip_jax.config import Config, ConfigError, SourceConfig
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.examples import Examples
from glip_jax.data.negatives.choice import NameVectors
from glip_jax.data.negatives.dictionary import dictionary
from glip_jax.data.records import RecordError, decode_image
from glip_jax.data.shards import ShardError, Shards
from glip_jax.io.assets import AssetError, resolve
from glip_jax.io.processes import end_with_parent, stop_signals_blocked
from glip_jax.structures import prompts
from glip_jax.structures.batch import Batch
from glip_jax.structures.canvas import canvas_size, nearest_aspect
from glip_jax.structures.descriptions import Descriptions, read_descriptions

__all__ = ["DataWorkerError", "Mixture", "Schedule", "schedule"]

_PERIOD = 4096
"""Steps after which the sequence of aspects repeats; the rarest aspect has at least one of them."""

_ELEMENTS = 2**52
"""Length of the endless stream; Grain's arithmetic on lengths is exact below 2**53."""


class DataWorkerError(UserError, RuntimeError):
    """A worker process of the data loader has died."""

    exit_code = 76  # exit_codes.PEER_LOST: launchers start the run again


@dataclass(frozen=True)
class Schedule:
    """Aspect and short side of each step."""

    aspects: Int32[np.ndarray, " period"]
    """Per step of a period: index of its aspect."""
    before: Int32[np.ndarray, " period"]
    """Per step of a period: number of earlier steps with the same aspect."""
    counts: Int32[np.ndarray, " aspects"]
    """Per aspect: number of its steps in a period."""

    def aspect(self, step: int) -> int:
        """Index of the aspect of a step."""
        return int(self.aspects[step % len(self.aspects)])

    def occurrence(self, step: int) -> int:
        """Number of earlier steps with the aspect of this step."""
        periods, rest = divmod(step, len(self.aspects))
        return periods * int(self.counts[self.aspects[rest]]) + int(self.before[rest])


def schedule(shares: Sequence[float], period: int = _PERIOD) -> Schedule:
    """A schedule that distributes aspects evenly over a period, by their shares (non-negative, not all 0).

    Shares are rounded to steps of the period, positive ones to at least one step. The order is smooth weighted round robin.
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
    """The records of one source and aspect, as (source, record)."""

    source: int
    records: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.source, int(self.records[index])


@dataclass(frozen=True)
class _Slice(DatasetSelectionMap):
    """Maps element j of the stream of a host to (aspect, element of the mixture of that aspect)."""

    schedule: Schedule
    batch_size: int
    start: int
    host: int
    hosts: int

    def __len__(self) -> int:
        return _ELEMENTS

    def step(self, index: int) -> tuple[int, int]:
        """(step, position in the global batch) of element `index` of this host."""
        per_host = self.batch_size // self.hosts
        return self.start + index // per_host, self.host * per_host + index % per_host

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, position = self.step(index)
        return self.schedule.aspect(step), self.schedule.occurrence(step) * self.batch_size + position


@dataclass(frozen=True)
class _MakeBatch:
    """Makes a batch from its (source, record) pairs."""

    examples: Examples
    slice: _Slice
    patches: bool

    def __call__(self, index: int, slots: Sequence[tuple[int, int]]) -> Batch:
        """Batch `index` of the stream of this host, on the canvas of its step."""
        config = self.examples.config
        positions = [self.slice.step(index * len(slots) + k) for k in range(len(slots))]
        rngs = [rng_of(config.train.seed, step * self.slice.batch_size + position) for step, position in positions]
        return self.examples.batch(slots, *_bucket(config, self.slice.schedule, positions[0][0]), rngs, self.patches)


class Mixture:
    """The training data of a run."""

    source_names: tuple[str, ...]
    """Sorted; `Batch.source` indexes them."""

    def __init__(self, config: Config) -> None:
        """Opens manifest and columns of every source. Raises ConfigError that names a missing or damaged source."""
        if not config.data.sources:
            raise ConfigError(
                "data.sources is empty: expected at least one folder of shards (python -m glip_jax data ...)"
            )
        self.config = config
        self.source_names = tuple(sorted(config.data.sources))
        self.tokenizer = tokenizer = _tokenizer(config)
        self.descriptions = _descriptions(config)
        """Of the names; None where no setting uses them."""
        self.shards = tuple(_open(name, config.data.sources[name]) for name in self.source_names)
        text, data, captions = config.model.text, config.data, config.data.captions
        listed = (
            dictionary(self.shards, tokenizer, captions.separator, text.max_tokens)
            if captions.dictionary or captions.hard_by == "meaning"
            else None
        )
        sources = [config.data.sources[name] for name in self.source_names]
        self.captioners = tuple(
            Captioner(
                s.manifest.names, tokenizer, captions, text.max_tokens, source.negatives, s, listed if captions.dictionary else None,
                source.complete == "all", sides=(not data.flip or data.flip_captions == "safe") and not data.crop.probability, descriptions=self.descriptions,
            )
            for source, s in zip(sources, self.shards)
        )  # fmt: skip
        own = (
            prompts.clean_name(name)
            for captioner in self.captioners
            for name in (*captioner.names, *captioner.more_negatives)
        )
        self.texts = tuple(dict.fromkeys([*listed.names, *own])) if listed and captions.hard_by == "meaning" else ()
        """Names whose vectors `use_vectors` takes; none where likeness is by letters."""
        self._examples = Examples(config, self.shards, self.captioners)
        self.notes: list[str] = []
        """What to tell the user of the sources."""
        if listed is not None:
            own = f"{len(listed.names):,} names; left out as no names or too long: {listed.left_out:,}"
            self.notes.append(f"the dictionary of {len(self.shards)} sources has {own}")
        for name, opened in zip(self.source_names, self.shards):
            self.notes += _check_kinds(name, opened) + _check_names(name, opened.manifest.names, tokenizer, config)
        self.notes += _description_notes(self.descriptions, self.captioners, self.source_names, text.max_tokens)
        if not any(opened.manifest.boxes for opened in self.shards):
            raise ConfigError(f"{'; '.join(self.notes)}: expected boxes; read what the imports dropped")
        aspects = config.data.aspects
        self._lists = [  # [source][aspect] -> records
            [np.flatnonzero(nearest == a).astype(np.int32) for a in range(len(aspects))]
            for nearest in (nearest_aspect(s.height, s.width, aspects) for s in self.shards)
        ]
        weights = np.array(
            [s.copies * len(shards) if s.copies else s.weight for s, shards in zip(sources, self.shards)]
        )
        portions = np.array([[len(part) for part in lists] for lists in self._lists]) / [[len(s)] for s in self.shards]
        self._weights = weights[:, None] / weights.sum() * portions
        """[source, aspect]: fraction of all examples."""
        self.shares = tuple(float(share) for share in self._weights.sum(1))
        """Per source: fraction of all examples."""
        self.records = tuple(len(s) for s in self.shards)
        self.schedule = schedule(self._weights.sum(0).tolist())

    def use_vectors(self, states: Float32[np.ndarray, "N C"]) -> None:
        """Takes the state of the text encoder for each of `texts`; must be called before `batches` where there are `texts`."""
        vectors = NameVectors.of(self.texts, states)
        self.captioners = tuple(replace(captioner, vectors=vectors) for captioner in self.captioners)
        self._examples = Examples(self.config, self.shards, self.captioners)

    def canvas(self, step: int) -> tuple[int, int]:
        """Canvas (height, width) of a step, pixels."""
        return _bucket(self.config, self.schedule, step)[1]

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """All canvases of the schedule; each is one compiled shape."""
        data = self.config.data
        used = [a for a, count in zip(data.aspects, self.schedule.counts) if count]
        multiple = self.config.model.input.extent_multiple
        sizes = {canvas_size(side, a, data.long_side, multiple) for a in used for side in data.short_sides}
        return tuple(sorted(sizes))

    def slots(self, step: int) -> list[tuple[int, int]]:
        """(source, record) of every example of a step, in the order of the batch."""
        size, aspect = self.config.train.batch_size, self.schedule.aspect(step)
        begin, mixed = self.schedule.occurrence(step) * size, self._mixes[aspect]
        # An element of grain may be None; these never are.
        return [mixed[element] for element in range(begin, begin + size)]  # pyright: ignore[reportReturnType]

    def describe(self, source: int, record: int) -> str:
        """Description of an example for messages: source, record and, if readable, id and provenance."""
        name = f"{self.source_names[source]}[{record}]"
        try:
            example = self.shards[source][record]
            decode_image(example)
        except RecordError as error:
            return f"{name} (corrupt: {error})"
        return f"{name} (image {example.id}, {example.provenance})"

    def batches(self, start_step: int = 0, host: int = 0, hosts: int = 1, patches: bool = False) -> Iterator[Batch]:
        """Endless iterator over the slice of this host of the batches of steps start_step, start_step + 1, ...

        Host h of n has the positions h * B / n to (h + 1) * B / n - 1 of each batch. `patches`: images as patches, see `Batch.image`; without,
        as pixels. Closing the iterator ends its threads and
        processes. Raises ConfigError if the batch size is not a multiple of `hosts`.
        """
        size, data = self.config.train.batch_size, self.config.data
        if self.texts and self.captioners[0].vectors is None:
            raise ConfigError(
                "data.captions.hard_by is meaning, and this caller gave no vectors of names: set it to letters"
            )
        if size % hosts:
            raise ConfigError(f"train.batch_size {size} is not a multiple of the {hosts} hosts")
        if not 0 <= host < hosts or start_step < 0:
            raise ConfigError(f"host {host} of {hosts} from step {start_step}: expected 0 <= host < hosts, step >= 0")
        part = _Slice(self.schedule, size, start_step, host, hosts)
        stream = grain.MapDataset.select_from_datasets(self._mixes, part)
        # Batched before decoding, so that every image is resized directly into its batch.
        stream = stream.batch(size // hosts, drop_remainder=True, batch_fn=list)
        stream = stream.map_with_index(_MakeBatch(self._examples, part, patches))
        processes = max(data.workers, 1)
        ahead = -(-data.prefetch // processes)
        loader = stream.to_iter_dataset(
            grain.ReadOptions(num_threads=max(1, data.threads // processes), prefetch_buffer_size=max(1, ahead))
        )
        if data.workers:
            # Grain's workers read absl flags, which this program does not parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=max(1, ahead))
            loader = loader.mp_prefetch(options, worker_init_fn=end_with_parent)
        return _drain(loader)

    @functools.cached_property
    def _mixes(self) -> list[grain.MapDataset]:
        """Per aspect its mixture."""
        return [self._mix(aspect) for aspect in range(len(self.config.data.aspects))]

    def _mix(self, aspect: int) -> grain.MapDataset:
        """The endless mixture of all records of one aspect; a placeholder that is never read if there are none."""
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
    """Opens the shards of a source. Raises ConfigError with the command that makes them."""
    try:
        return Shards(source.path)
    except ShardError as error:
        raise ConfigError(
            f"data.sources.{name}: {error}; make them with "
            f"`python -m glip_jax data coco ANNOTATIONS.json --images=FOLDER --out={source.path}` (or `data mdetr`)"
        ) from None


def _check_kinds(source: str, opened: Shards) -> list[str]:
    """A note where no record has a box. Raises ConfigError for caption records: all their words would be trained as absent."""
    count = opened.manifest.kinds.get("caption", 0)
    if count:
        raise ConfigError(
            f"data.sources.{source}: {opened.path} has {count} records of kind caption, which have no boxes: run the "
            "job `label` on them and train on the pseudo records that it writes"
        )
    nothing = f"data.sources.{source}: none of the {len(opened)} records of {opened.path} has a box: they teach only what is absent"
    return [] if opened.manifest.boxes else [nothing]


def _check_names(source: str, names: Sequence[str], tokenizer: prompts.Tokenizer, config: Config) -> list[str]:
    """Notes on the names of a source and its negatives. Raises ConfigError for a name that would never be trained: the
    vocabulary knows nothing of it, or it exceeds the token budget.
    """
    budget, negatives = config.model.text.max_tokens, config.data.sources[source].negatives
    where, encoder = f"data.sources.{source}", "set model.text to a vocabulary and encoder of that language"
    again = f"import the data again with names that it knows (`data coco --names=FILE.json`), or {encoder}"
    try:
        notes = prompts.check_names(names, tokenizer, where, again, "note")
        notes += prompts.check_names(negatives, tokenizer, f"{where}.negatives", f"remove it, or {encoder}", "note")
    except prompts.PromptError as error:
        raise ConfigError(str(error)) from None
    own = {prompts.words(prompts.clean_name(name)) for name in names} if negatives else set()
    if known := [name for name in negatives if prompts.words(prompts.clean_name(name)) in own]:
        notes.append(f"{where}.negatives: names of the source, which are negatives anyway: {prompts.listed(known)}")
    for name in (*names, *negatives):
        encoded = tokenizer.encode(prompts.clean_name(name) + config.data.captions.separator)
        if len(encoded.ids) > budget:
            raise ConfigError(
                f"{where}: the name {prompts.listed([name])} takes {len(encoded.ids)} tokens with [CLS], separator and [SEP], "
                f"model.text.max_tokens is {budget}: import the data again with a shorter name (`data coco --names=FILE.json`), "
                "or raise model.text.max_tokens"
            )
    if config.data.captions.mode == "all_names" and names:
        prompt = prompts.prompt_from_categories(names, config.data.captions.separator)
        tokens = len(tokenizer.encode(prompt.caption).ids)
        if tokens > budget:
            raise ConfigError(
                f"data.sources.{source}: its {len(names)} names take {tokens} tokens with [CLS] and [SEP], "
                f"model.text.max_tokens is {budget}: data.captions.mode all_names uses all of them; set it to sampled"
            )
    return notes


def _descriptions(config: Config) -> Descriptions | None:
    """The descriptions that a setting uses. Raises ConfigError for a file that is missing or holds something else."""
    if not (config.reads_descriptions or config.data.captions.descriptions.use == "prompt"):
        return None
    try:
        return read_descriptions(str(resolve(config.data.captions.descriptions.file)))
    except (AssetError, prompts.PromptError) as error:
        raise ConfigError(f"data.captions.descriptions.file: {error}") from None


def _description_notes(
    descriptions: Descriptions | None, captioners: Sequence[Captioner], sources: Sequence[str], budget: int
) -> list[str]:
    """Names without a description, and descriptions without a name. Raises ConfigError for one that exceeds the token budget with its name."""
    if descriptions is None:
        return []
    notes, known = [], [name for each in captioners for name in (*each.names, *each.more_negatives)]
    for source, each in zip(sources, captioners):
        notes += descriptions.notes(f"data.sources.{source}", each.names)
        for name, cost in each.described_costs().items():
            if cost + 2 > budget:
                raise ConfigError(
                    f"data.sources.{source}: {name!r} with its description takes {cost + 2} tokens with [CLS], separator and [SEP], "
                    f"model.text.max_tokens is {budget}: shorten the description in data.captions.descriptions.file"
                )
    if unknown := descriptions.unknown(known):
        notes.append(
            f"data.captions.descriptions.file: {len(unknown)} of its {len(descriptions.names)} names are of no source, and can be asked in "
            f"evaluation only: {prompts.listed(unknown)}"
        )
    return notes


def _tokenizer(config: Config) -> prompts.Tokenizer:
    """The tokenizer of the text encoder. Raises ConfigError if it exceeds the size of the embedding."""
    text = config.model.text
    try:
        tokenizer = prompts.load_tokenizer(str(resolve(text.vocabulary)))
        if text.mask == "phrase" or config.model.head.presence:
            prompts.check_separators(tokenizer, text.separators, config.data.captions.separator)
    except (AssetError, prompts.PromptError) as error:
        raise ConfigError(str(error)) from None
    if tokenizer.get_vocab_size() > text.vocabulary_size:
        raise ConfigError(
            f"model.text.vocabulary {text.vocabulary} has {tokenizer.get_vocab_size()} tokens, "
            f"model.text.vocabulary_size is {text.vocabulary_size}: expected at most as many"
        )
    return tokenizer


def _drain(loader: grain.IterDataset) -> Iterator[Batch]:
    """The batches of a loader; closes its threads and processes at the end. Raises DataWorkerError."""
    iterator = iter(loader)
    try:
        with stop_signals_blocked():  # the first batch starts the workers
            first = next(iterator)
        yield first
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        code = re.search(r"exit code (-?\d+)", str(error))
        raise DataWorkerError(
            f"a worker process of the data loader ended with code {code[1] if code else '?'} (-9: killed, mostly for want of memory); "
            "checkpoints are intact, the same command goes on: give fewer data.workers or a smaller data.prefetch if it happens again"
        ) from error
    finally:
        iterator.close()
