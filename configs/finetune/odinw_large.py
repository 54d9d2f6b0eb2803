"""GLIP-L fine-tuned on a set of ODinW: the recipe of `odinw_tiny.py` (68.9 AP, mean of the 13 sets on test)."""

from configs import glip_large
from configs.finetune.odinw_tiny import tuned
from glip_jax.config import Config


def get_config() -> Config:
    return tuned(glip_large.get_config(), "odinw_large", "assets/glip_large_model.pth")
