"""A short form of the demo, to check that everything works: `scripts/pretrain.sh --short`. 20 steps learn nothing."""

import dataclasses

from configs.demo import absence, demo
from glip_jax.config import CheckpointConfig, Config

__all__ = ["get_config", "short"]


def get_config() -> Config:
    return dataclasses.replace(short(absence(demo("runs/demo-short/scenes"))), name="demo-short")


def short(base: Config) -> Config:
    """20 steps with batches of 4."""
    train = dataclasses.replace(base.train, steps=20, batch_size=4, log_every=5)
    return dataclasses.replace(base, train=train, checkpoint=CheckpointConfig(every=10, keep=2))
