"""GLIP-T (B): with fusion, Objects365 only; 30 epochs of 609 k records. Otherwise as GLIP-T.

Paper and released weights agree: COCO zero-shot 44.9.
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import Config


def get_config() -> Config:
    base = glip_tiny.get_config()
    return replace(
        base,
        name="glip_tiny_b",
        data=replace(base.data, sources={"objects365": glip_tiny.OBJECTS365}),
        train=replace(base.train, steps=glip_tiny.steps(glip_tiny.DETECTION_RECORDS)),
    )
