"""Ablation on synthetic scenes, A: B without fusion; text and image are combined only in the scores."""

import dataclasses

from configs.ablations import scenes_b
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_b.get_config()
    fusion = dataclasses.replace(base.model.fusion, enabled=False)
    return dataclasses.replace(base, name="A", model=dataclasses.replace(base.model, fusion=fusion))
