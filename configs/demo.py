"""The demo: synthetic scenes, detection of 120 names mixed with grounding; minutes on two CPU cores.

`scripts/pretrain.sh` draws the scenes into runs/demo/scenes first:

python -m glip_jax scenes --out=runs/demo/scenes --captions=0
"""

import dataclasses

from configs.bccd import EFFICIENTNET, MINILM, small_model
from glip_jax.config import (
    AnchorConfig,
    CaptionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DetectionConfig,
    EvaluationConfig,
    EvaluationSet,
    InitFromConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = ["absence", "demo", "get_config", "scene_sets"]


def get_config() -> Config:
    return absence(demo("runs/demo/scenes"))


def absence(base: Config) -> Config:
    """`base` with what the ablations have shown to pay, D of docs/results/ablations.md: names do not read one another, and compete."""
    text = dataclasses.replace(base.model.text, mask="phrase")
    model = dataclasses.replace(base.model, text=text)
    return dataclasses.replace(base, model=model, detection=DetectionConfig(name_decay=2.0))


def demo(scenes: str) -> Config:
    """The demo on the synthetic scenes in the folder `scenes`, without `absence`: the ablations and self-training build on it."""
    return Config(
        name="demo",
        model=_model(),
        data=DataConfig(
            sources={
                "detection": SourceConfig(f"{scenes}/shards/detection", weight=3.0),
                "grounding": SourceConfig(f"{scenes}/shards/grounding", weight=1.0),
            },
            # 64 tokens hold only a few names besides those of the scene; the mixture counts the omitted ones.
            captions=CaptionConfig(max_negatives=24),
            short_sides=(256,),
            long_side=256,
            aspects=(1.0,),
            flip=0.0,  # captions contain left and right
            max_boxes=12,
        ),
        # With gamma 2 fewer names were correct after 250 steps (0.44 against 0.50 of about 16, one seed).
        loss=LossConfig(box_weight=1.0, focal_alpha=0.5, focal_gamma=1.0),
        optimizer=OptimizerConfig(
            rate=1e-3,
            head_text_rate_factor=0.2,
            warmup_steps=50,
            milestones=(0.75, 0.92),
            milestone_factor=0.2,
            ema_decay=0.99,
        ),
        # scripts/pretrain.sh runs the job `evaluate` afterwards.
        train=TrainConfig(steps=1500, batch_size=8, log_every=20, evaluate_every=-1),
        checkpoint=CheckpointConfig(every=300, keep=2),
        init_from=InitFromConfig(backbone=EFFICIENTNET, text=MINILM),
        evaluation=EvaluationConfig(sets=scene_sets(scenes), short_side=256, long_side=256),
    )


def _model() -> ModelConfig:
    """One block of fusion, BERT layer and dynamic convolution on frozen encoders."""
    small = small_model(max_tokens=64, blocks=1)
    return dataclasses.replace(
        small,
        text=dataclasses.replace(small.text, dropout=0.0),
        fusion=dataclasses.replace(small.fusion, dropout=0.0),
        # Larger initial logits and box deltas: at the original's scales no name was learned in 900 steps, and the box loss
        # did not decrease in the first 200.
        head=dataclasses.replace(small.head, log_scale=-2.0, box_scale=8.0),
        anchors=AnchorConfig(sizes=(48, 80, 128)),
    )


def scene_sets(scenes: str) -> dict[str, EvaluationSet]:
    """The validation sets of `python -m glip_jax scenes`: other scenes, another style, other names, absent names, phrases."""
    parts = ("style", "grounding_names", "caption_names", "unseen", "absent")
    sets = {
        part: EvaluationSet(f"{scenes}/validation_{part}/annotations.json", f"{scenes}/validation_{part}/images")
        for part in parts
    }
    phrases = f"{scenes}/validation_phrases"
    return {
        "scenes": EvaluationSet(f"{scenes}/validation/annotations.json", f"{scenes}/validation/images"),
        **sets,
        "phrases": EvaluationSet(f"{phrases}/annotations.json", f"{phrases}/images", kind="grounding"),
    }
