"""The results of fine-tuning: the same evaluation before and after it, per name, on kept sets and over seeds.

A `Transfer` is what the job hands to its table, its report and finetune.json (`summary`).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from glip_jax.evaluation.average_precision import AveragePrecision, GroundTruth, average_precision, labels

__all__ = [
    "MAIN", "CurvePoint", "Interpolated", "KeptSet", "SeedResult", "Spread", "SplitResult", "Transfer", "over_seeds", "split_result", "summary",
]  # fmt: skip

MAIN = ("AP", "AP50")
"""The numbers of COCO that the table shows."""


class SplitResult(NamedTuple):
    """A split as the detector sees it before and after fine-tuning. Names are those of `AveragePrecision.per_class`."""

    images: int
    boxes: int
    class_images: dict[str, int]
    """Images that hold the name."""
    class_boxes: dict[str, int]
    zero_shot: AveragePrecision
    tuned: AveragePrecision


class KeptSet(NamedTuple):
    """A set of the old names before and after fine-tuning."""

    metric: str
    """Such as AP, or recall@1 of phrases."""
    before: float
    after: float


class CurvePoint(NamedTuple):
    """An evaluation of the validation split while training."""

    step: int
    AP: float
    AP50: float


class Interpolated(NamedTuple):
    """Parameters between base and tuned: (1 - share) base + share tuned (WiSE-FT, arXiv 2109.01903)."""

    share: float
    new: float
    """AP on the validation split."""
    kept: dict[str, float]
    """Of each kept set its metric."""


class SeedResult(NamedTuple):
    """One run of several."""

    seed: int
    shots: int
    """Images per name that were drawn; 0: all data."""
    images: int
    """Training images."""
    zero_shot: dict[str, float]
    """AP and AP50 of the reported split."""
    tuned: dict[str, float]


class Spread(NamedTuple):
    """Mean and sample standard deviation over runs."""

    mean: float
    deviation: float | None
    """None for one run."""
    count: int


@dataclass(frozen=True)
class Transfer:
    """Everything that is reported of one fine-tuning."""

    name: str
    """Of the data."""
    tune: str
    """The mode: full, head, linear, prompt, text or lora."""
    base: str
    """The checkpoint that it starts from; "" for pretrained encoders."""
    split: Literal["test", "valid"]
    """The split of the headline numbers: test where there is one."""
    splits: dict[str, SplitResult]
    """valid, and test where there is one, which is evaluated once before and once after."""
    best_step: int
    """The step whose parameters are the result, chosen on valid; 0: nothing was better than before training."""
    steps: int
    """Steps of training until it ended."""
    minutes: float = 0.0
    """Of training, without compilation and evaluation."""
    curve: tuple[CurvePoint, ...] = ()
    kept: dict[str, KeptSet] = field(default_factory=dict)
    interpolation: tuple[Interpolated, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    """By name: the score of the best F1 of the result on valid (`detection_errors.operating_points`)."""
    runs: tuple[SeedResult, ...] = ()
    """All runs, where there are several."""
    notes: tuple[str, ...] = ()
    """What was found in the data, carved, left out or decided."""
    commands: tuple[tuple[str, str], ...] = ()
    """What one does next: (what it does, command)."""
    settings: dict[str, str] = field(default_factory=dict)
    """What the result depends on: command, commit, hashes of data and base, rates."""


def split_result(
    truth: GroundTruth, zero_shot: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> SplitResult:
    """The numbers of a split from its annotations and the detections (COCO's results format) before and after.

    Raises GroundTruthError if a detection is of an image that `truth` does not have.
    """
    names = dict(zip(truth.category_ids, labels(truth), strict=True))
    boxes: Counter[str] = Counter()
    images: defaultdict[str, set[Any]] = defaultdict(set)
    for entry in truth.content["annotations"]:
        if not entry["iscrowd"]:
            boxes[names[entry["category_id"]]] += 1
            images[names[entry["category_id"]]].add(entry["image_id"])
    before, after = (average_precision(truth, [dict(row) for row in rows]) for rows in (zero_shot, tuned))
    return SplitResult(
        len(truth.content["images"]), boxes.total(), {name: len(images[name]) for name in names.values()},
        {name: boxes[name] for name in names.values()}, before, after,
    )  # fmt: skip


def over_seeds(runs: Sequence[SeedResult]) -> dict[int, dict[str, tuple[Spread, Spread]]]:
    """By number of shots, ascending and all data last: of AP and AP50 the spread before and after fine-tuning."""
    result = {}
    for shots in sorted({run.shots for run in runs}, key=lambda k: (k == 0, k)):
        own = [run for run in runs if run.shots == shots]
        result[shots] = {
            name: (_spread([run.zero_shot[name] for run in own]), _spread([run.tuned[name] for run in own]))
            for name in MAIN
        }
    return result


def _spread(values: Sequence[float]) -> Spread:
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def summary(result: Transfer) -> dict[str, Any]:
    """The content of finetune.json.

    `zero_shot` and `tuned` are COCO's numbers of `split`; `valid` and `test` (null without one) hold those of each split, with its images
    and boxes; `per_class` is of `split`, its `threshold` of valid. A number is null where the split has no boxes for it.
    """
    splits = {name: _split_numbers(own) for name, own in result.splits.items()}
    main = result.splits[result.split]
    per_class = {
        name: {
            "images": main.class_images[name], "boxes": main.class_boxes[name],
            "zero_shot": _of_class(main.zero_shot, name), "tuned": _of_class(main.tuned, name),
            "threshold": result.thresholds.get(name),
        } for name in main.class_boxes
    }  # fmt: skip
    seeds = {
        ("all" if not shots else str(shots)): {
            name: {"zero_shot": before._asdict(), "tuned": after._asdict()} for name, (before, after) in own.items()
        } for shots, own in over_seeds(result.runs).items()
    }  # fmt: skip
    return {
        "name": result.name, "tune": result.tune, "base": result.base,
        "zero_shot": splits[result.split]["zero_shot"], "tuned": splits[result.split]["tuned"], "split": result.split,
        "valid": splits.get("valid"), "test": splits.get("test"), "per_class": per_class,
        "best_step": result.best_step, "steps": result.steps, "minutes": round(result.minutes, 2),
        "curve": [point._asdict() for point in result.curve],
        "kept": {name: own._asdict() for name, own in result.kept.items()},
        "interpolation": [point._asdict() for point in result.interpolation],
        "runs": [run._asdict() for run in result.runs], "seeds": seeds,
        "notes": list(result.notes), "commands": dict(result.commands), "settings": dict(result.settings),
    }  # fmt: skip


def _split_numbers(own: SplitResult) -> dict[str, Any]:
    return {
        "zero_shot": {name: _defined(value) for name, value in own.zero_shot.numbers.items()},
        "tuned": {name: _defined(value) for name, value in own.tuned.numbers.items()},
        "images": own.images, "boxes": own.boxes,
    }  # fmt: skip


def _of_class(numbers: AveragePrecision, name: str) -> dict[str, float | None]:
    return {"AP": _defined(numbers.per_class[name]), "AP50": _defined(numbers.per_class_50[name])}


def _defined(value: float) -> float | None:
    """COCO's -1 means that there is nothing to measure."""
    return value if value >= 0 else None
