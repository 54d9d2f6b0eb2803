"""GLIP-L: Swin-L, eight head blocks, four detection sets, grounding, 24 million captioned images.

The backbone starts from Microsoft's Swin-L of ImageNet-22k, window 12. The original also multiplies the weight decay by
0.1 at two thirds of the way to each milestone, which is not done here.
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import BackboneConfig, Config, FusionConfig, HeadConfig, SourceConfig, TrainConfig

SOURCES = {
    "objects365": SourceConfig("data/objects365", weight=2 * 0.609),
    "openimages": SourceConfig("data/openimages", weight=1.58),
    "visual_genome": SourceConfig("data/visual_genome", weight=3 * 0.1),
    "imagenet_boxes": SourceConfig("data/imagenet_boxes", weight=2 * 0.4),
    "flickr30k": SourceConfig("data/flickr30k", weight=8 * 0.149),
    "goldg": SourceConfig("data/goldg_mixed", weight=4 * 0.621),
    "cap24m": SourceConfig("data/cap24m", weight=24.0),
}
"""Weights are the original's copies x millions of images (openimages, visual_genome, imagenet_boxes: estimates)."""


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
        data=replace(base.data, sources=SOURCES),
        # Mixed precision and the moving average are off in the original.
        optimizer=replace(base.optimizer, decay=0.01, ema_decay=0.0),
        train=TrainConfig(steps=1_000_000, batch_size=64),
    )
