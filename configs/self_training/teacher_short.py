"""The teacher in a short form: `scripts/self_training.sh --short`."""

import dataclasses

from configs.demo import demo
from configs.demo_short import short
from glip_jax.config import Config

__all__ = ["get_config"]


_MEASURED = ("scenes", "caption_names", "phrases")


def get_config() -> Config:
    """8 steps, and a set of each kind: all are in the short form of the demo."""
    base = short(demo("runs/self_training-short/scenes"))
    sets = {name: base.evaluation.sets[name] for name in _MEASURED}
    return dataclasses.replace(
        base,
        name="teacher-short",
        train=dataclasses.replace(base.train, steps=8, log_every=4),
        checkpoint=dataclasses.replace(base.checkpoint, every=4),
        evaluation=dataclasses.replace(base.evaluation, sets=sets),
    )
