"""GLIP-T (A): no fusion, detection data alone."""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import Config, FusionConfig, TrainConfig


def get_config() -> Config:
    base = glip_tiny.get_config()
    return replace(
        base,
        name="glip_tiny_a",
        model=replace(base.model, fusion=FusionConfig(enabled=False)),
        data=replace(base.data, sources={"objects365": glip_tiny.OBJECTS365}),
        train=TrainConfig(steps=30 * 609_000 // 64, batch_size=64),
    )
