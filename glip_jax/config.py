"""Every setting of glip_jax once: type, unit, default.

A file in `configs/` returns a `Config`; the command line overrides single fields. Fields declared with
`numbers=False` change cadence, logging or placement but no number that training produces; every other field
changes numbers, so a resumed run refuses a difference in it (see `differences`).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "AnchorConfig", "BackboneConfig", "CaptionConfig", "CheckpointConfig", "Config", "ConfigError", "DataConfig",
    "DetectionConfig", "EvaluationConfig", "EvaluationSet", "FusionConfig", "HeadConfig", "InitFromConfig",
    "InputConfig", "LossConfig", "MeshConfig", "ModelConfig", "OptimizerConfig", "PyramidConfig", "Remat", "SourceConfig", "TextConfig",
    "TrainConfig", "differences", "flatten", "validate",
]  # fmt: skip


Remat = Literal["none", "elementwise", "blocks"]
"""What the backward pass computes again of Swin blocks, BERT layers and head blocks."""


class ConfigError(ValueError):
    """A setting, or a pair of settings, that cannot be."""


def _free(default: Any) -> Any:
    """A field that changes no number of the training."""
    return field(default=default, metadata={"numbers": False})


@dataclass(frozen=True)
class InputConfig:
    """Pixels in: uint8 RGB images become (pixel - mean) / std in `order`. Means are written in that order."""

    order: Literal["bgr", "rgb"] = "bgr"
    mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    std: tuple[float, float, float] = (57.375, 57.12, 58.395)
    extent_multiple: int = 32
    """An image's extent is its size rounded up to this many pixels."""
    extent: Literal["image", "batch"] = "image"
    """`image`: each image stands alone; `batch`: every image has the canvas as extent, as in the original."""


@dataclass(frozen=True)
class BackboneConfig:
    """Swin v1 of any size, or EfficientNet-Lite0. Swin's fields are ignored by the latter."""

    kind: Literal["swin", "efficientnet_lite0"] = "swin"
    width: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window: int = 7
    drop_path: float = 0.2
    """Rate of the last block; rates rise linearly from 0."""
    frozen_stages: int = 0
    """Stem and so many first stages get no gradient and stay in evaluation mode (GLIP-L: 1; EfficientNet-Lite0: 0-7)."""


@dataclass(frozen=True)
class PyramidConfig:
    """Feature pyramid. `strides` says which levels there are; consecutive powers of two from 8 or 16 on."""

    channels: int = 256
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    drop_block: float = 0.3
    """DropBlock rate in training on the merged laterals below the coarsest one; 0 switches it off."""
    drop_block_size: int = 3
    drop_block_over: Literal["image", "batch"] = "image"
    """What kept activations are renormalised over; the original: the batch of one GPU."""


@dataclass(frozen=True)
class TextConfig:
    """BERT encoder, in Hugging Face's sizes."""

    vocabulary: str = "assets/bert-base-uncased/vocab.txt"
    """Path of the WordPiece vocabulary, one token a line; relative paths are looked up from the working folder."""
    vocabulary_size: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    dropout: float = 0.1
    max_tokens: int = 256
    """Length of every prompt after padding, [CLS] and [SEP] included."""
    frozen: bool = False


@dataclass(frozen=True)
class FusionConfig:
    """Bidirectional image-text attention of each head block."""

    enabled: bool = True
    width: int = 2048
    heads: int = 8
    dropout: float = 0.1
    gamma: float = 1 / 6
    """Initial value of both residual scales."""


@dataclass(frozen=True)
class HeadConfig:
    """Tower of [fusion, BERT layer,] DyConv blocks and the three outputs."""

    blocks: int = 6
    groups: int = 16
    """Groups of GroupNorm."""
    coarse_offsets: Literal["flat", "resized"] = "resized"
    """Offsets for the coarser neighbour: the original's flat re-read, or the map resized bilinearly."""
    offset_scale: float = 1.0
    """Initial deformable offsets, relative to the original's; near 0 the head starts as regular convolutions."""
    log_scale: float = 0.0
    """Initial value of the alignment's log scale: logits are divided by its exponential."""
    box_scale: float = 1.0
    """Initial value of every level's scale of box deltas."""
    unroll: int = 1
    """Blocks per turn of the tower's loop. All of them: longer to compile, up to twice as fast on a CPU."""


@dataclass(frozen=True)
class AnchorConfig:
    """One square anchor per location and level, in pixels of the resized image."""

    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    input: InputConfig = InputConfig()
    backbone: BackboneConfig = BackboneConfig()
    pyramid: PyramidConfig = PyramidConfig()
    text: TextConfig = TextConfig()
    fusion: FusionConfig = FusionConfig()
    head: HeadConfig = HeadConfig()
    anchors: AnchorConfig = AnchorConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, statistics, boxes and losses are float32."""
    remat: Remat = "none"
    """`elementwise` computes norms, activations and dropout again, `blocks` all of a block but its inputs."""


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


@dataclass(frozen=True)
class CaptionConfig:
    """How a detection record becomes a caption (defaults: the original's, glip-reference 4.2)."""

    separator: str = ". "
    max_negatives: int = 85
    full_probability: float = 0.5
    """Chance of drawing `max_negatives`; otherwise a uniform number from 1 to it."""
    shuffle: bool = True


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
    flip: float = 0.5
    max_boxes: int = 100
    """Box slots per image; more are cut, counted as `boxes_over_limit`."""
    workers: int = _free(0)
    """Grain worker processes; 0 reads in threads of this process."""
    threads: int = _free(4)
    prefetch: int = _free(8)
    """Batches read ahead."""


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
    model, text = config.model, config.model.text
    strides = model.pyramid.strides
    checks = [
        (len(model.anchors.sizes) == len(strides),
         f"model.anchors.sizes has {len(model.anchors.sizes)} entries, model.pyramid.strides {len(strides)}: give one size per level"),
        (all(b == 2 * a for a, b in zip(strides, strides[1:])) and strides[0] in (8, 16) and strides[-1] >= 32,
         f"model.pyramid.strides is {strides}: expected consecutive powers of two from 8 or 16 to 32 or more"),
        (model.pyramid.channels % model.head.groups == 0,
         f"model.pyramid.channels {model.pyramid.channels} is not a multiple of model.head.groups {model.head.groups}"),
        (text.width % text.heads == 0, f"model.text.width {text.width} is not a multiple of model.text.heads {text.heads}"),
        (model.fusion.width % model.fusion.heads == 0,
         f"model.fusion.width {model.fusion.width} is not a multiple of model.fusion.heads {model.fusion.heads}"),
        (text.max_tokens <= text.positions,
         f"model.text.max_tokens {text.max_tokens} exceeds model.text.positions {text.positions}"),
        (all(model.backbone.width * 2**i % h == 0 for i, h in enumerate(model.backbone.heads)),
         f"model.backbone.heads {model.backbone.heads} do not divide width {model.backbone.width} times 1, 2, 4, 8"),
        (config.train.batch_size % config.optimizer.accumulate == 0,
         f"train.batch_size {config.train.batch_size} is not a multiple of optimizer.accumulate {config.optimizer.accumulate}"),
        (model.head.blocks % model.head.unroll == 0,
         f"model.head.blocks {model.head.blocks} is not a multiple of model.head.unroll {model.head.unroll}"),
        (model.backbone.kind == "swin" or model.input.extent_multiple % 32 == 0,
         f"model.input.extent_multiple is {model.input.extent_multiple}: efficientnet_lite0 needs a multiple of 32"),
        (config.train.steps > 0, f"train.steps is {config.train.steps}: expected at least 1"),
        (config.train.batch_size > 0, f"train.batch_size is {config.train.batch_size}: expected at least 1"),
        (config.checkpoint.every > 0, f"checkpoint.every is {config.checkpoint.every}: expected at least 1"),
        (sum(n == -1 for n in (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)) <= 1,
         f"mesh has more than one -1: data {config.mesh.data}, fsdp {config.mesh.fsdp}, tensor {config.mesh.tensor}"),
        (0 <= config.optimizer.ema_decay < 1, f"optimizer.ema_decay is {config.optimizer.ema_decay}: expected 0 <= decay < 1"),
    ]  # fmt: skip
    for name, source in config.data.sources.items():
        checks.append(
            (source.weight > 0, f"data.sources.{name}.weight is {source.weight}: remove the source instead of weight 0")
        )
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
