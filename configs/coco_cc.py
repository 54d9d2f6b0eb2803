r"""Detection and grounding in one run: a few dozen COCO photographs with boxes, and with captions whose phrases have boxes.

The data is too small to learn from; the run shows that the losses of both sources decrease together. The shards, relative to
the working folder, are created from a COCO JSON and a JSON in MDETR's format of the same photographs:

    python -m glip_jax data coco data/coco_cc_photographs/annotations/instances_train.json \
        --images=data/coco_cc_photographs/images --out=data/coco_cc/detection
    python -m glip_jax data mdetr data/coco_cc_photographs/annotations/grounding_train.json \
        --images=data/coco_cc_photographs/images --out=data/coco_cc/grounding
"""

from configs.bccd import EFFICIENTNET, MINILM, small_model
from glip_jax.config import (
    CaptionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    InitFromConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)


def get_config() -> Config:
    """Landscape and portrait images at 256 x 352 pixels; prompts of up to 64 tokens."""
    return Config(
        name="coco_cc",
        model=small_model(max_tokens=64),
        init_from=InitFromConfig(backbone=EFFICIENTNET, text=MINILM),
        data=DataConfig(
            sources={
                "detection": SourceConfig("data/coco_cc/detection"),
                "grounding": SourceConfig("data/coco_cc/grounding"),
            },
            captions=CaptionConfig(max_negatives=20),
            short_sides=(256,),
            long_side=352,
            aspects=(0.75, 1.333333),
            max_boxes=60,
            threads=1,
        ),
        optimizer=OptimizerConfig(rate=1e-3, warmup_steps=50, ema_decay=0.99),
        train=TrainConfig(steps=600, batch_size=8),
        checkpoint=CheckpointConfig(every=600),
        evaluation=EvaluationConfig(
            sets={
                "val": EvaluationSet(
                    "data/coco_cc_photographs/annotations/instances_val.json", "data/coco_cc_photographs/images"
                )
            },
            short_side=256,
            long_side=352,
            chunk=20,
        ),
    )
