"""Preprocessing: a record is cropped, resized, flipped, color-jittered and captioned into the arrays of a Batch.

All random numbers come from the given generator, in a fixed order: an example is a function of record, settings and generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from glip_jax.config import Config, SourceConfig
from glip_jax.data import transforms
from glip_jax.data.captions import Captioner, CropResult
from glip_jax.data.images import BufferPool, decode, resize_to_canvas
from glip_jax.data.records import Record, RecordError
from glip_jax.data.shards import Shards
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.structures.canvas import PATCH, fit, patches_of

__all__ = ["Examples"]


@dataclass(frozen=True)
class Examples:
    """Makes training examples of the records of all sources."""

    config: Config
    shards: tuple[Shards, ...]
    captioners: tuple[Captioner, ...]
    buffers: BufferPool = field(default_factory=BufferPool)
    """Memory of the images of batches."""

    def __call__(
        self, source: int, index: int, short_side: int, canvas: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> Batch:
        """The example of record `index` of a source, a Batch without its leading axis; its pixels are written to `canvas`.

        A corrupt record becomes a placeholder with `valid` False.
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
        patches: bool = False,
    ) -> Batch:
        """The batch of the records (source, index) on one canvas (height, width), each with its own generator.

        `patches`: images as patches, see `Batch.image`.
        """
        pixels = self.buffers.acquire((len(slots), *canvas, 3))
        examples = [
            self(*slot, short_side, image, rng) for slot, image, rng in zip(slots, pixels, generators, strict=True)
        ]
        fields = Batch(*zip(*examples))
        whole = Batch(*map(np.stack, fields._replace(image=fields.size)))
        described = whole.described if self.config.reads_descriptions else ()
        return whole._replace(image=self._patches(pixels) if patches else pixels, described=described)

    def _patches(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B h w 48"]:
        """Patches with the channels in the order of the network; changes `pixels`."""
        if self.config.model.input.order == "bgr":
            for image in pixels:
                cv2.cvtColor(image, cv2.COLOR_RGB2BGR, dst=image)
        count, height, width, _ = pixels.shape
        return patches_of(pixels, self.buffers.acquire((count, height // PATCH, width // PATCH, 3 * PATCH**2)))

    def _example(
        self, source: int, index: int, short_side: int, canvas: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> Batch:
        config, data = self.config, self.config.data
        record, low_confidence = _without_low_confidence(self.shards[source][index], self._source(source).threshold)
        captioner = self.captioners[source]
        window = _window(record, config, rng)
        boxes, old_size, crop = record.boxes, (record.height, record.width), None
        if window is not None:
            boxes, kept, visible = transforms.crop_boxes(boxes, window, data.crop.min_visible)
            old_size, crop = window[2:], CropResult(kept, ~kept & (visible > 0))
        new_size = fit(*old_size, short_side, data.long_side, canvas.shape[:2])
        boxes = transforms.scale_boxes(boxes, old_size, new_size)
        mirrored = rng.random() < data.flip
        mirrored = mirrored and not (data.flip_captions == "safe" and captioner.says_side(record))
        boxes = transforms.mirror_boxes(boxes, new_size[1]) if mirrored else boxes
        # A crop needs the image at full size; otherwise the decoder may scale it down.
        image = decode(record, data.codec, None if window else new_size)
        if window is not None:
            top, left, height, width = window
            image = np.ascontiguousarray(image[top : top + height, left : left + width])
        resize_to_canvas(image, new_size, canvas, mirrored, data.codec)
        if data.jitter.probability and rng.random() < data.jitter.probability:
            pixels = canvas[: new_size[0], : new_size[1]]
            pixels[:] = transforms.jitter(pixels, data.jitter, rng)
        text = captioner(record, rng, crop)
        boxes, rows, weights = boxes[text.keep], text.positive_map[text.keep], self._weights(source, record)[text.keep]
        count = min(len(boxes), data.max_boxes)
        slots, weight = np.zeros((data.max_boxes, 4), np.float32), np.zeros(data.max_boxes, np.float32)
        slots[:count], weight[:count] = boxes[:count], weights[:count]
        positive_map = np.zeros((data.max_boxes, config.model.text.max_tokens), bool)
        positive_map[:count] = rows[:count]
        dropped = {
            "boxes_over_limit": len(boxes) - count,
            "boxes_below_threshold": low_confidence,
            "boxes_out_of_view": int((~crop.kept).sum()) if crop else 0,
            "phrases_over_budget": text.over_budget,
            "spans_without_token": text.without_token,
        }
        return Batch(
            image=canvas,
            size=np.array(new_size, np.int32),
            extent=self._extent(new_size, canvas.shape[:2]),
            tokens=text.tokens,
            token_mask=text.mask,
            boxes=slots,
            box_mask=np.arange(data.max_boxes) < count,
            box_weight=weight,
            positive_map=positive_map,
            # A phrase that lost a box to the limit is in the image without that box.
            token_loss_mask=text.token_loss_mask & ~rows[count:].any(0),
            valid=np.bool_(True),
            source=np.int32(source),
            record=np.int32(index),
            dropped=np.array([dropped.get(name, 0) for name in DROPS], np.int32),
            described=() if text.described is None else text.described,
        )

    def _source(self, source: int) -> SourceConfig:
        """The settings of a source."""
        return self.config.data.sources[sorted(self.config.data.sources)[source]]

    def _weights(self, source: int, record: Record) -> Float32[np.ndarray, " N"]:
        """Loss weights of the boxes."""
        if self._source(source).box_weight == "score" and record.kind == "pseudo":
            return np.asarray(record.scores, np.float32)
        return np.ones(len(record.boxes), np.float32)

    def _extent(self, size: tuple[int, int], canvas: tuple[int, int]) -> Int32[np.ndarray, "2"]:
        """Extent of an image of `size`: rounded up, or the canvas."""
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
            described=() if self.captioners[source].descriptions is None else np.zeros(length, np.int32),
        )


def _without_low_confidence(record: Record, threshold: float) -> tuple[Record, int]:
    """The record with the boxes of a score above `threshold`, and how many were dropped; phrases without a box become unlabelled."""
    if record.kind != "pseudo" or not threshold:
        return record, 0
    kept = [i for i, score in enumerate(record.scores) if score > threshold]
    spans = tuple(record.spans[i] for i in kept)
    unknown = dict.fromkeys(phrase for phrase in (*record.unknown, *record.spans) if phrase not in spans)
    scores = tuple(record.scores[i] for i in kept)
    confident = replace(record, boxes=record.boxes[kept], spans=spans, scores=scores, unknown=tuple(unknown))
    return confident, len(record.scores) - len(kept)


def _window(record: Record, config: Config, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """A random crop window (top, left, height, width) in pixels, or None for the whole image."""
    crop = config.data.crop
    if not crop.probability or rng.random() >= crop.probability:
        return None
    return transforms.crop_window(record.height, record.width, crop, rng)
