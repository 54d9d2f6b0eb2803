"""GLIP-L fine-tuned on LVIS v1: the recipe of `lvis_tiny.py`."""

from configs import glip_large
from configs.finetune.lvis_tiny import tuned
from glip_jax.config import Config


def get_config() -> Config:
    return tuned(glip_large.get_config(), "lvis_large", "assets/glip_large_model.pth")
