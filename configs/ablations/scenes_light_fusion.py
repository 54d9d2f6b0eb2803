"""Ablation of the frontier on synthetic scenes: C with half of the fusion's width and heads, and drop path, as Grounding DINO trains (1024, 4, 0.1)."""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_c.get_config()
    fusion = dataclasses.replace(base.model.fusion, width=128, heads=2, drop_path=0.1)
    return dataclasses.replace(base, name="light fusion", model=dataclasses.replace(base.model, fusion=fusion))
