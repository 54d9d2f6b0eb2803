"""GLIP-T (C): Objects365 and GoldG, no captions; 30 epochs of 1.38 M records. Otherwise as GLIP-T, for which it is the teacher.

COCO zero-shot is 46.7 in the paper and with the released weights. On LVIS minival the paper's best checkpoint has 17.7 for rare
classes; the last one, which is released, has 14.3.
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import Config


def get_config() -> Config:
    base = glip_tiny.get_config()
    sources = {name: source for name, source in base.data.sources.items() if name != "captions"}
    return replace(base, name="glip_tiny_c", data=replace(base.data, sources=sources))
