"""Every setting of glip_jax once: type, unit, default.

A file in `configs/` returns a `Config`; the command line overrides single fields. Fields declared with
`affects_results=False` change cadence, logging or placement but no number that training produces; every other field
changes numbers, so a resumed run refuses a difference in it (see `differences`).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from glip_jax import UserError
from glip_jax.config.data import (
    CaptionConfig,
    Codec,
    CropConfig,
    DataConfig,
    JitterConfig,
    PackingConfig,
    SourceConfig,
    data_checks,
)
from glip_jax.config.data import runtime_field as _runtime_field
from glip_jax.config.model import (
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
    "PyramidConfig", "Remat", "SourceConfig", "TextConfig", "TrainConfig", "flatten", "validate",
]  # fmt: skip


class ConfigError(UserError, ValueError):
    """A setting, or a pair of settings, that cannot be."""


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
    log_every: int = _runtime_field(10)
    evaluate_every: int = _runtime_field(0)
    """Steps between evaluations of `evaluation.sets`; 0: only at the end, -1: never (the job `evaluate` follows)."""
    draw_first_batch: bool = _runtime_field(True)
    profile: tuple[int, ...] = _runtime_field(())
    """First and last step to profile, as 20,25; a file WORKDIR/profile asks for the next ones while the run goes."""
    hang_multiple: float = _runtime_field(20.0)
    """A step that takes so many times the usual (the median of 50) leaves the stacks of all threads in WORKDIR; 0: never."""
    hang_min: float = _runtime_field(120.0)
    """But not before so many seconds."""
    hang_first: float = _runtime_field(3600.0)
    """So does, after so many seconds, a step that has to be compiled, or one of the first, of which nothing is usual yet."""
    wandb: str = _runtime_field("")
    """Project of Weights & Biases that gets the numbers as well (requirements-wandb.txt); empty: none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, how many to keep."""

    every: int = _runtime_field(1000)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = _runtime_field(3)
    """The newest so many are kept, the last step's among them."""
    keep_every: int = _runtime_field(0)
    """Those of steps that are multiples of this are kept as well, for ever; 0: none."""
    best: int = _runtime_field(0)
    """So many of the highest `best_by` are kept as well."""
    best_by: str = _runtime_field("")
    """A number of evaluations during training, `evaluation/SET/NUMBER` as in metrics.jsonl, e.g. evaluation/coco/AP; checkpoints
    of steps that were not evaluated are not among the best (see `train.evaluate_every`)."""


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
    batch_size: int = _runtime_field(8)
    short_side: int = 800
    long_side: int = 1333
    max_images: int = _runtime_field(0)
    """First so many images of each set; 0: all."""
    chunk: int = 0
    """Names per prompt; 0: as many as the token budget admits."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 in one place: the rest."""

    data: int = _runtime_field(-1)
    fsdp: int = _runtime_field(1)
    tensor: int = _runtime_field(1)


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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"affects_results": False})
    mesh: MeshConfig = MeshConfig()


def flatten(config: Any, prefix: str = "", affects_results: bool | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf field; `affects_results` keeps only fields of that class."""

    def walk(value: Any, name: str, counts: bool) -> Iterator[tuple[str, Any]]:
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                inner = f"{name}.{item.name}" if name else item.name
                yield from walk(getattr(value, item.name), inner, counts and item.metadata.get("affects_results", True))
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}", counts)
        elif affects_results is None or affects_results == counts:
            yield name, value

    yield from walk(config, prefix, True)


def validate(config: Config) -> Config:
    """Returns `config` if its settings fit together; raises ConfigError naming both values otherwise."""
    checks = [
        *model_checks(config.model),
        (config.train.batch_size % config.optimizer.accumulate == 0,
         f"train.batch_size {config.train.batch_size} is not a multiple of optimizer.accumulate {config.optimizer.accumulate}"),
        (config.train.steps > 0, f"train.steps is {config.train.steps}: expected at least 1"),
        (config.train.batch_size > 0, f"train.batch_size is {config.train.batch_size}: expected at least 1"),
        (config.checkpoint.every > 0, f"checkpoint.every is {config.checkpoint.every}: expected at least 1"),
        *_cadence_checks(config),
        (sum(n == -1 for n in (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)) <= 1,
         f"mesh has more than one -1: data {config.mesh.data}, fsdp {config.mesh.fsdp}, tensor {config.mesh.tensor}"),
        (0 <= config.optimizer.ema_decay < 1, f"optimizer.ema_decay is {config.optimizer.ema_decay}: expected 0 <= decay < 1"),
        *data_checks(config.data),
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


def _cadence_checks(config: Config) -> list[tuple[bool, str]]:
    keeping, every, train = config.checkpoint, config.train.evaluate_every, config.train
    parts = keeping.best_by.split("/", 2)
    named = len(parts) == 3 and parts[0] == "evaluation" and parts[1] in config.evaluation.sets
    return [
        (not train.profile or (len(train.profile) == 2 and 0 < train.profile[0] <= train.profile[1]),
         f"train.profile is {','.join(map(str, train.profile))}: expected the first and the last step to profile, as 20,25"),
        (train.hang_multiple == 0 or train.hang_multiple > 1,
         f"train.hang_multiple is {train.hang_multiple:g}: expected more than 1, or 0 (no watch)"),
        (train.hang_min > 0, f"train.hang_min is {train.hang_min:g}: expected more than 0 seconds"),
        (train.hang_first > 0, f"train.hang_first is {train.hang_first:g}: expected more than 0 seconds"),
        (keeping.keep > 0, f"checkpoint.keep is {keeping.keep}: expected at least 1"),
        (keeping.keep_every >= 0, f"checkpoint.keep_every is {keeping.keep_every}: expected 0 (none) or more"),
        (keeping.keep_every % max(1, keeping.every) == 0,
         f"checkpoint.keep_every {keeping.keep_every} is not a multiple of checkpoint.every {keeping.every}, so there would be none"),
        (keeping.best >= 0, f"checkpoint.best is {keeping.best}: expected 0 (none) or more"),
        (not keeping.best or named,
         f"checkpoint.best is {keeping.best}, and checkpoint.best_by {keeping.best_by!r}: expected evaluation/SET/NUMBER with a set of "
         f"evaluation.sets ({', '.join(config.evaluation.sets) or 'there are none'})"),
        (not keeping.best or every > 0,
         f"checkpoint.best is {keeping.best}, and train.evaluate_every {every}: only what is evaluated during training can be the best"),
    ]  # fmt: skip
