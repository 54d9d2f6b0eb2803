"""The job `inspect`: an HTML report of records in shards and of the training examples made of them."""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import tyro
from etils import epath

from glip_jax.cli.command_line import Arguments, CommandLineError, flags, parse, split_settings
from glip_jax.cli.data import vocabulary_notes
from glip_jax.cli.reports.card import Card
from glip_jax.cli.reports.drawing import draw_histogram, svg_uri
from glip_jax.cli.reports.html import render_template
from glip_jax.cli.reports.inspect_cards import Counts, add_drops, count_records, example_cards, record_cards
from glip_jax.config import Config, PathStr, SourceConfig
from glip_jax.config.ranges import Count, Limit
from glip_jax.data.mixture import Mixture
from glip_jax.data.shards import Shards
from glip_jax.distributed import exit_codes
from glip_jax.io.assets import resolve
from glip_jax.io.workdir import write_atomic
from glip_jax.training.monitoring.source_counts import reduced_records

__all__ = ["InspectArguments", "InspectShards", "main"]

logger = logging.getLogger(__name__)

_EXAMPLE = "shards/mine --out=mine.html (or --config=configs/coco_cc.py --out=coco_cc.html)"


@dataclass(frozen=True)
class _Options:
    """The options of the report."""

    out: PathStr = "inspect.html"
    """HTML file to write; local or gs://."""
    records: Count = 12
    """Records drawn of each source."""
    examples: Limit = 16
    """Training examples drawn; only with --config."""
    limit: Limit = 2000
    """Records that are counted of each source, evenly spread; 0: all."""


@dataclass(frozen=True)
class InspectShards(_Options):
    """Write an HTML report of the records in folders of shards; with --config=FILE.py also of the training examples made of them.

    Settings are given as for `train`: --config=FILE.py --config.section.field=value. Without folders the report shows the
    sources of the config.
    """

    shards: tyro.conf.Positional[tuple[PathStr, ...]] = ()
    """Folders that `python -m glip_jax data` made."""


@dataclass(frozen=True)
class InspectArguments(Arguments):
    """The settings of `inspect`."""


def main(argv: Sequence[str]) -> int:
    """Runs `inspect SHARDS|--config=FILE --out=report.html`. Raises CommandLineError, ConfigError or ShardError."""
    settings, own = split_settings(argv)
    job = flags(own, InspectShards, "inspect", _EXAMPLE)
    config = parse(settings, InspectArguments, "inspect", _EXAMPLE).config if settings else None
    if not job.shards and config is None:
        raise CommandLineError("nothing to inspect: expected a folder of shards or --config=FILE.py")
    logger.info(f"HTML report: {_write(job, config)}")
    return exit_codes.DONE


def _write(job: InspectShards, config: Config | None) -> epath.Path:
    """Counts, draws and writes the report."""
    if config is not None and job.shards:
        named = {name: SourceConfig(path) for name, path in _names(job.shards).items()}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=named))
    if config is not None and config.data.captions.hard_by == "meaning":
        logger.info(
            "note: data.captions.hard_by is meaning: here, without parameters, hard negatives are those by letters"
        )
        captions = dataclasses.replace(config.data.captions, hard_by="letters")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, captions=captions))
    mixture = Mixture(config) if config is not None else None
    if mixture is not None:
        mixture.notes += reduced_records(mixture)
        for note in mixture.notes:
            logger.info(f"note: {note}")
        opened = dict(zip(mixture.source_names, mixture.shards))
        captioners = dict(zip(mixture.source_names, mixture.captioners))
    else:
        opened = {name: Shards(path) for name, path in _names(job.shards).items()}
        captioners = {}
        for name, own in opened.items():
            for note in vocabulary_notes(own.manifest.names):
                logger.info(f"note: {name}: {note}")
    seed = config.train.seed if config is not None else 0
    counts = {name: count_records(own, job.limit, captioners.get(name), seed) for name, own in opened.items()}
    cards, drawn = _examples(mixture, job.examples, counts) if mixture is not None else ([], dict.fromkeys(opened, 0))
    most = config.model.text.max_tokens if config is not None else 0
    text = render_template(
        "inspect.html.j2", title=f"inspect: {', '.join(opened) if config is None or job.shards else config.name}",
        notes=_notes(mixture, counts, opened),
        counted="Over the records counted of each source, in per cent. " + "; ".join(
            f"{name}: {own.records:,} of {len(opened[name]):,} records" for name, own in counts.items()
        ) + ".",
        plots=[(name, svg_uri(picture)) for name, picture in _plots(counts, most)],
        examples=cards, examples_of="the first steps",
        sources=[_source(name, own, counts[name], drawn[name], job.records) for name, own in opened.items()],
    )  # fmt: skip
    path = epath.Path(job.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def _names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each folder: its own, with a number where two are alike."""
    named: dict[str, str] = {}
    for path in paths:
        base = PurePath(path).name or "shards"
        name = next(n for n in itertools.chain([base], (f"{base}_{i}" for i in itertools.count(2))) if n not in named)
        named[name] = path
    return named


def _examples(mixture: Mixture, limit: int, counts: Mapping[str, Counts]) -> tuple[list[Card], dict[str, int]]:
    """Cards of the first steps' examples until there are `limit`, and how many of each source were drawn."""
    vocabulary = resolve(mixture.config.model.text.vocabulary).read_text(encoding="utf-8").splitlines()
    cards: list[Card] = []
    drawn = dict.fromkeys(mixture.source_names, 0)
    batches: Any = mixture.batches()
    try:
        for step, batch in enumerate(batches, 1):
            if len(cards) >= limit:
                break
            cards += example_cards(batch, vocabulary, mixture.source_names, limit - len(cards), step)
            add_drops(counts, batch, mixture.source_names)
            for index, name in enumerate(mixture.source_names):
                drawn[name] += int((batch.source == index).sum())
    finally:
        batches.close()
    return cards, drawn


def _notes(mixture: Mixture | None, counts: Mapping[str, Counts], opened: Mapping[str, Shards]) -> list[str]:
    """The lines on the mixture below the title."""
    notes = [f"{len(opened)} {'source' if len(opened) == 1 else 'sources'}, {sum(map(len, opened.values())):,} records"]
    if mixture is not None:
        shares = (f"{name} {share:.1%}" for name, share in zip(mixture.source_names, mixture.shares))
        notes[0] += f"; shares of examples: {', '.join(shares)}"
        sizes = ", ".join(f"{height} × {width}" for height, width in mixture.canvases)
        number = len(mixture.canvases)
        notes.append(f"{number} {'canvas' if number == 1 else 'canvases, each a compiled shape'}: {sizes}")
        unknown, tokens = (sum(part) for part in zip(*((c.unknown, sum(c.tokens)) for c in counts.values())))
        notes.append(f"tokens that give no loss where no box is: {unknown:,} of {tokens:,} in the captions counted")
        notes += mixture.notes
    return notes


def _plots(counts: Mapping[str, Counts], most: int) -> list[tuple[str, bytes]]:
    """Titles and images of the histograms; `most` is the token budget, 0 where captions were not made."""

    def series(what: str) -> dict[str, list[float]]:
        return {name: [float(value) for value in getattr(own, what)] for name, own in counts.items()}

    def whole(what: str) -> list[float]:
        top = int(np.percentile([v for values in series(what).values() for v in values] or [1], 99.5)) + 1
        step = max(1, -(-top // 40))
        return (np.arange(0, top + 2 * step, step) - 0.5).tolist()

    plots = [
        ("Boxes per image", draw_histogram(series("boxes"), whole("boxes"), "boxes")),
        ("Box sizes", draw_histogram(series("sides"), (2.0 ** np.arange(-7, 0.01, 0.5)).tolist(),
                                     "side of a square of the box's area / of the image's", logarithmic=True)),
        ("Shapes of images", draw_histogram(series("aspects"), (2.0 ** np.arange(-1.5, 1.51, 0.125)).tolist(),
                                            "height / width", logarithmic=True)),
        ("Phrase lengths", draw_histogram(series("words"), whole("words"), "words, per box")),
    ]  # fmt: skip
    if most:
        plots += [
            ("Negatives per caption", draw_histogram(series("negatives"), whole("negatives"), "names, phrases or texts")),
            ("Token budget used", draw_histogram(series("tokens"), np.linspace(0, most, 33).tolist(), f"tokens of {most}")),
        ]  # fmt: skip
    return plots


def _source(name: str, shards: Shards, counts: Counts, drawn: int, records: int) -> dict[str, Any]:
    """A source as the template shows it."""
    manifest = shards.manifest
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in manifest.kinds.items())
    below = [kinds, f"{manifest.boxes:,} boxes, {manifest.boxes / max(manifest.records, 1):.1f} an image"]
    below += [f"{len(manifest.names):,} names"] if manifest.names else []
    return {
        "name": name, "records": manifest.records, "below": below, "named": bool(manifest.names),
        "about": f"{shards.path}: made of {manifest.source or 'unknown'}, licence {manifest.licence}"
                 + (f", by {manifest.command}" if manifest.command else ""),
        "top": counts.phrases.most_common(30), "drops": _ordered(manifest.drops), "trained": drawn,
        "lost": _ordered(counts.dropped), "corrupt": counts.corrupt[:5], "cards": record_cards(shards, records),
    }  # fmt: skip


def _ordered(counted: Mapping[str, int]) -> list[tuple[str, int]]:
    """Reasons and counts, most frequent first; none that are 0."""
    return sorted(((reason, n) for reason, n in counted.items() if n), key=lambda item: -item[1])
