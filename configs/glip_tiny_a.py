"""GLIP-T (A): no fusion, Objects365 only; 30 epochs of 609 k records. Otherwise as GLIP-T.

The text is encoded once, by BERT, independently of the image; logits are computed from its last states. Paper and released
weights agree: COCO zero-shot 42.9.
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import Config, FusionConfig


def get_config() -> Config:
    base = glip_tiny.get_config()
    return replace(
        base,
        name="glip_tiny_a",
        model=replace(base.model, fusion=FusionConfig(enabled=False)),
        data=replace(base.data, sources={"objects365": glip_tiny.OBJECTS365}),
        train=replace(base.train, steps=glip_tiny.steps(glip_tiny.DETECTION_RECORDS)),
    )
