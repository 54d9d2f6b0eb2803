"""The demo in a short form, to see that everything works: `scripts/pretrain.sh --short`. Nothing is learnt in 20 steps."""

import dataclasses

from configs.demo import demo
from glip_jax.config import CheckpointConfig, Config, TrainConfig

__all__ = ["get_config"]


def get_config() -> Config:
    return dataclasses.replace(
        demo("runs/demo-short/scenes"),
        name="demo-short",
        train=TrainConfig(steps=20, batch_size=4, log_every=5, evaluate_every=-1),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )
