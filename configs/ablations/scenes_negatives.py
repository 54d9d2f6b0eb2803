"""Ablation on synthetic scenes, C with negatives beyond the other names of a detection source.

Prompts that name nothing, negatives from the names of both sources, hard ones by meaning, and look-alikes of captions. The labels of the
detection source are complete: the other names of the grounding source are in none of its scenes. Captions leave objects out, so
the grounding source is not. Names of scenes are of different pictures: no two are synonyms.
"""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = scenes_c.get_config()
    captions = dataclasses.replace(
        base.data.captions, empty_probability=0.15, hard_share=0.25, hard_by="meaning", dictionary=0.3, synonym_cosine=1.0,
        look_alikes=0.5,
    )  # fmt: skip
    sources = dict(base.data.sources)
    sources["detection"] = dataclasses.replace(sources["detection"], complete="all")
    data = dataclasses.replace(base.data, sources=sources, captions=captions)
    return dataclasses.replace(base, name="negatives", data=data)
