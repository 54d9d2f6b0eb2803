"""The job `score`: anybody's predictions against the annotations of a benchmark."""

import importlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from glip_jax.cli.command_line import CommandLineError, flags
from glip_jax.config import PathStr
from glip_jax.config.ranges import Count, Range
from glip_jax.distributed import exit_codes

__all__ = ["METRICS", "Score", "main"]

logger = logging.getLogger(__name__)


class _Metric(NamedTuple):
    module: str
    """Of `glip_jax.evaluation.metrics`."""
    flags: Mapping[str, Any] = MappingProxyType({})
    """Flags, beside the two files, that its `score` takes, with their defaults."""
    fixed: Mapping[str, Any] = MappingProxyType({})
    """Options of its `score` that the name implies."""


METRICS = {
    "coco": _Metric("coco", {"top": 100, "per_class": False}),
    "lvis": _Metric("lvis", {"top": 300, "per_class": False}, {"fixed": False}),
    "lvis-fixed": _Metric("lvis", {"top": 10_000, "per_class": False}, {"fixed": True}),
    "flickr": _Metric("flickr"),
    "refexp": _Metric("refexp", {"overlap": "giou"}),
    "grefcoco": _Metric("grefcoco", {"overlap": "giou", "threshold": 0.7}),
    "d3": _Metric("d3", {"top": 100, "inter": False, "per_class": False}),
    "omnilabel": _Metric("omnilabel"),
    "absence": _Metric("absence", {"threshold": None, "exhaustive": False}),
}
"""The metrics by their names on the command line."""


@dataclass(frozen=True)
class Score:
    """Score predictions, of this or any other detector, as the official evaluator of a benchmark does.

    Prints one line of JSON on stdout: the numbers, not rounded, -1 or null where the annotations do not define one, with counts and
    the protocol. Notes go to stderr. METRIC is one of

      coco        COCO's twelve, on any annotations of COCO's form
      lvis        LVIS, standard AP: the 300 best boxes of an image
      lvis-fixed  LVIS, fixed AP: the 10,000 best boxes of a category
      flickr      Flickr30k Entities, recall of phrases, any box and merged boxes
      refexp      RefCOCO, RefCOCO+, RefCOCOg: precision at 1, 5, 10
      grefcoco    gRefCOCO: Pr@(F1=1), N-acc, T-acc
      d3          D3: FULL, PRES, ABS
      omnilabel   OmniLabel's thirteen
      absence     false alarms on names known to be absent
    """

    metric: Annotated[
        Literal["coco", "lvis", "lvis-fixed", "flickr", "refexp", "grefcoco", "d3", "omnilabel", "absence"],
        tyro.conf.arg(metavar="METRIC"),
        tyro.conf.Positional,
    ]
    """What is computed."""
    annotations: PathStr = ""
    """File of the benchmark, local or gs://; flickr: the folder of the release, with Annotations, Sentences and the split's list; d3:
    the folder of its three files, or one file of COCO's form."""
    predictions: PathStr = ""
    """File of predictions, or (coco, lvis, lvis-fixed, d3) a folder of such files, which are joined; see the guide on scoring for the
    forms."""
    overlap: Literal["giou", "iou"] | None = None
    """refexp, grefcoco: measure of overlap, of which 0.5 is a hit; none: giou, as in the official evaluators."""
    threshold: Annotated[float, Range(-1e9, 1e9)] | None = None
    """grefcoco: least score of a box that is kept, none: 0.7; absence: a threshold beside the fixed ones."""
    top: Count | None = None
    """coco, d3: most boxes per image and category, none: 100; lvis: per image, none: 300; lvis-fixed: per category, none: 10,000."""
    inter: bool = False
    """d3: the predictions are of the inter-scenario; gives the numbers against all descriptions of the boxes too, from d3_pkl."""
    exhaustive: bool = False
    """absence: every category without a box is absent from its image, as in COCO."""
    per_class: bool = False
    """coco, lvis, lvis-fixed, d3: AP of each category too."""


def main(argv: Sequence[str]) -> int:
    """Runs `score METRIC --annotations=... --predictions=...`; returns 0.

    Raises CommandLineError for flags that do not fit, MetricError for files that cannot be scored.
    """
    job = flags(argv, Score, "score", "coco --annotations=instances_val2017.json --predictions=detections.json")
    metric = METRICS[job.metric]
    for name in ("annotations", "predictions"):
        if not getattr(job, name):
            raise CommandLineError(f"no --{name}: expected a file, local or gs://")
    given = {name: getattr(job, name) for name in ("overlap", "threshold", "top", "inter", "exhaustive", "per_class")}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    for name in given:
        if name not in metric.flags:
            having = ", ".join(each for each, other in METRICS.items() if name in other.flags)
            raise CommandLineError(
                f"--{name.replace('_', '-')} is a flag of {having}, not of {job.metric}: leave it out"
            )
    options = {**metric.flags, **given}
    module = importlib.import_module(f"glip_jax.evaluation.metrics.{metric.module}")
    result = module.score(job.annotations, job.predictions, **metric.fixed, **options)
    protocol = {"metric": job.metric, **options, "pycocotools": version("pycocotools")}
    logger.info(json.dumps(_defined({**result, "protocol": protocol})))
    return exit_codes.DONE


def _defined(value: Any) -> Any:
    """The value with null for numbers that are not finite, which JSON does not have."""
    match value:
        case dict():
            return {key: _defined(item) for key, item in value.items()}
        case list() | tuple():
            return [_defined(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
