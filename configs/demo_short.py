"""The demo in a short form, to see that everything works: `scripts/pretrain.sh --short`. Nothing is learnt in 20 steps."""

import dataclasses

from configs.demo import demo
from glip_jax.config import CheckpointConfig, Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = demo("runs/demo-short/scenes")
    return dataclasses.replace(
        base,
        name="demo-short",
        train=dataclasses.replace(base.train, steps=20, batch_size=4, log_every=5),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )
