"""Ablation on synthetic scenes, T with as many images of the other two sources as C: a quarter more steps.

Not one of the four runs of `scripts/ablate.sh`, which see equally many images; it measures the cost of T's smaller number of gold
images: --config.data.sources.pseudo.path=DIR as for T.
"""

import dataclasses

from configs.ablations import scenes_c, scenes_t
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base, sources = scenes_t.get_config(), scenes_c.get_config().data.sources
    gold = sum(source.weight for source in sources.values())
    every = sum(source.weight for source in base.data.sources.values())
    train = dataclasses.replace(base.train, steps=round(base.train.steps * every / gold))
    return dataclasses.replace(base, name="T-gold", train=train)
