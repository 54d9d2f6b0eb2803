"""Ablation of absence on synthetic scenes, D: what paid of the settings alone. C with the lighter fusion, and names that compete for a place."""

import dataclasses

from configs.ablations import scenes_light_fusion
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_light_fusion.get_config()
    return dataclasses.replace(base, name="D", detection=dataclasses.replace(base.detection, name_decay=2.0))
