"""The teacher of `scripts/self_training.sh`: the demo, on the scenes of that script."""

import dataclasses

from configs.demo import demo
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    return dataclasses.replace(demo("runs/self_training/scenes"), name="teacher")
