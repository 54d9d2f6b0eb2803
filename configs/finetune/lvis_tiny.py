"""GLIP-T fine-tuned on LVIS v1. What is known of the original is its prompt: all names of the image with 85 sampled negatives.

    steps    24 epochs of the 100,170 images of the train split, batches of 32
    rates    1e-5 for everything (biases twice that), x 0.1 at 67 % and 89 %; no stage is frozen

1,203 names do not fit into a prompt. Training samples the negatives among all names of the file, as the original's LVIS variant does; the
evaluation asks 40 names at a time and keeps 300 boxes of each prompt. The original published no LVIS fine-tuning: steps and rates are
those of COCO (`coco_tiny.py`), our choice. mmdetection samples rare classes more often (ClassBalancedDataset, 1e-3); glip_jax does not.

    python -m glip_jax data coco data/lvis/lvis_v1_train.json --images=data/coco --out=data/lvis/shards
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import (
    CheckpointConfig,
    Config,
    DetectionConfig,
    EvaluationConfig,
    EvaluationSet,
    InitFromConfig,
    SourceConfig,
    TrainConfig,
)

EPOCHS, IMAGES, BATCH = 24, 100_170, 32
SOURCES = {"lvis": SourceConfig("data/lvis/shards")}
SETS = {"lvis": EvaluationSet("data/lvis/lvis_v1_minival.json", "data/coco")}


def tuned(base: Config, name: str, weights: str) -> Config:
    """The recipe on the network of `base`."""
    return replace(
        base,
        name=name,
        model=replace(base.model, backbone=replace(base.model.backbone, frozen_stages=0)),
        init_from=InitFromConfig(model=weights),
        data=replace(
            base.data, sources=SOURCES, captions=replace(glip_tiny.SAMPLING, max_negatives=85, full_probability=1.0)
        ),
        detection=DetectionConfig(max_detections=300),
        optimizer=replace(base.optimizer, rate=1e-5, text_rate=1e-5, milestones=(0.67, 0.89), milestone_factor=0.1),
        train=TrainConfig(steps=EPOCHS * IMAGES // BATCH, batch_size=BATCH, evaluate_every=IMAGES // BATCH),
        checkpoint=CheckpointConfig(best=1, best_by="evaluation/lvis/AP"),
        evaluation=EvaluationConfig(sets=SETS, short_side=800, long_side=1333, chunk=40),
    )


def get_config() -> Config:
    return tuned(glip_tiny.get_config(), "lvis_tiny", "assets/glip_tiny_model_o365_goldg_cc_sbu.pth")
