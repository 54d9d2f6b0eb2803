"""Settings of fine-tuning that follow from the data: the canvas, box slots, captions, steps and rates.

One setting is for all sets; only what the data decide is different.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from glip_jax.config import CaptionConfig, CheckpointConfig, Config, SourceConfig

__all__ = ["METRIC", "canvas", "every_steps", "fitted", "rate_factor", "with_rates", "with_steps"]

METRIC = "evaluation/valid/AP"
"""What best checkpoint, early stop and cuts of the rate are decided by."""
_LARGEST = 0.98
"""Share of the images that the canvas holds at the full long side; the others are made smaller."""
_ENLARGED = 1.5
"""Images are not enlarged beyond this: there is nothing to be seen."""
_BOX = 42.0
"""Side of the median box, pixels, below which the canvas is made larger: anchors begin at 32 pixels."""
_LONGER = math.sqrt(2)
"""The canvas of small boxes is at most so much longer: it has twice the pixels, and a step takes twice the time."""
_SLOTS = 16
"""Box slots are a multiple of this."""
_FLAT = 0.3
"""Share of the steps in which the learning rate stays as it is, before it falls along a cosine."""
_RATES = {"full": 0.5, "head": 0.5, "linear": 5.0, "prompt": 20.0, "text": 0.1, "lora": 2.0}
"""Learning rate by mode, relative to that of the base's pretraining."""
_WARMUP = 20


def canvas(
    sizes: Sequence[tuple[int, int]], boxes: Sequence[float], pixels: int, multiple: int = 32
) -> tuple[int, int, float]:
    """(short side, long side, aspect) of the one canvas of a set, for images of `sizes` (height, width).

    All images get the long side of the canvas, so that a set of upright and lying images has a square one. It has about `pixels`
    pixels, and more where the boxes are small; the long side is a multiple of `multiple`.

    Args:
        boxes: sides of the boxes (of a square of the same area), relative to the long side of their image.
    """
    shapes = np.asarray(sizes, float)
    share = np.quantile(shapes / shapes.max(1, keepdims=True), _LARGEST, axis=0)
    longest = _ENLARGED * float(np.median(shapes.max(1)))
    side = math.sqrt(pixels / (share[0] * share[1]))
    longer = _BOX / max(side * float(np.median(boxes)), 1.0) if len(boxes) else 1.0
    side = min(side * min(max(longer, 1.0), _LONGER), longest)
    long_side = max(multiple, round(side / multiple) * multiple)
    height, width = (max(multiple, math.ceil(long_side * part / multiple - 1e-3) * multiple) for part in share)
    return min(height, width), max(height, width), height / width


def fitted(
    config: Config, sizes: Sequence[tuple[int, int]], boxes: Sequence[float], most_boxes: int, tokens: int, sources: dict[str, SourceConfig],
    mirrored: bool,
) -> Config:  # fmt: skip
    """`config` with what the data decide.

    Args:
        sizes: (height, width) of the training images.
        boxes: sides of their boxes; see `canvas`.
        most_boxes: largest number of boxes of a training image.
        tokens: length of the prompt with all names; where it exceeds the budget, names are sampled.
        sources: the own data, and what is replayed.
        mirrored: whether images may be mirrored; not if names say left or right.
    """
    short, long, aspect = canvas(sizes, boxes, config.evaluation.short_side * config.evaluation.long_side)
    whole = tokens <= config.model.text.max_tokens and len(sources) == 1
    captions = CaptionConfig(mode="all_names", shuffle=False) if whole else dataclasses.replace(config.data.captions)
    data = dataclasses.replace(
        config.data, sources=sources, captions=captions, short_sides=(short,), long_side=long, aspects=(aspect,),
        flip=0.5 if mirrored else 0.0, flip_captions="safe", max_boxes=max(_SLOTS, math.ceil(most_boxes / _SLOTS) * _SLOTS),
    )  # fmt: skip
    length = (
        min(config.model.text.max_tokens, math.ceil(tokens / _SLOTS) * _SLOTS)
        if whole
        else config.model.text.max_tokens
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, text=dataclasses.replace(config.model.text, max_tokens=length)),
        data=data,
        evaluation=dataclasses.replace(config.evaluation, short_side=short, long_side=long),
    )


def with_rates(config: Config, mode: str) -> Config:
    """`config` of a base with the learning rates of a mode: those of the base, times a factor. No warmup is left out."""
    optimizer = config.optimizer
    rate = optimizer.rate * _RATES[mode]
    text = rate if mode in ("text", "lora") else optimizer.text_rate
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(optimizer, rate=rate, text_rate=text, warmup_steps=_WARMUP)
    )


def every_steps(records: int, batch_size: int) -> int:
    """Steps between evaluations: an epoch, and at least 50."""
    return max(50, math.ceil(records / batch_size))


def with_steps(config: Config, steps: int, every: int) -> Config:
    """`config` with the length of the run, and an evaluation, with its checkpoint, after `every` steps."""
    every = min(steps, every)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, evaluate_every=every),
        checkpoint=CheckpointConfig(every=every, keep=1, best=1, best_by=METRIC),
        # The schedule is a factor from outside (`rate_factor`), so that the compiled step does not depend on the number of steps.
        optimizer=dataclasses.replace(config.optimizer, milestones=()),
    )


def rate_factor(step: int, steps: int) -> float:
    """Factor on the learning rates of the 0-based step: 1, then half a cosine down to a hundredth."""
    done = (step / steps - _FLAT) / (1 - _FLAT)
    return 1.0 if done <= 0 else 0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1))) / 2
