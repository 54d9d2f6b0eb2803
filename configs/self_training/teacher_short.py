"""The teacher in a short form: `scripts/self_training.sh --short`."""

import dataclasses

from configs.demo import demo
from configs.demo_short import short
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    return dataclasses.replace(short(demo("runs/self_training-short/scenes")), name="teacher-short")
