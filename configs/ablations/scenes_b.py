"""Ablation on synthetic scenes, B: C without grounding, only detection scenes."""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_c.get_config()
    sources = {"detection": base.data.sources["detection"]}
    return dataclasses.replace(base, name="B", data=dataclasses.replace(base.data, sources=sources))
