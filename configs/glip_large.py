"""GLIP-L: Swin-L, eight head blocks, four detection sets, grounding, 24 million captioned images.

The backbone starts from Microsoft's Swin-L of ImageNet-22k, window 12. The original also multiplies the weight decay by
0.1 at two thirds of the way to each milestone, which is not done here.
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import (
    BackboneConfig,
    Config,
    FusionConfig,
    HeadConfig,
    PackingConfig,
    SourceConfig,
    TrainConfig,
)

SOURCES = {
    "objects365": SourceConfig("data/objects365", copies=2),
    "openimages": SourceConfig("data/openimages", copies=1),
    "visual_genome": SourceConfig("data/visual_genome", copies=3),
    "imagenet_boxes": SourceConfig("data/imagenet_boxes", copies=2),
    "flickr30k": SourceConfig("data/flickr30k", copies=8),
    "goldg": SourceConfig("data/goldg_mixed", copies=4),
    "cap24m": SourceConfig("data/cap24m", copies=1),
}
"""The original's copies."""


def get_config() -> Config:
    base = glip_tiny.get_config()
    return replace(
        base,
        name="glip_large",
        model=replace(
            base.model,
            backbone=BackboneConfig(
                width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, drop_path=0.4, frozen_stages=1
            ),
            fusion=FusionConfig(gamma=1 / 8),
            head=HeadConfig(blocks=8, coarse_offsets="flat"),
        ),
        init_from=replace(base.init_from, backbone="assets/swin_large_patch4_window12_384_22k.pth"),
        # Up to 20 other captions beside that of a pseudo-labelled image. The original also leaves out the teacher's boxes of a
        # score up to 0.5, which is not done here.
        data=replace(
            base.data, sources=SOURCES, captions=replace(base.data.captions, packing=PackingConfig(number=20))
        ),
        # Mixed precision and the moving average are off in the original.
        optimizer=replace(base.optimizer, decay=0.01, ema_decay=0.0),
        train=TrainConfig(steps=1_000_000, batch_size=64),
    )
