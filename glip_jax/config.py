"""Every setting of glip_jax once: type, unit, default.

A file in `configs/` returns a `Config`; the command line overrides single fields. Fields declared with
`numbers=False` change cadence, logging or placement but no number that training produces; every other field
changes numbers, so a resumed run refuses a difference in it (see `differences`).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from glip_jax.model_config import (
    AnchorConfig,
    BackboneConfig,
    FusionConfig,
    HeadConfig,
    InputConfig,
    ModelConfig,
    PyramidConfig,
    Remat,
    TextConfig,
    model_checks,
)

__all__ = [
    "AnchorConfig", "BackboneConfig", "CaptionConfig", "CheckpointConfig", "Codec", "Config", "ConfigError", "CropConfig",
    "DataConfig", "DetectionConfig", "EvaluationConfig", "EvaluationSet", "FusionConfig", "HeadConfig", "InitFromConfig",
    "InputConfig", "JitterConfig", "LossConfig", "MeshConfig", "ModelConfig", "OptimizerConfig", "PackingConfig",
    "PyramidConfig", "Remat", "SourceConfig", "TextConfig", "TrainConfig", "differences", "flatten", "validate",
]  # fmt: skip


Codec = Literal["fast", "pillow"]
"""How images of training are resized: OpenCV's bilinear filter on what libjpeg-turbo decoded, or Pillow's, as the original."""


class ConfigError(ValueError):
    """A setting, or a pair of settings, that cannot be."""


def _free(default: Any) -> Any:
    """A field that changes no number of the training."""
    return field(default=default, metadata={"numbers": False})


@dataclass(frozen=True)
class LossConfig:
    """Token focal loss, GIoU, centerness; assignment by ATSS."""

    box_weight: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    atss_candidates: int = 9
    """Nearest anchors per level and box."""
    positives_floor: float = 1.0
    """Least denominator of token and centerness loss (the original: its number of GPUs)."""
    last_token_negative: bool = True
    """False: unmatched anchors carry target 1 on the last token slot, as in the original."""


@dataclass(frozen=True)
class DetectionConfig:
    """From logits to boxes."""

    threshold: float = 0.05
    """Least mean token probability of a candidate, before centerness."""
    candidates_per_level: int = 1000
    nms_iou: float = 0.6
    max_detections: int = 100


@dataclass(frozen=True)
class SourceConfig:
    """One source of the mixture: a folder of shards with a manifest."""

    path: str
    weight: float = 1.0
    """Share of examples relative to the other sources' weights; must be positive."""
    copies: int = 0
    """Instead of a weight, as in the original: the share is copies x records. Of all sources or of none; 0: by weight."""
    box_weight: Literal["one", "score"] = "one"
    """What a box of the source counts in the losses: 1, as in the original, or its teacher's score (pseudo records)."""
    least_score: float = 0.0
    """Pseudo records: boxes of this score or less are left out, counted as `boxes_unsure`; where the phrase has no other,
    it is not known where it is. 0.5 in GLIP-L, where the words then count as absent (glip-reference 4.6)."""
    negatives: tuple[str, ...] = ()
    """More names that may be drawn as negatives: the user says that they are absent from every image of the source
    (one that is a name of the source or a phrase of the image is never drawn)."""


@dataclass(frozen=True)
class PackingConfig:
    """Negative text beside the caption of a grounding or pseudo record, taken from elsewhere (glip-reference 4.6).

    GLIP-T packs nothing, which is the default; GLIP-L packs `number=20` captions with these probabilities.
    """

    number: int = 0
    """Most texts packed with a caption; 0 leaves every caption as it is."""
    none_probability: float = 0.4
    """Chance of packing none."""
    full_probability: float = 0.5
    """Chance, where it is not none, of packing `number`; otherwise a uniform number from 0 to number - 1."""
    take: Literal["captions", "phrases", "names"] = "captions"
    """`captions` of other records of the source, their `phrases` with boxes, or the source's `negatives`."""
    kinds: tuple[Literal["pseudo", "grounding"], ...] = ("pseudo",)


@dataclass(frozen=True)
class CaptionConfig:
    """How a record becomes a caption (defaults: the original's, glip-reference 1.7 and 4.2).

    The number of negative names is `max_negatives` (or as many as there are) with `full_probability`, 1 with
    `one_negative_probability`, 0 with `one_positive_probability`, and otherwise uniform from 1 to that number.
    """

    mode: Literal["sampled", "all_names"] = "sampled"
    """`all_names`: every name of the source in its order (shuffled if `shuffle`), as in fine-tuning (4.3)."""
    separator: str = ". "
    max_negatives: int = 85
    full_probability: float = 0.5
    one_negative_probability: float = 0.0
    one_positive_probability: float = 0.0
    drop_positive_probability: float = 0.0
    """Chance of keeping only a uniform number, at least 1, of the positive names, and their boxes. The original names it
    but refuses any value except 0."""
    hard_share: float = 0.0
    """Share of the negatives (names or packed phrases) drawn from those most like the positives in words and letters."""
    shuffle: bool = True
    words_without_box: Literal["negative", "unknown"] = "negative"
    """Words of grounding and pseudo captions that are in no box's phrase: negative everywhere, as in the original, or
    unknown, so that they give no loss where no box is."""
    packing: PackingConfig = PackingConfig()


@dataclass(frozen=True)
class CropConfig:
    """Random crop, before the resize; the original has none."""

    probability: float = 0.0
    least_side: float = 0.5
    """Least share of height and of width that stays, each drawn anew."""
    least_visible: float = 0.4
    """Boxes of which a smaller share of the area stays visible are dropped, counted as `boxes_out_of_view`."""


@dataclass(frozen=True)
class JitterConfig:
    """Random colours, after the resize; the original has none. Factors are uniform in 1 - x to 1 + x."""

    probability: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    """Turn of the colour circle, uniform in -x to x; 0.5 is its opposite side."""


@dataclass(frozen=True)
class DataConfig:
    """The mixture and what happens to an example before it is batched."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    captions: CaptionConfig = CaptionConfig()
    short_sides: tuple[int, ...] = (480, 560, 640, 720, 800)
    """Candidate lengths of the short side, pixels; one per step."""
    long_side: int = 1333
    """Upper bound of the long side, pixels."""
    aspects: tuple[float, ...] = (0.666667, 0.75, 1.0, 1.333333, 1.5)
    """Height / width of the canvases; each record goes to the nearest (in log). Each pair of short side and aspect is one compiled shape."""
    codec: Codec = "fast"
    """`pillow`: the original's pixels, at a third of the speed."""
    flip: float = 0.5
    """Chance of mirroring left and right."""
    flip_captions: Literal["as_is", "safe"] = "as_is"
    """`safe`: examples whose caption or names say left or right are not mirrored. The original mirrors them as they are."""
    crop: CropConfig = CropConfig()
    jitter: JitterConfig = JitterConfig()
    max_boxes: int = 100
    """Box slots per image; more are cut, counted as `boxes_over_limit`."""
    workers: int = _free(0)
    """Grain worker processes; 0 reads in threads of this process."""
    threads: int = _free(4)
    prefetch: int = _free(8)
    """Batches read ahead."""
    max_corrupt_rate: float = _free(0.01)
    """A run stops where more than this share of a source's examples, counted over `corrupt_window`, is corrupt."""
    corrupt_window: int = _free(1000)
    """Examples of a source."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the original's parameter groups (glip-reference 1.6)."""

    rate: float = 1e-4
    text_rate: float = 1e-5
    """Rate of the text encoder (not of the BERT layers inside the head)."""
    backbone_rate_factor: float = 1.0
    head_text_rate_factor: float = 1.0
    """Of the head's own BERT layers."""
    bias_rate_factor: float = 2.0
    decay: float = 1e-4
    bias_decay: float = 0.0
    decay_milestone_factor: float = 1.0
    """What both decays are multiplied by at `decay_milestone_share` of the way to each milestone; GLIP-L: 0.1."""
    decay_milestone_share: float = 0.667
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_steps: int = 2000
    warmup_factor: float = 0.001
    milestones: tuple[float, ...] = (0.67, 0.89)
    """Fractions of `train.steps` at which the rate is multiplied by `milestone_factor`."""
    milestone_factor: float = 0.1
    clip_norm: float = 1.0
    """Bound of the global gradient norm; 0 switches clipping off."""
    ema_decay: float = 0.999
    """Decay per step of the moving average of parameters; 0 switches it off."""
    accumulate: int = 1
    """Micro-batches per step."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and cadence."""

    steps: int = 1000
    batch_size: int = 64
    """Examples per step over all hosts."""
    seed: int = 0
    log_every: int = _free(10)
    evaluate_every: int = _free(0)
    """Steps between evaluations of `evaluation.sets`; 0: only at the end, -1: never (the job `evaluate` follows)."""
    draw_first_batch: bool = _free(True)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, how many to keep."""

    every: int = _free(1000)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = _free(3)


@dataclass(frozen=True)
class InitFromConfig:
    """What a run starts from: local or gs:// paths, or package:NAME/...; empty means random.

    Random values first, then `model`, then `backbone` and `text`; each takes the parameters that `load` and `skip` say.
    """

    model: str = ""
    """A whole network: GLIP's or mmdetection's .pth, an exported Hugging Face folder, or a working folder of ours."""
    backbone: str = ""
    """ImageNet weights: Swin as its authors, timm or Hugging Face store it, or EfficientNet-Lite0's .pth."""
    text: str = ""
    """Folder of a Hugging Face BERT (config.json, model.safetensors or pytorch_model.bin)."""
    backbone_channels: Literal["as_stored", "reversed"] = "as_stored"
    """Order of the first convolution's input channels in `backbone`. Files are for RGB; the original feeds BGR into them
    as they are stored. `reversed` exchanges R and B, so that they fit model.input.order bgr."""
    load: tuple[str, ...] = ("*",)
    """What to take of every file: patterns of our parameters' paths (as in WORKDIR/parameters.txt), in which * is any run of
    characters, slashes included: `head/*` is the whole head. What no pattern matches keeps its value."""
    skip: tuple[str, ...] = ()
    """Patterns of what not to take although `load` matches it."""


@dataclass(frozen=True)
class EvaluationSet:
    """A JSON of annotations with its pictures."""

    annotations: str
    """COCO detection JSON, or MDETR's grounding JSON where `kind` says so."""
    images: str
    names: dict[str, str] = field(default_factory=dict)
    """Detection: prompt text for names that mean nothing to a text encoder, e.g. RBC -> red blood cell."""
    kind: Literal["detection", "grounding"] = "detection"
    """`detection`: COCO's AP with every category as a prompt; `grounding`: recall of each caption's phrases."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated during and after training."""

    sets: dict[str, EvaluationSet] = field(default_factory=dict)
    parameters: Literal["ema", "raw"] = "ema"
    batch_size: int = _free(8)
    short_side: int = 800
    long_side: int = 1333
    max_images: int = _free(0)
    """First so many images of each set; 0: all."""
    chunk: int = 0
    """Names per prompt; 0: as many as the token budget admits."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 in one place: the rest."""

    data: int = _free(-1)
    fsdp: int = _free(1)
    tensor: int = _free(1)


@dataclass(frozen=True)
class Config:
    """A run."""

    name: str = "run"
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    detection: DetectionConfig = DetectionConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init_from: InitFromConfig = InitFromConfig()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"numbers": False})
    mesh: MeshConfig = MeshConfig()


def flatten(config: Any, prefix: str = "", numbers: bool | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf field; `numbers` keeps only fields of that class."""

    def walk(value: Any, name: str, counts: bool) -> Iterator[tuple[str, Any]]:
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                inner = f"{name}.{item.name}" if name else item.name
                yield from walk(getattr(value, item.name), inner, counts and item.metadata.get("numbers", True))
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}", counts)
        elif numbers is None or numbers == counts:
            yield name, value

    yield from walk(config, prefix, True)


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """Lines 'field: saved value -> new value' for every number-changing field in which `config` differs.

    `saved` is `dict(flatten(...))` of the earlier run, possibly through JSON (tuples became lists).
    """

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    free = {name for name, _ in flatten(config, numbers=False)}
    new = dict(flatten(config, numbers=True))
    lines = []
    for name in sorted(set(saved) - free | set(new)):
        if name.startswith(("evaluation.", "mesh.")):
            continue
        old_value, new_value = plain(saved.get(name, "(absent)")), plain(new.get(name, "(absent)"))
        if old_value != new_value:
            lines.append(f"{name}: {old_value} -> {new_value}")
    return lines


def validate(config: Config) -> Config:
    """Returns `config` if its settings fit together; raises ConfigError naming both values otherwise."""
    checks = [
        *model_checks(config.model),
        (config.train.batch_size % config.optimizer.accumulate == 0,
         f"train.batch_size {config.train.batch_size} is not a multiple of optimizer.accumulate {config.optimizer.accumulate}"),
        (config.train.steps > 0, f"train.steps is {config.train.steps}: expected at least 1"),
        (config.train.batch_size > 0, f"train.batch_size is {config.train.batch_size}: expected at least 1"),
        (config.checkpoint.every > 0, f"checkpoint.every is {config.checkpoint.every}: expected at least 1"),
        (sum(n == -1 for n in (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)) <= 1,
         f"mesh has more than one -1: data {config.mesh.data}, fsdp {config.mesh.fsdp}, tensor {config.mesh.tensor}"),
        (0 <= config.optimizer.ema_decay < 1, f"optimizer.ema_decay is {config.optimizer.ema_decay}: expected 0 <= decay < 1"),
        *_data_checks(config.data),
    ]  # fmt: skip
    for name, dataset in config.evaluation.sets.items():
        checks.append(
            (dataset.kind in ("detection", "grounding"),
             f"evaluation.sets.{name}.kind is {dataset.kind!r}: expected detection or grounding")
        )  # fmt: skip
        checks.append(
            (dataset.kind == "detection" or not dataset.names,
             f"evaluation.sets.{name}.names has {len(dataset.names)} entries, its kind is grounding: there the captions "
             "are the prompts; remove the names")
        )  # fmt: skip
    for fits, message in checks:
        if not fits:
            raise ConfigError(message)
    return config


def _data_checks(data: DataConfig) -> list[tuple[bool, str]]:
    """What the settings of the data must keep, each with the message for where it is broken."""
    captions, packing = data.captions, data.captions.packing
    chances = {
        "flip": data.flip, "crop.probability": data.crop.probability, "jitter.probability": data.jitter.probability,
        "captions.full_probability": captions.full_probability, "captions.hard_share": captions.hard_share,
        "captions.one_negative_probability": captions.one_negative_probability,
        "captions.one_positive_probability": captions.one_positive_probability,
        "captions.drop_positive_probability": captions.drop_positive_probability,
        "captions.packing.none_probability": packing.none_probability,
        "captions.packing.full_probability": packing.full_probability, "max_corrupt_rate": data.max_corrupt_rate,
        "crop.least_visible": data.crop.least_visible, "crop.least_side": data.crop.least_side,
        "jitter.brightness": data.jitter.brightness, "jitter.contrast": data.jitter.contrast,
        "jitter.saturation": data.jitter.saturation, "jitter.hue": data.jitter.hue,
    }  # fmt: skip
    total = captions.full_probability + captions.one_negative_probability + captions.one_positive_probability
    checks = [(0 <= value <= 1, f"data.{name} is {value}: expected 0 to 1") for name, value in chances.items()]
    checks += [
        (total <= 1 + 1e-9,
         f"data.captions: full_probability {captions.full_probability}, one_negative_probability {captions.one_negative_probability} "
         f"and one_positive_probability {captions.one_positive_probability} add up to {total:g}: expected at most 1"),
        (captions.max_negatives >= 0, f"data.captions.max_negatives is {captions.max_negatives}: expected 0 or more"),
        (packing.number >= 0, f"data.captions.packing.number is {packing.number}: expected 0 or more"),
        (data.crop.least_side > 0, f"data.crop.least_side is {data.crop.least_side}: expected more than 0"),
        (data.corrupt_window > 0, f"data.corrupt_window is {data.corrupt_window}: expected at least 1"),
    ]  # fmt: skip
    copied = [name for name, source in data.sources.items() if source.copies]
    for name, source in data.sources.items():
        checks += [
            (source.weight > 0, f"data.sources.{name}.weight is {source.weight}: remove the source instead of weight 0"),
            (0 <= source.least_score < 1,
             f"data.sources.{name}.least_score is {source.least_score}: expected 0 to less than 1"),
            (source.copies >= 0, f"data.sources.{name}.copies is {source.copies}: expected 0 (by weight) or more"),
            (not source.copies or source.weight == 1.0,
             f"data.sources.{name} has weight {source.weight} and copies {source.copies}: give one of them"),
            (bool(source.copies) == bool(copied),
             f"data.sources.{name} goes by weight {source.weight}, data.sources.{copied[0] if copied else ''} by copies: "
             "give all sources weights, or all copies"),
        ]  # fmt: skip
    return checks
