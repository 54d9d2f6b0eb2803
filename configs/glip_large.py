"""GLIP-L: Swin-L, eight head blocks, four detection sets, grounding, 24 million captioned images.

    steps    1,000,000 of batches of 64, in float32 in the original (here bfloat16, as in GLIP-T)
    solver   as GLIP-T, but decay 0.01, which falls by 10 at two thirds of the way to each milestone, and no averages
    mixture  FourODs: objects365 x 2, openimages x 1, visual_genome without COCO's pictures x 3, imagenet_boxes x 2;
             GoldG: flickr30k x 8, goldg x 4; captions x 1, boxes of a score above 0.5, up to 20 other captions packed beside each

The backbone starts from Microsoft's Swin-L of ImageNet-22k, window 12; its patches and first stage are not trained. The paper's
captions are Cap24M, packed with up to 19 others (CC12M and SBU; 78.1 M boxes), the released weights' CC3M, CC12M and SBU: COCO zero-shot 49.8 and 51.4. The
mixture's list of files was not released, its copies were; one copy of the captions is ours. Words whose boxes are all unsure count as
absent in the original, here as unknown (`SourceConfig.threshold`).
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
