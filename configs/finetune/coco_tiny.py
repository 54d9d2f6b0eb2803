"""GLIP-T fine-tuned on COCO, by the command of the original's README, which gives 55.2 AP on val2017 (zero-shot 46.6).

    steps    24 epochs of the 117,266 images of train2017 with a box (images without one are left out), batches of 32
    rates    1e-5 for everything (biases twice that), x 0.1 at 67 % and 89 %; no stage is frozen
    prompt   all 80 names in the order of their ids, in one prompt of 256 tokens

Everything else is that of pretraining, as in the original: input sides, flips, weight decay, warmup, clipping and averages.
mmdetection tunes with AdamW 2e-5, decay 0.05 and none on norms, for 2 x 12 epochs, and notes that the best epoch is an early one:
keep the best checkpoint, as `checkpoint.best` does here. Or use `python -m glip_jax finetune`, which stops by itself.

    python -m glip_jax data coco data/coco/annotations/instances_train2017.json --images=data/coco/train2017 --out=data/coco/shards
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    EvaluationSet,
    InitFromConfig,
    SourceConfig,
    TrainConfig,
)

EPOCHS, IMAGES, BATCH = 24, 117_266, 32
SOURCES = {"coco": SourceConfig("data/coco/shards")}
SETS = {"coco": EvaluationSet("data/coco/annotations/instances_val2017.json", "data/coco/val2017")}


def tuned(base: Config, name: str, weights: str) -> Config:
    """The recipe on the network of `base`."""
    return replace(
        base,
        name=name,
        model=replace(base.model, backbone=replace(base.model.backbone, frozen_stages=0)),
        init_from=InitFromConfig(model=weights),
        data=replace(base.data, sources=SOURCES, captions=replace(glip_tiny.SAMPLING, mode="all_names", shuffle=False)),
        optimizer=replace(base.optimizer, rate=1e-5, text_rate=1e-5, milestones=(0.67, 0.89), milestone_factor=0.1),
        train=TrainConfig(steps=EPOCHS * IMAGES // BATCH, batch_size=BATCH, evaluate_every=IMAGES // BATCH),
        checkpoint=CheckpointConfig(best=1, best_by="evaluation/coco/AP"),
        evaluation=EvaluationConfig(sets=SETS, short_side=800, long_side=1333),
    )


def get_config() -> Config:
    return tuned(glip_tiny.get_config(), "coco_tiny", "assets/glip_tiny_model_o365_goldg_cc_sbu.pth")
