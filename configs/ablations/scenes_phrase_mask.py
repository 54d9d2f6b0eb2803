"""Ablation of absence on synthetic scenes: C with names that do not read one another in the text layers (`text.mask`)."""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_c.get_config()
    text = dataclasses.replace(base.model.text, mask="phrase")
    return dataclasses.replace(base, name="phrase mask", model=dataclasses.replace(base.model, text=text))
