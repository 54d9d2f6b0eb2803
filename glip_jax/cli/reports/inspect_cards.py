"""Cards of records and of training examples for `inspect`, and counts over many records."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32

from glip_jax.cli.reports.card import CARD_WIDTH, Card, Chip, TextPiece, card_box, card_image, text_pieces
from glip_jax.cli.reports.drawing import hex_color, phrase_text
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.records import Record, RecordError, Spans, decode_image
from glip_jax.data.shards import Shards
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.structures.prompts import clean_name

__all__ = ["Counts", "add_drops", "count_records", "example_cards", "record_cards", "spread"]

_MAX_BOX_TEXT = 28
"""Characters of a phrase that are written on its box; the caption has them all."""


@dataclass
class Counts:
    """What was counted over the records of one source."""

    records: int = 0
    """That were looked at."""
    corrupt: list[str] = field(default_factory=list)
    """Their faults."""
    boxes: list[int] = field(default_factory=list)
    """Per record."""
    sides: list[float] = field(default_factory=list)
    """Per box, the square root of its area over the image's."""
    aspects: list[float] = field(default_factory=list)
    """Per record, height / width."""
    words: list[int] = field(default_factory=list)
    """Per phrase."""
    phrases: Counter[str] = field(default_factory=Counter)
    """Boxes of each name or phrase."""
    negatives: list[int] = field(default_factory=list)
    """Per caption."""
    tokens: list[int] = field(default_factory=list)
    """Per caption, [CLS] and [SEP] included."""
    unknown: int = 0
    """Tokens that give no loss without a box."""
    dropped: Counter[str] = field(default_factory=Counter)
    """In training examples, by reason."""


def spread(length: int, count: int) -> list[int]:
    """`count` indices below `length`, evenly spread, the first among them; all where `count` is 0 or not less."""
    if count <= 0 or count >= length:
        return list(range(length))
    return [index * length // count for index in range(count)]


def count_records(shards: Shards, limit: int, captioner: Captioner | None = None, seed: int = 0) -> Counts:
    """Counts over up to `limit` evenly spread records (0: all); pictures are not decoded.

    With a `captioner` also what it makes of each record; its random numbers are those of `seed` and the record's index.
    """
    counts = Counts()
    for index in spread(len(shards), limit):
        counts.records += 1
        try:
            record = shards[index]
            text = captioner(record, rng_of(seed, index)) if captioner is not None else None
        except RecordError as error:
            counts.corrupt.append(str(error))
            continue
        x1, y1, x2, y2 = record.boxes.astype(np.float64).T
        counts.boxes.append(len(record.boxes))
        counts.sides += np.sqrt((x2 - x1 + 1) * (y2 - y1 + 1) / (record.height * record.width)).tolist()
        counts.aspects.append(record.height / record.width)
        for phrase in _phrases(record, shards.manifest.names):
            counts.phrases[phrase.lower()] += 1
            counts.words.append(len(phrase.split()))
        if text is not None:
            counts.negatives.append(text.negatives)
            counts.tokens.append(int(text.mask.sum()))
            counts.unknown += int((~text.token_loss_mask & text.mask).sum())
    return counts


def _phrases(record: Record, names: Sequence[str]) -> list[str]:
    """The phrase of each box."""
    if record.kind == "detection":
        return [clean_name(names[label]).strip() for label in record.categories]
    return [_joined(record.caption, spans) for spans in record.spans]


def _joined(caption: str, spans: Spans) -> str:
    """The text of a phrase."""
    return " … ".join(caption[begin:end] for begin, end in spans)


def record_cards(shards: Shards, limit: int) -> list[Card]:
    """Cards of up to `limit` evenly spread records as they are stored; a corrupt one gives a card without a picture."""
    return [_record_card(shards, index) for index in spread(len(shards), max(limit, 1))]


def _record_card(shards: Shards, index: int) -> Card:
    try:
        record = shards[index]
        image = decode_image(record)
    except RecordError as error:
        return Card("", CARD_WIDTH / 2, (), (), (Chip(f"corrupt: {error}", "#b42318"),), f"record {index}")
    text = _phrases(record, shards.manifest.names)
    # One color a name; of captions, one a phrase.
    keys = [str(label) for label in record.categories] or [repr(spans) for spans in record.spans]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    colors = [hex_color(number[key]) for key in keys]
    uri, height = card_image(image)
    size = (image.shape[0], image.shape[1])
    boxes = [card_box(box, size, color, _short(phrase)) for box, color, phrase in zip(record.boxes, colors, text)]
    chips = []
    for key in number:
        own = [i for i, other in enumerate(keys) if other == key]
        score = f" {record.scores[own[0]]:.2f}" if record.scores else ""
        times = f" × {len(own)}" if len(own) > 1 else ""
        chips.append(Chip(text[own[0]] + times + score, colors[own[0]]))
    chips += [Chip(f"not all {name} have boxes") for name in record.not_exhaustive]
    chips += [Chip(f"unlabelled: {_joined(record.caption, spans)}") for spans in record.unknown]
    absent = record.known_absent
    chips += [Chip(f"known absent: {', '.join(absent[:12])}{' …' if len(absent) > 12 else ''}")] if absent else []
    own_spans = list(dict.fromkeys(record.spans))
    caption = text_pieces(
        record.caption, own_spans, [hex_color(number[repr(s)]) for s in own_spans], outside="negative"
    )
    file = f"record {index}: {record.id}, {record.kind}, {record.height} × {record.width}"
    return Card(uri, height, tuple(boxes), caption, tuple(chips), file)


def example_cards(batch: Batch, vocabulary: Sequence[str], sources: Sequence[str], limit: int, step: int) -> list[Card]:
    """Cards of the first `limit` examples of a batch, as the network gets them: the caption's tokens by their target."""
    return [_example_card(batch, index, vocabulary, sources, step) for index in range(min(limit, len(batch.valid)))]


def _example_card(batch: Batch, index: int, vocabulary: Sequence[str], sources: Sequence[str], step: int) -> Card:
    size = (int(batch.size[index][0]), int(batch.size[index][1]))
    uri, height = card_image(batch.image[index, : size[0], : size[1]])
    rows = batch.positive_map[index]
    number: dict[bytes, int] = {}
    boxes = []
    for slot in np.flatnonzero(batch.box_mask[index]).tolist():
        place = number.setdefault(rows[slot].tobytes(), len(number))
        text = phrase_text(batch.tokens[index], rows[slot], vocabulary) or "(no token)"
        boxes.append(card_box(batch.boxes[index, slot], size, hex_color(place), _short(text)))
    owner = np.full(rows.shape[1], -1)
    for key, place in sorted(number.items(), key=lambda item: -int(np.frombuffer(item[0], bool).sum())):
        owner[np.frombuffer(key, bool)] = place
    caption = _token_pieces(
        batch.tokens[index], batch.token_mask[index], owner, batch.token_loss_mask[index], vocabulary
    )
    dropped = [
        Chip(f"{reason}: {count}", "#b42318") for reason, count in zip(DROPS, batch.dropped[index].tolist()) if count
    ]
    canvas = batch.image.shape[1:3]
    where = f"step {step}, {sources[int(batch.source[index])]}[{int(batch.record[index])}]"
    sides = f"{size[0]} × {size[1]} of {canvas[0]} × {canvas[1]}, {int(batch.token_mask[index].sum())} tokens"
    return Card(uri, height, tuple(boxes), caption, tuple(dropped), f"{where}: {sides}")


def _token_pieces(
    tokens: Int32[np.ndarray, " T"],
    mask: Bool[np.ndarray, " T"],
    owner: np.ndarray,
    known: Bool[np.ndarray, " T"],
    vocabulary: Sequence[str],
) -> tuple[TextPiece, ...]:
    """The caption as its tokens spell it, cut where their target changes; [CLS] and [SEP] are left out."""
    pieces: list[TextPiece] = []
    places = np.flatnonzero(mask).tolist()[1:-1]
    for before, place in zip([-1, *places], places):
        token = int(tokens[place])
        text = vocabulary[token] if token < len(vocabulary) else f"[{token}]"
        glued = text.startswith("##") and bool(pieces)
        text = text[2:] if glued else text
        gap = "" if glued or not pieces or text in (".", ",") else " "
        color = hex_color(int(owner[place])) if owner[place] >= 0 else ""
        state = ("" if color else "negative") if known[place] else "unlabelled"
        if pieces and (pieces[-1].color, pieces[-1].state) == (color, state) and owner[before] == owner[place]:
            pieces[-1] = TextPiece(pieces[-1].text + gap + text, color, state)
        else:
            pieces += [TextPiece(gap, state="negative")] if gap else []
            pieces.append(TextPiece(text, color, state))
    return tuple(pieces)


def _short(text: str) -> str:
    """As much of a phrase as fits on its box."""
    return text if len(text) <= _MAX_BOX_TEXT else f"{text[: _MAX_BOX_TEXT - 1]}…"


def add_drops(counts: Mapping[str, Counts], batch: Batch, sources: Sequence[str]) -> None:
    """Adds a batch's drops to the counts of its sources."""
    for index, name in enumerate(sources):
        lost = batch.dropped[batch.source == index].sum(0).tolist()
        counts[name].dropped.update({reason: count for reason, count in zip(DROPS, lost) if count})
