"""A small run to try a change end to end: one block, two steps of two synthetic images, no released weights, no download.

    python -m glip_jax scenes --out=runs/debug/scenes --count=4 --captions=0 --validation=2 --size=96 \
        --names.detection=4 --names.grounding=2 --names.captions=1 --names.unseen=1
    python -m glip_jax train --config=configs/debug.py --workdir=runs/debug/run

With the step in the compilation cache the second takes 37 s of CPU, else 2 minutes (measured beside other load); compiling takes a
third of that with XLA_FLAGS=--xla_cpu_use_fusion_emitters=false, which the tests set.
`evaluate`, `predict`, `label`, `report`, `plan` and `export` take --checkpoint=runs/debug/run. `tests/cli/test_jobs.py` runs each of them on this config.
"""

from configs.bccd import MINILM
from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DetectionConfig,
    EvaluationConfig,
    EvaluationSet,
    FusionConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    PyramidConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
)

__all__ = ["debug", "get_config"]


def get_config() -> Config:
    return debug("runs/debug/scenes")


def debug(scenes: str) -> Config:
    """Two steps on the scenes in the folder `scenes`, with every kind of part that GLIP has."""
    validation, phrases = f"{scenes}/validation", f"{scenes}/validation_phrases"
    return Config(
        name="debug",
        model=ModelConfig(
            backbone=BackboneConfig(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), window=4),
            pyramid=PyramidConfig(channels=16, strides=(16, 32)),
            text=TextConfig(
                vocabulary=f"{MINILM}/vocab.txt",
                width=16,
                layers=1,
                heads=2,
                hidden=32,
                positions=32,
                max_tokens=32,
            ),
            fusion=FusionConfig(width=16, heads=2),
            head=HeadConfig(blocks=1, groups=4),
            anchors=AnchorConfig(sizes=(24, 48)),
        ),
        data=DataConfig(
            sources={name: SourceConfig(f"{scenes}/shards/{name}") for name in ("detection", "grounding")},
            short_sides=(96,),
            long_side=96,
            aspects=(1.0,),
            max_boxes=8,
            threads=1,
        ),
        optimizer=OptimizerConfig(rate=1e-3, warmup_steps=1, ema_decay=0.9),
        train=TrainConfig(steps=2, batch_size=2, log_every=1, evaluate_every=-1),
        checkpoint=CheckpointConfig(every=1, keep=2),
        # After two steps all scores are low.
        detection=DetectionConfig(threshold=0.0, max_detections=10),
        evaluation=EvaluationConfig(
            sets={
                "scenes": EvaluationSet(f"{validation}/annotations.json", f"{validation}/images"),
                "phrases": EvaluationSet(f"{phrases}/annotations.json", f"{phrases}/images", kind="grounding"),
            },
            batch_size=2,
            short_side=96,
            long_side=96,
        ),
    )
