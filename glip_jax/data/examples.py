"""One example: a record, cropped, resized, mirrored, recoloured and captioned, in the arrays of a Batch.

What is random is drawn from the given generator and nothing else, in one order, so an example is a function of the
record, the settings and that generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from glip_jax.config import Config, SourceConfig
from glip_jax.data import images as codec
from glip_jax.data import transforms
from glip_jax.data.captions import Captioner, View
from glip_jax.data.images import Memory
from glip_jax.data.records import Record, RecordError
from glip_jax.data.shards import Shards
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.structures.canvas import fit

__all__ = ["Examples"]


@dataclass(frozen=True)
class Examples:
    """Makes examples of the records of all sources."""

    config: Config
    shards: tuple[Shards, ...]
    captioners: tuple[Captioner, ...]
    memory: Memory = field(default_factory=Memory)
    """Of the pictures."""

    def __call__(
        self, source: int, index: int, short_side: int, canvas: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> Batch:
        """Record `index` of a source, its pixels written to `canvas`: a Batch without its leading axis.

        A corrupt record becomes a placeholder, masked out by `valid`.
        """
        try:
            return self._example(source, index, short_side, canvas, rng)
        except RecordError:
            return self._corrupt(source, index, canvas)

    def batch(
        self,
        slots: Sequence[tuple[int, int]],
        short_side: int,
        canvas: tuple[int, int],
        generators: Sequence[np.random.Generator],
    ) -> Batch:
        """The records (source, index) on one canvas (height, width), each with its own generator."""
        pixels = self.memory.lend((len(slots), *canvas, 3))
        made = [self(*slot, short_side, own, rng) for slot, own, rng in zip(slots, pixels, generators, strict=True)]
        fields = Batch(*zip(*made))
        return Batch(*map(np.stack, fields._replace(image=fields.size)))._replace(image=pixels)

    def _example(
        self, source: int, index: int, short_side: int, canvas: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> Batch:
        config, data = self.config, self.config.data
        record, unsure = _without_low_confidence(self.shards[source][index], self._source(source).threshold)
        captioner = self.captioners[source]
        window = _window(record, config, rng)
        boxes, old, view = record.boxes, (record.height, record.width), None
        if window is not None:
            boxes, shown, visible = transforms.crop_boxes(boxes, window, data.crop.min_visible)
            old, view = window[2:], View(shown, ~shown & (visible > 0))
        new = fit(*old, short_side, data.long_side, canvas.shape[:2])
        boxes = transforms.scale_boxes(boxes, old, new)
        mirrored = rng.random() < data.flip
        mirrored = mirrored and not (data.flip_captions == "safe" and captioner.says_side(record))
        boxes = transforms.mirror_boxes(boxes, new[1]) if mirrored else boxes
        # A part is cut out of the whole; an image that stays whole may come from its file smaller.
        image = codec.decode(record, data.codec, None if window else new)
        if window is not None:
            top, left, height, width = window
            image = np.ascontiguousarray(image[top : top + height, left : left + width])
        codec.resize_to_canvas(image, new, canvas, mirrored, data.codec)
        if data.jitter.probability and rng.random() < data.jitter.probability:
            own = canvas[: new[0], : new[1]]
            own[:] = transforms.jitter(own, data.jitter, rng)
        text = captioner(record, rng, view)
        boxes, rows, weights = boxes[text.keep], text.positive_map[text.keep], self._weights(source, record)[text.keep]
        count = min(len(boxes), data.max_boxes)
        slots, weight = np.zeros((data.max_boxes, 4), np.float32), np.zeros(data.max_boxes, np.float32)
        slots[:count], weight[:count] = boxes[:count], weights[:count]
        positive_map = np.zeros((data.max_boxes, config.model.text.max_tokens), bool)
        positive_map[:count] = rows[:count]
        dropped = {
            "boxes_over_limit": len(boxes) - count,
            "boxes_below_threshold": unsure,
            "boxes_out_of_view": int((~view.shown).sum()) if view else 0,
            "phrases_over_budget": text.over_budget,
            "spans_without_token": text.without_token,
        }
        return Batch(
            image=canvas,
            size=np.array(new, np.int32),
            extent=self._extent(new, canvas.shape[:2]),
            tokens=text.tokens,
            token_mask=text.mask,
            boxes=slots,
            box_mask=np.arange(data.max_boxes) < count,
            box_weight=weight,
            positive_map=positive_map,
            # What lost a box to the limit is in the image without one.
            token_loss_mask=text.token_loss_mask & ~rows[count:].any(0),
            valid=np.bool_(True),
            source=np.int32(source),
            record=np.int32(index),
            dropped=np.array([dropped.get(name, 0) for name in DROPS], np.int32),
        )

    def _source(self, source: int) -> SourceConfig:
        """The settings of a source."""
        return self.config.data.sources[sorted(self.config.data.sources)[source]]

    def _weights(self, source: int, record: Record) -> Float32[np.ndarray, "N"]:
        """What each box counts in the losses."""
        if self._source(source).box_weight == "score" and record.kind == "pseudo":
            return np.asarray(record.scores, np.float32)
        return np.ones(len(record.boxes), np.float32)

    def _extent(self, size: tuple[int, int], canvas: tuple[int, int]) -> Int32[np.ndarray, "2"]:
        """What the network takes as the image's size: rounded up, or the canvas."""
        model = self.config.model.input
        if model.extent == "batch":
            return np.array(canvas, np.int32)
        multiple = model.extent_multiple
        return np.minimum(-(-np.array(size) // multiple) * multiple, canvas).astype(np.int32)

    def _corrupt(self, source: int, index: int, canvas: UInt8[np.ndarray, "H W 3"]) -> Batch:
        """The placeholder of a corrupt record: black, no boxes, an empty caption, `valid` False."""
        slots, length = self.config.data.max_boxes, self.config.model.text.max_tokens
        ids = self.captioners[source].tokenizer.encode("").ids
        tokens = np.zeros(length, np.int32)
        tokens[: len(ids)] = ids
        canvas[:] = 0
        size = canvas.shape[:2]
        return Batch(
            image=canvas,
            size=np.array(size, np.int32),
            extent=self._extent(size, size),
            tokens=tokens,
            token_mask=np.arange(length) < len(ids),
            boxes=np.zeros((slots, 4), np.float32),
            box_mask=np.zeros(slots, bool),
            box_weight=np.zeros(slots, np.float32),
            positive_map=np.zeros((slots, length), bool),
            token_loss_mask=np.ones(length, bool),
            valid=np.bool_(False),
            source=np.int32(source),
            record=np.int32(index),
            dropped=np.array([name == "corrupt_records" for name in DROPS], np.int32),
        )


def _without_low_confidence(record: Record, least: float) -> tuple[Record, int]:
    """The record with the boxes of a score above `least`, and how many it lost; their phrases stay, as unknown ones."""
    if record.kind != "pseudo" or not least:
        return record, 0
    kept = [i for i, score in enumerate(record.scores) if score > least]
    spans = tuple(record.spans[i] for i in kept)
    unknown = dict.fromkeys(phrase for phrase in (*record.unknown, *record.spans) if phrase not in spans)
    scores = tuple(record.scores[i] for i in kept)
    sure = replace(record, boxes=record.boxes[kept], spans=spans, scores=scores, unknown=tuple(unknown))
    return sure, len(record.scores) - len(kept)


def _window(record: Record, config: Config, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """The part of the image that is looked at (top, left, height, width); None: all of it.

    Boxes that go leave their rows behind, which the caption's `keep` removes.
    """
    crop = config.data.crop
    if not crop.probability or rng.random() >= crop.probability:
        return None
    return transforms.crop_window(record.height, record.width, crop, rng)
