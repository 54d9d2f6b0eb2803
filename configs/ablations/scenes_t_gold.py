"""T of the ablation on picture scenes with as many images of the other two sources as C has: a quarter more steps.

Not one of `scripts/ablate.sh`'s four, which see equally many images; it says what T's fewer gold images cost:
--config.data.sources.pseudo.path=DIR as for T.
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
