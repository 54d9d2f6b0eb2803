"""Ablation of absence on synthetic scenes: C where 15 % of the prompts name nothing of the image (`captions.empty_probability`)."""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_c.get_config()
    captions = dataclasses.replace(base.data.captions, empty_probability=0.15)
    return dataclasses.replace(base, name="empty prompts", data=dataclasses.replace(base.data, captions=captions))
