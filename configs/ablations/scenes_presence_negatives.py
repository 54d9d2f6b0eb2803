"""Ablation of absence on synthetic scenes: C with the negatives of `scenes_negatives`, presence, and names that do not read one another."""

import dataclasses

from configs.ablations import scenes_negatives
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_negatives.get_config()
    text = dataclasses.replace(base.model.text, mask="phrase")
    head = dataclasses.replace(base.model.head, presence=True)
    return dataclasses.replace(
        base, name="negatives, presence, phrase mask", model=dataclasses.replace(base.model, text=text, head=head)
    )
