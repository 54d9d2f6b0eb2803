"""Ablation of absence on synthetic scenes, D, which is the demo: C with what paid of the settings alone, the mask by phrase and names that compete."""

import dataclasses

from configs.ablations import scenes_c
from configs.demo import absence
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    return dataclasses.replace(absence(scenes_c.get_config()), name="D")
