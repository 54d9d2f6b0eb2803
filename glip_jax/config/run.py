"""Settings of a run: type, unit, default. Offered by `glip_jax.config`.

A file in `configs/` returns a `Config`; the command line overrides single fields. Fields with `affects_results=False`
(`runtime_field`) change intervals, logging or placement, but not the results of training. A resumed run refuses a difference
in any other field (`glip_jax.config.saved.differences`).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from glip_jax import UserError
from glip_jax.config.data import AssetStr, DataConfig, PathStr, data_checks
from glip_jax.config.data import runtime_field as _runtime_field
from glip_jax.config.model import ModelConfig, model_checks
from glip_jax.config.ranges import BelowOne, Count, Factor, Fraction, Limit, Pixels, Range, Seconds, Size, Steps, faults

__all__ = [
    "CheckpointConfig", "Config", "ConfigError", "DetectionConfig", "EvaluationConfig", "EvaluationSet", "InitFromConfig", "LossConfig",
    "MeshConfig", "OptimizerConfig", "Orientation", "TrainConfig", "flatten", "validate",
]  # fmt: skip


_Axis = Annotated[int, Range(1, 1_000_000, "devices", also=(-1,))]


class ConfigError(UserError, ValueError):
    """An invalid setting, or settings that contradict each other."""


@dataclass(frozen=True)
class LossConfig:
    """Losses (token focal loss, GIoU, centerness) and assignment of anchors to boxes (ATSS)."""

    box_weight: Factor = 2.0
    """Weight of the GIoU loss."""
    focal_alpha: Fraction = 0.25
    focal_gamma: Annotated[float, Range(0, 100)] = 2.0
    atss_candidates: Size = 9
    """Nearest anchors per level and box that ATSS considers."""
    positives_floor: Annotated[float, Range(0, 1e9, above=True)] = 1.0
    """Minimum denominator of token and centerness loss (the original uses its number of GPUs)."""
    presence_weight: Factor = 1.0
    """Weight of the loss of `model.head.presence`."""
    last_token_negative: bool = True
    """False: the target of unmatched anchors is 1 at the last token slot, as in the original."""
    description_weight: Factor = 0.0
    """Weight of the side loss on descriptions (`data.captions.descriptions.file`): at the anchors of a described name, 1 - cosine of its
    description's vector and of a linear head on the visual features. The head is for training only, and left out of every export."""


@dataclass(frozen=True)
class DetectionConfig:
    """Post-processing: from logits to detections."""

    threshold: Fraction = 0.05
    """Score threshold: minimum alignment of a candidate, before it is combined with centerness."""
    token_scores: Literal["mean", "max"] = "mean"
    """Alignment of a phrase: mean probability of its tokens, or their maximum, as referring expressions are evaluated."""
    candidates_per_level: Size = 1000
    """Maximum number of candidates per level that enter non-maximum suppression."""
    nms_iou: Fraction = 0.6
    max_detections: Size = 100
    """Maximum number of detections per image and prompt."""
    sinks: Annotated[int, Range(0, 64, "tokens")] = 0
    """Tokens without a meaning behind those of every prompt, so that attention can choose nothing; a location that fits one of them better
    than every phrase gives no detection. For networks with fusion, also trained ones. Where one or few absent names are asked: fewer
    false alarms."""
    sink_start: str = "random"
    """States of the sinks before fusion: `random` numbers in the range of the text encoder's states, or the mean state of any other text."""
    sink_seed: Limit = 0
    """Which random numbers. `python -m benchmarks.sinks` compares seeds and texts on a few images."""
    name_decay: Factor = 0.0
    """How much a box of a list of names gives way to one of another name in its place that has a higher score: its score is multiplied by
    (own / higher) to this power, a Soft-NMS between names. 0: names do not compete, as in the original. Phrases of captions never do."""
    name_decay_iou: Fraction = 0.7
    """IoU above which two boxes are in one place for `name_decay`."""
    rivals: tuple[str, ...] = ()
    """Names that are asked beside those of every list, and whose boxes are dropped: what they take by `name_decay` is not found under
    a name that is not there. Costs their prompts."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or another optimizer of optax, with GLIP's parameter groups (glip-reference 1.6)."""

    name: str = "adamw"
    """adamw, or another optimizer of optax by its name there: sgd, lion, adafactor, ..., contrib.muon."""
    arguments: dict[str, Annotated[float, Range(-1e9, 1e9)]] = field(default_factory=dict)
    """Arguments of that optimizer in optax, such as momentum of sgd; not its learning rate and weight decay. Set in a config file."""
    rate: Factor = 1e-4
    """Base learning rate."""
    text_rate: Factor = 1e-5
    """Learning rate of the text encoder (not of the BERT layers inside the head)."""
    backbone_rate_factor: Factor = 1.0
    """Factor on `rate` for the backbone."""
    head_text_rate_factor: Factor = 1.0
    """Factor on `rate` for the BERT layers of the head."""
    bias_rate_factor: Factor = 2.0
    """Factor on the rate for biases."""
    decay: Factor = 1e-4
    """Weight decay."""
    bias_decay: Factor = 0.0
    """Weight decay of biases."""
    decay_milestone_factor: Factor = 1.0
    """Factor on both weight decays, applied once per milestone at `decay_milestone_share` of its step; GLIP-L: 0.1."""
    decay_milestone_share: Fraction = 0.667
    beta1: BelowOne = 0.9
    """Of adamw, as beta2 and epsilon; other optimizers have `arguments`."""
    beta2: BelowOne = 0.999
    epsilon: Annotated[float, Range(0, 1, above=True)] = 1e-8
    warmup_steps: Annotated[int, Range(0, 1_000_000_000, "steps")] = 2000
    """Steps of linear warmup."""
    warmup_factor: Fraction = 0.001
    """Factor on the rate at the first step."""
    milestones: tuple[Annotated[float, Range(0, 1, "(fractions of train.steps)")], ...] = (0.67, 0.89)
    """Fractions of `train.steps` after which the rate is multiplied by `milestone_factor`."""
    milestone_factor: Factor = 0.1
    clip_norm: Annotated[float, Range(0, 1e9)] = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    ema_decay: BelowOne = 0.999
    """Decay per step of the exponential moving average (EMA) of the parameters; 0 disables it."""
    ema_ramp: bool = True
    """The decay of step n, from 0, is at most (1 + n) / (10 + n), so that the averages soon forget the initial parameters. False: it is
    `ema_decay` from the first step, as in the original code. A run that began without the ramp resumes without it."""
    accumulate: Size = 1
    """Micro-batches per step (gradient accumulation)."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of training, and intervals of logging, evaluation and profiling."""

    steps: Steps = 1000
    """Optimizer steps."""
    batch_size: Size = 64
    """Examples per step over all hosts."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of initial parameters, data order, augmentation and dropout."""
    log_every: Steps = _runtime_field(10)
    """Steps between lines of metrics."""
    evaluate_every: Annotated[int, Range(0, 1_000_000_000, "steps", also=(-1,))] = _runtime_field(0)
    """Steps between evaluations of `evaluation.sets`; 0: only at the end, -1: never (for runs that are followed by `evaluate`)."""
    draw_first_batch: bool = _runtime_field(True)
    """Write the first batch as an image, WORKDIR/first_batch.png."""
    profile: tuple[Steps, ...] = _runtime_field(())
    """First and last step to profile, as 20,25. Creating the file WORKDIR/profile profiles the next steps of a running job."""
    hang_multiple: Annotated[float, Range(1, 1e9, above=True, also=(0,))] = _runtime_field(20.0)
    """Watchdog: a step that takes this many times the median of the last 50 steps writes the stacks of all threads to WORKDIR; 0: off."""
    hang_min: Seconds = _runtime_field(120.0)
    """Minimum time before the watchdog reacts, seconds."""
    hang_first: Seconds = _runtime_field(3600.0)
    """Time limit of the watchdog for first steps and steps that compile, seconds."""
    wandb: str = _runtime_field("")
    """Weights & Biases project that also receives the metrics (requirements-wandb.txt); empty: none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every: Steps = _runtime_field(1000)
    """Steps between checkpoints; the last step, and one that is evaluated, is always saved."""
    keep: Count = _runtime_field(3)
    """Number of newest checkpoints that are kept."""
    keep_every: Limit = _runtime_field(0)
    """Checkpoints of steps that are multiples of this are never removed; 0: none."""
    best: Limit = _runtime_field(0)
    """Number of checkpoints with the highest `best_by` that are kept as well."""
    best_by: str = _runtime_field("")
    """Metric of evaluations during training, `evaluation/SET/METRIC` as in metrics.jsonl, e.g. evaluation/coco/AP. Only
    checkpoints of evaluated steps can be best (see `train.evaluate_every`)."""


@dataclass(frozen=True)
class InitFromConfig:
    """Files that the initial parameters are read from: local or gs:// paths, or package:NAME/...; empty: random values.

    `model` overwrites random values, `backbone` and `text` overwrite `model`. `load` and `skip` select parameters.
    """

    model: AssetStr = ""
    """A whole network: .pth of GLIP or mmdetection, an exported Hugging Face folder, or a working folder or delta of glip_jax."""
    backbone: AssetStr = ""
    """ImageNet weights: Swin in the format of its authors, timm or Hugging Face, or the .pth of EfficientNet-Lite0."""
    text: AssetStr = ""
    """Folder of a Hugging Face BERT (config.json, model.safetensors or pytorch_model.bin)."""
    backbone_channels: Literal["as_stored", "reversed"] = "as_stored"
    """Input channels of the first convolution in `backbone`. Files expect RGB; the original feeds BGR into them unchanged
    (`as_stored`). `reversed` exchanges R and B, so that the weights fit model.input.order bgr."""
    load: tuple[str, ...] = ("*",)
    """Patterns of parameter paths (as in WORKDIR/parameters.txt) that are read from each file; * matches any characters,
    slashes included: `head/*` is the whole head. Other parameters keep their value."""
    skip: tuple[str, ...] = ()
    """Patterns of parameter paths that are not read although `load` matches."""
    accept: tuple[str, ...] = ()
    """Settings of the network, such as model.anchors.sizes, in which the run may differ from the network that the weights were trained
    in. Without it weights are refused that have the right shapes, but another meaning. `model.*`: all."""


Orientation = Literal["auto", "upright", "stored"]
"""What boxes refer to in an image with an EXIF orientation: see `image_files.applied_orientation`."""


@dataclass(frozen=True)
class EvaluationSet:
    """An annotation file and its images."""

    annotations: PathStr
    """COCO detection JSON, or MDETR's grounding JSON where `kind` says so."""
    images: PathStr
    """Folder of the images."""
    names: dict[str, str] = field(default_factory=dict)
    """Detection: prompt text by category name or id, e.g. RBC -> red blood cell; several with one text are one category."""
    kind: Literal["detection", "grounding"] = "detection"
    """`detection`: COCO AP, prompted with all categories; `grounding`: recall of the phrases of each caption."""
    # As the options of `data coco` and `data mdetr` of the same names.
    merge_names: bool = False
    """Detection: categories of one name are one."""
    boxes: Literal["", "xywh", "xyxy"] = ""
    """Format of bbox; "": xywh, checked for plausibility."""
    crowds: Literal["", "drop", "keep"] = ""
    """Boxes with iscrowd 1: regions where nothing counts, or (keep) single objects; "": refused if most boxes are crowds."""
    folders: str = ""
    """Grounding: folders below `images` by data_source, e.g. mixed, or coco=train2014,vg=gqa."""
    allow_drops: bool = False
    """Evaluate although most boxes are left out for one reason."""
    orientation: Orientation = "auto"
    """What boxes refer to in an image with an EXIF orientation: `upright` or `stored` pixels; `auto`: what the listed size fits."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during and after training."""

    sets: dict[str, EvaluationSet] = field(default_factory=dict)
    """Evaluation sets by name."""
    parameters: Literal["ema", "raw"] = "ema"
    """Moving averages of the parameters (where they exist), or the parameters themselves."""
    batch_size: Size = _runtime_field(8)
    """Images per step on each device."""
    short_side: Pixels = 800
    """Length of the short side, pixels."""
    long_side: Pixels = 1333
    """Maximum length of the long side, pixels."""
    max_images: Limit = _runtime_field(0)
    """Number of first images of each set that are evaluated; 0: all."""
    chunk: Limit = 0
    """Category names per prompt; 0: as many as the token budget allows."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 for one axis: all remaining devices."""

    data: _Axis = _runtime_field(-1)
    """Data parallel replicas."""
    fsdp: _Axis = _runtime_field(1)
    """Devices that shard parameters, gradients and optimizer state."""
    tensor: _Axis = _runtime_field(1)
    """Devices that split the widths of BERT and MLP layers."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    name: str = "run"
    """Name in reports and comparisons."""
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

    @property
    def reads_descriptions(self) -> bool:
        """Whether a training step reads the vectors of descriptions."""
        return self.loss.description_weight > 0 or self.data.captions.descriptions.use == "mean"


def flatten(config: Any, prefix: str = "", affects_results: bool | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf field; `affects_results` keeps only fields of that class."""

    def walk(value: Any, name: str, affects: bool) -> Iterator[tuple[str, Any]]:
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                inner = f"{name}.{item.name}" if name else item.name
                yield from walk(
                    getattr(value, item.name), inner, affects and item.metadata.get("affects_results", True)
                )
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}", affects)
        elif affects_results is None or affects_results == affects:
            yield name, value

    yield from walk(config, prefix, True)


def validate(config: Config) -> Config:
    """Returns `config` if its settings are valid; otherwise raises ConfigError that names the values."""
    wrong = next(faults(config, Config), None)
    if wrong:
        raise ConfigError(wrong)
    checks = [
        *model_checks(config.model),
        (config.train.batch_size % config.optimizer.accumulate == 0,
         f"train.batch_size {config.train.batch_size} is not a multiple of optimizer.accumulate {config.optimizer.accumulate}"),
        *_cadence_checks(config),
        (sum(n == -1 for n in (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)) <= 1,
         f"mesh has more than one -1: data {config.mesh.data}, fsdp {config.mesh.fsdp}, tensor {config.mesh.tensor}"),
        (config.optimizer.name == "adamw"
         or all(getattr(config.optimizer, name) == getattr(OptimizerConfig, name) for name in ("beta1", "beta2", "epsilon")),
         f"optimizer.beta1, beta2 and epsilon are of adamw, optimizer.name is {config.optimizer.name!r}: give optimizer.arguments"),
        *data_checks(config.data),
        (not config.loss.description_weight or bool(config.data.captions.descriptions.file),
         f"loss.description_weight is {config.loss.description_weight}, and data.captions.descriptions.file is empty: name the JSON of descriptions"),
        (not config.loss.description_weight or config.model.text.frozen,
         f"loss.description_weight is {config.loss.description_weight}, and model.text.frozen is False: the vectors that it predicts are those of "
         "a text encoder that does not change; set model.text.frozen=True"),
        (not config.detection.sinks or config.model.fusion.enabled,
         f"detection.sinks is {config.detection.sinks}, and the network has no fusion: its image features read no text, so sinks change nothing"),
        (bool(config.detection.sink_start.strip()),
         f"detection.sink_start is {config.detection.sink_start!r}: expected random or a text"),
    ]  # fmt: skip
    for name, dataset in config.evaluation.sets.items():
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
        (keeping.keep_every % keeping.every == 0,
         f"checkpoint.keep_every {keeping.keep_every} is not a multiple of checkpoint.every {keeping.every}, so none would be kept"),
        (not keeping.best or named,
         f"checkpoint.best is {keeping.best}, and checkpoint.best_by {keeping.best_by!r}: expected evaluation/SET/NUMBER with a set of "
         f"evaluation.sets ({', '.join(config.evaluation.sets) or 'no set is configured'})"),
        (not keeping.best or every > 0,
         f"checkpoint.best is {keeping.best}, and train.evaluate_every {every}: only checkpoints evaluated during training can be best"),
    ]  # fmt: skip
