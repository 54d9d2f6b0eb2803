"""GLIP-T (C): detection and grounding data, no captions."""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import Config


def get_config() -> Config:
    base = glip_tiny.get_config()
    sources = {name: source for name, source in base.data.sources.items() if name != "cap4m"}
    return replace(base, name="glip_tiny_c", data=replace(base.data, sources=sources))
