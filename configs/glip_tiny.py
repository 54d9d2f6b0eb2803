"""GLIP-T (arXiv 2112.03857): Swin-T, deep fusion, detection + grounding + captions.

Network, input, optimizer and schedule as released; the network equals the original to rounding. The shards are made
with `python -m glip_jax data`; the caption source is what a teacher labelled. The text encoder starts from a local
Hugging Face folder of bert-base-uncased, which also holds the vocabulary, the backbone from Microsoft's Swin-T of ImageNet,
whose RGB filters see BGR, as in the original.
"""

from glip_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    HeadConfig,
    InitFromConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)

OBJECTS365 = SourceConfig("data/objects365", copies=1)
FLICKR30K = SourceConfig("data/flickr30k", copies=1)
GOLDG_MIXED = SourceConfig("data/goldg_mixed", copies=1)
CAP4M = SourceConfig("data/cap4m", copies=1)
"""Every record as often as every other."""


def get_config() -> Config:
    """Global batches of 64; bfloat16 stands where the original used float16."""
    return Config(
        name="glip_tiny",
        # The released weights depend on the flat re-read of the coarser neighbour's offsets.
        model=ModelConfig(
            backbone=BackboneConfig(), head=HeadConfig(coarse_offsets="flat"), dtype="bfloat16", remat="blocks"
        ),
        data=DataConfig(
            sources={"objects365": OBJECTS365, "flickr30k": FLICKR30K, "goldg": GOLDG_MIXED, "cap4m": CAP4M}
        ),
        init_from=InitFromConfig(backbone="assets/swin_tiny_patch4_window7_224.pth", text="assets/bert-base-uncased"),
        optimizer=OptimizerConfig(),
        # 30 passes over objects365 and the grounding data, as GLIP-T (C); the length with captions was never released.
        train=TrainConfig(steps=30 * 1_379_000 // 64, batch_size=64),
    )
