"""Ablation on synthetic scenes, C with descriptions: averaged text states of names, and the side loss on their vectors. Else as `scenes_c`.

The descriptions are Unicode's keywords of the pictures ("animal stripe" for zebra). Never-seen names are what they should help: sets `unseen`
and `caption_names`. `--config.data.captions.descriptions.use=prompt` or `none`, and `--config.loss.description-weight=0`, measure the parts.
"""

import dataclasses

from configs.ablations.scenes_c import SCENES
from configs.demo import demo
from glip_jax.config import Config, DescriptionsConfig

__all__ = ["DESCRIPTIONS", "get_config"]

DESCRIPTIONS = "package:glip_jax/gcs/sample/descriptions.json"


def get_config() -> Config:
    config = demo(SCENES)
    captions = dataclasses.replace(config.data.captions, descriptions=DescriptionsConfig(DESCRIPTIONS, use="mean"))
    return dataclasses.replace(
        config,
        name="descriptions",
        data=dataclasses.replace(config.data, captions=captions),
        loss=dataclasses.replace(config.loss, description_weight=0.5),
    )
