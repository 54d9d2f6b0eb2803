"""GLIP-T (arXiv 2112.03857): Swin-T, deep fusion, detection, grounding, and captions labelled by a teacher.

    steps    as many images as 30 epochs of objects365, flickr30k and goldg (1.38 M records), with batches of 64; with 4 M captions
             mixed in by their number, each gold record is seen about 8 times
    solver   AdamW, rate 1e-4 (BERT 1e-5), weight decay 1e-4, rate x 0.1 at 67 % and 89 %, gradients clipped at norm 1, EMA 0.999

Network, input, solver and sampling are those of the released configuration; the network equals the original up to rounding. What
is not known, or differs between paper and release:

* Captions. The GLIP-T of the paper is trained on Cap4M (4 M pairs from the web), the released GLIP-T on CC3M and SBU; COCO
  zero-shot 46.3 and 46.6. Neither the caption data nor its configuration was released: the configuration that comes with the
  weights is that of GLIP-T (C) and serves evaluation. The number of steps, one copy of the captions and the teacher's threshold
  (0.5, as in GLIP-L) are therefore our choices.
* The paper reports its best checkpoint on LVIS minival, the released weights are the last one: rare classes 20.1 and 17.6 on the
  same data (20.8 with Cap4M).
* bfloat16 is used where the original used float16 with loss scaling.

The shards are created with `python -m glip_jax data`, the labels of captions with `python -m glip_jax label` and GLIP-T (C) as
teacher. The text encoder is initialized from a local Hugging Face folder of bert-base-uncased, which also has the vocabulary, the
backbone from Microsoft's Swin-T of ImageNet, whose RGB filters are applied to BGR input, as in the original.
"""

from glip_jax.config import (
    BackboneConfig,
    CaptionConfig,
    Config,
    DataConfig,
    FusionConfig,
    HeadConfig,
    InitFromConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)

OBJECTS365 = SourceConfig("data/objects365", copies=1)
"""Version 1, 609 k records."""
FLICKR30K = SourceConfig("data/flickr30k", copies=1)
"""149 k captions; together with `GOLDG_MIXED` (621 k captions of GQA, Visual Genome and COCO without COCO's images) the paper's
GoldG."""
GOLDG_MIXED = SourceConfig("data/goldg_mixed", copies=1)
CAPTIONS = SourceConfig("data/cc3m_sbu", copies=1, threshold=0.5)
"""CC3M and SBU (the released weights) or Cap4M (the paper), labelled by a teacher."""

PASSES, BATCH = 30, 64
DETECTION_RECORDS, GOLD_RECORDS = 609_000, 1_379_000
"""Number of records of objects365, and of objects365 with the grounding data."""

SOLVER = OptimizerConfig(
    rate=1e-4, text_rate=1e-5, backbone_rate_factor=1.0, head_text_rate_factor=1.0, bias_rate_factor=2.0,
    decay=1e-4, bias_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8,
    warmup_steps=2000, warmup_factor=0.001, milestones=(0.67, 0.89), milestone_factor=0.1,
    clip_norm=1.0, ema_decay=0.999, ema_ramp=False,
)  # fmt: skip
SAMPLING = CaptionConfig(
    mode="sampled", separator=". ", max_negatives=85, full_probability=0.5, one_negative_probability=0.0,
    one_positive_probability=0.0, drop_positive_probability=0.0, shuffle=True, words_without_box="negative",
)  # fmt: skip
"""Captions are not packed, as in the configuration that comes with the weights."""


def steps(records: int) -> int:
    """Number of steps of `PASSES` epochs of `records` records."""
    return PASSES * records // BATCH


def get_config() -> Config:
    return Config(
        name="glip_tiny",
        model=ModelConfig(
            backbone=BackboneConfig(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, drop_path=0.2),
            fusion=FusionConfig(enabled=True, width=2048, heads=8, dropout=0.1, gamma=1 / 6),
            # Required by the released weights: the offsets of the coarser level are re-read as a flat array.
            head=HeadConfig(blocks=6, groups=16, coarse_offsets="flat"),
            dtype="bfloat16",
            remat="kernels",
        ),
        loss=LossConfig(box_weight=2.0, focal_alpha=0.25, focal_gamma=2.0, atss_candidates=9),
        data=DataConfig(
            sources={"objects365": OBJECTS365, "flickr30k": FLICKR30K, "goldg": GOLDG_MIXED, "captions": CAPTIONS},
            captions=SAMPLING,
            short_sides=(480, 560, 640, 720, 800),
            long_side=1333,
            flip=0.5,
            flip_captions="as_is",
            max_boxes=100,
        ),
        init_from=InitFromConfig(backbone="assets/swin_tiny_patch4_window7_224.pth", text="assets/bert-base-uncased"),
        optimizer=SOLVER,
        train=TrainConfig(steps=steps(GOLD_RECORDS), batch_size=BATCH),
    )
