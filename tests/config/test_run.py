"""Settings: contradictions are refused with both values; differences on resume list settings that affect results only."""

import dataclasses
import json
from typing import Any

import pytest

from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    CaptionConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    CropConfig,
    DataConfig,
    FusionConfig,
    HeadConfig,
    InputConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    PyramidConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
    differences,
    flatten,
    validate,
)


def _model(**fields: Any) -> Config:
    return Config(model=ModelConfig(**fields))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_model(anchors=AnchorConfig((32, 64))), "has 2 entries, model.pyramid.strides 5"),
        (_model(pyramid=PyramidConfig(strides=(8, 16, 64)), anchors=AnchorConfig((1, 2, 3))), r"\(8, 16, 64\)"),
        (_model(pyramid=PyramidConfig(channels=100)), "channels 100 is not a multiple of model.head.groups 16"),
        (_model(text=TextConfig(width=100)), "model.text.width 100 is not a multiple of model.text.heads 12"),
        (_model(fusion=FusionConfig(width=100)), "model.fusion.width 100"),
        (_model(text=TextConfig(max_tokens=600)), "max_tokens 600 exceeds model.text.positions 512"),
        (_model(backbone=BackboneConfig(heads=(5, 6, 12, 24))), r"heads \(5, 6, 12, 24\) do not divide width 96"),
        (_model(head=HeadConfig(blocks=6, unroll=4)), "blocks 6 is not a multiple of model.head.unroll 4"),
        (
            _model(backbone=BackboneConfig(kind="efficientnet_lite0"), input=InputConfig(extent_multiple=16)),
            "extent_multiple is 16",
        ),
        (Config(train=TrainConfig(batch_size=6), optimizer=OptimizerConfig(accumulate=4)), "batch_size 6 .* 4"),
        (Config(train=TrainConfig(steps=0)), "train.steps is 0"),
        (Config(checkpoint=CheckpointConfig(every=0)), "checkpoint.every is 0"),
        (Config(mesh=MeshConfig(data=-1, fsdp=-1)), "more than one -1"),
        (Config(optimizer=OptimizerConfig(ema_decay=1.0)), "ema_decay is 1.0"),
        (Config(data=DataConfig(sources={"coco": SourceConfig("x", weight=0.0)})), "data.sources.coco.weight is 0.0"),
        (Config(data=DataConfig(sources={"a": SourceConfig("x", 2.0, 3)})), "a has weight 2.0 and copies 3"),
        (
            Config(data=DataConfig(sources={"a": SourceConfig("x", 2.0), "b": SourceConfig("y", copies=3)})),
            "sources.a has weight 2.0, data.sources.b has copies",
        ),
        (Config(data=DataConfig(sources={"a": SourceConfig("x", copies=-1)})), "a.copies is -1"),
        (Config(data=DataConfig(flip=1.5)), "data.flip is 1.5"),
        (Config(data=DataConfig(crop=CropConfig(min_side=0.0))), "crop.min_side is 0.0"),
        (Config(data=DataConfig(max_corrupt_rate=2.0)), "max_corrupt_rate is 2.0"),
        (
            Config(data=DataConfig(captions=CaptionConfig(one_negative_probability=0.6))),
            "full_probability 0.5, one_negative_probability 0.6 .* add up to 1.1",
        ),
        (Config(data=DataConfig(captions=CaptionConfig(packing=PackingConfig(-1)))), "packing.number is -1"),
    ],
)
def test_contradictions_name_the_setting_and_both_values(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_the_default_is_valid() -> None:
    assert validate(Config()) == Config()


def test_differences_list_settings_that_affect_results() -> None:
    old = Config(data=DataConfig(sources={"coco": SourceConfig("x")}))
    saved = json.loads(json.dumps(dict(flatten(old))))
    assert differences(saved, old) == []
    runtime = dataclasses.replace(
        old,
        data=dataclasses.replace(old.data, workers=3, prefetch=1),
        train=dataclasses.replace(old.train, log_every=1, evaluate_every=7),
        checkpoint=CheckpointConfig(every=5),
        mesh=MeshConfig(fsdp=2),
    )
    assert differences(saved, runtime) == []
    other = dataclasses.replace(
        old,
        data=dataclasses.replace(old.data, sources={"coco": SourceConfig("x", 2.0), "new": SourceConfig("y")}),
        optimizer=OptimizerConfig(rate=3e-4),
    )
    assert differences(saved, other) == [
        "data.sources.coco.weight: 1.0 -> 2.0",
        "data.sources.new.box_weight: (absent) -> one",
        "data.sources.new.copies: (absent) -> 0",
        "data.sources.new.negatives: (absent) -> []",
        "data.sources.new.path: (absent) -> y",
        "data.sources.new.threshold: (absent) -> 0.0",
        "data.sources.new.weight: (absent) -> 1.0",
        "optimizer.rate: 0.0001 -> 0.0003",
    ]
    del saved["model.head.offset_bound"]
    assert differences(saved, old) == []  # saved before the field existed, without a bound
    bounded = dataclasses.replace(old, model=ModelConfig(head=HeadConfig(offset_bound=4)))
    assert differences(saved, bounded) == ["model.head.offset_bound: 0 -> 4"]
    assert differences({**saved, "gone.setting": 1}, old) == ["gone.setting: 1 -> (absent)"]


def test_every_field_belongs_to_one_class() -> None:
    everything = {name for name, _ in flatten(Config())}
    results = {name for name, _ in flatten(Config(), affects_results=True)}
    runtime = {name for name, _ in flatten(Config(), affects_results=False)}
    assert results | runtime == everything and not results & runtime
    assert "optimizer.rate" in results and "train.log_every" in runtime and "mesh.data" in runtime
