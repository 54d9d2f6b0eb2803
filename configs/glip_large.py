"""GLIP-L: Swin-L, eight head blocks, four detection data sets, grounding, 24 million captioned images.

    steps    1,000,000 with batches of 64, in float32 in the original (here bfloat16, as in GLIP-T)
    solver   as GLIP-T, but weight decay 0.01, reduced by 10 at two thirds of the way to each milestone, and no EMA
    mixture  FourODs: objects365 x 2, openimages x 1, visual_genome without COCO's images x 3, imagenet_boxes x 2;
             GoldG: flickr30k x 8, goldg x 4; captions x 1, boxes with a score above 0.5, packed with up to 20 other captions

The backbone is initialized from Microsoft's Swin-L of ImageNet-22k, window 12; patch embedding and first stage are frozen. The
paper uses Cap24M, packed with up to 19 others (CC12M and SBU; 78.1 M boxes), the released weights CC3M, CC12M and SBU: COCO
zero-shot 49.8 and 51.4. The list of files of the mixture was not released, the numbers of copies were; one copy of the captions
is our choice. Phrases whose boxes all have a low score count as absent in the original, and as unlabelled here
(`SourceConfig.threshold`).
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import BackboneConfig, Config, FusionConfig, HeadConfig, PackingConfig, SourceConfig, TrainConfig

SOURCES = {
    "objects365": SourceConfig("data/objects365", copies=2),
    "openimages": SourceConfig("data/openimages", copies=1),
    "visual_genome": SourceConfig("data/visual_genome", copies=3),
    "imagenet_boxes": SourceConfig("data/imagenet_boxes", copies=2),
    "flickr30k": SourceConfig("data/flickr30k", copies=8),
    "goldg": SourceConfig("data/goldg_mixed", copies=4),
    "captions": SourceConfig("data/cap24m", copies=1, threshold=0.5),
}
PACKING = PackingConfig(number=20, none_probability=0.4, full_probability=0.5, take="captions", kinds=("pseudo",))


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
            fusion=FusionConfig(enabled=True, width=2048, heads=8, dropout=0.1, gamma=1 / 8),
            head=HeadConfig(blocks=8, groups=16, coarse_offsets="flat"),
        ),
        init_from=replace(base.init_from, backbone="assets/swin_large_patch4_window12_384_22k.pth"),
        data=replace(base.data, sources=SOURCES, captions=replace(glip_tiny.SAMPLING, packing=PACKING)),
        optimizer=replace(
            glip_tiny.SOLVER, decay=0.01, decay_milestone_factor=0.1, decay_milestone_share=0.667, ema_decay=0.0
        ),
        train=TrainConfig(steps=1_000_000, batch_size=64),
    )
