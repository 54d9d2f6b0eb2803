"""Ablation of relations on synthetic scenes: C with the place of every cell in the visual features and in its alignment (`head.positions`)."""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_c.get_config()
    head = dataclasses.replace(base.model.head, positions=True)
    return dataclasses.replace(base, name="positions", model=dataclasses.replace(base.model, head=head))
