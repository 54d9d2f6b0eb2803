"""Ablation of absence on synthetic scenes: C with a logit for each phrase that says whether the image shows it (`head.presence`)."""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_c.get_config()
    head = dataclasses.replace(base.model.head, presence=True)
    return dataclasses.replace(base, name="presence", model=dataclasses.replace(base.model, head=head))
