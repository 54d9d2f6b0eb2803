"""GLIP-L fine-tuned on COCO: 60.8 AP on val2017 in the paper, zero-shot 49.8. The recipe of `coco_tiny.py`.

Patch embedding and first stage, frozen in pretraining, are trained. The README's 61.7 (zero-shot 51.4) is evaluated at several scales,
which glip_jax does not do. mmdetection found that 24 epochs overfit: 59.4.
"""

from configs import glip_large
from configs.finetune.coco_tiny import tuned
from glip_jax.config import Config


def get_config() -> Config:
    return tuned(glip_large.get_config(), "coco_large", "assets/glip_large_model.pth")
