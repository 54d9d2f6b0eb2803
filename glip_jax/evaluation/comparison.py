"""Compares evaluated runs. Runs of one config that differ in the seed are replicas and give a mean and a standard deviation."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from glip_jax import UserError
from glip_jax.config import current_names

__all__ = [
    "Comparison", "ComparisonError", "DifferenceRequest", "PairedDifference", "Run", "Spread", "compare", "headlines", "run_of", "spread",
]  # fmt: skip

_CHANCE = "AP50_permuted"
_DETECTION_METRICS = ("AP50", "AP", _CHANCE)
_RECALL = "recall@1"
_RATES = ("0.01", "0.05")
_ALARM = "0.3"
_AT_ALARM = {"false_alarms": "false_alarms", "absent_found": "alarmed_pairs", "present_found": "found_pairs"}


class ComparisonError(UserError, ValueError):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Run:
    """The evaluation of a run, from its evaluation.json."""

    path: str
    name: str
    """Of the config."""
    seed: int
    summary: Mapping[str, Any]
    """The content of the file."""
    numbers: Mapping[str, float]
    """The metrics to compare, as SET/METRIC."""


class Spread(NamedTuple):
    """Mean, standard deviation and extremes of some values."""

    mean: float
    deviation: float | None
    """Standard deviation with n - 1; None for a single value."""
    min: float
    max: float
    values: tuple[float, ...]


class DifferenceRequest(NamedTuple):
    """Two configs to compare, and the metrics to compare them in."""

    new: str
    old: str
    metrics: tuple[str, ...]
    """Empty: all."""


@dataclass(frozen=True)
class PairedDifference:
    """Differences between two configs, seed by seed."""

    new: str
    old: str
    seeds: tuple[int, ...]
    """Those of both configs."""
    differences: Mapping[str, Spread]
    """`new` minus `old` per metric; values in the order of `seeds`."""


@dataclass(frozen=True)
class Comparison:
    """The compared runs: per config the runs by seed and the metrics."""

    runs: Mapping[str, tuple[Run, ...]]
    numbers: Mapping[str, Mapping[str, Spread]]
    """Per config and metric."""
    steps: tuple[PairedDifference, ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    """Settings of evaluation, and hashes of the code, that differ between runs, with the values of each config."""


def run_of(path: str, summary: Mapping[str, Any], step_seconds: Sequence[float] = ()) -> Run:
    """A run from the content of its evaluation.json. Raises KeyError or TypeError for other content.

    `step_seconds`: means of the logged windows of its training, of which the median is a number too.
    """
    numbers: dict[str, float] = {}
    for name, entry in summary["sets"].items():
        measured = entry["numbers"]
        if entry["kind"] == "detection":
            # -1 in COCO's metrics: not defined on this set.
            numbers |= {
                f"{name}/{metric}": float(measured[metric]) for metric in _DETECTION_METRICS if measured[metric] >= 0
            }
            numbers |= {f"{name}/{metric}": value for metric, value in _of_absence(entry.get("absence") or {}).items()}
        else:
            kinds = [f"{kind}/{_RECALL}" if kind else _RECALL for kind in entry["phrases"]]
            numbers |= {f"{name}/{metric}": float(measured[metric]) for metric in kinds}
    if step_seconds:
        numbers["train/step_seconds"] = statistics.median(step_seconds)
    summary = {**summary, "settings": current_names(summary["settings"])}
    return Run(path, str(summary["name"]), int(summary["seed"]), summary, numbers)


def _of_absence(measured: Mapping[str, Any]) -> dict[str, float]:
    """Of `metrics.absence`: AP from the threshold of a rate of false alarms on; of boxes of `_ALARM` or more, those a pair and the shares of pairs with one."""
    if not measured:
        return {}
    found = {f"AP_at_{rate}": measured["rates"][rate]["AP"] for rate in _RATES}
    for kind, own in (("", measured), ("alone/", measured.get("alone"))):
        if own:
            found |= {f"{kind}{short}": own["thresholds"][_ALARM][key] for short, key in _AT_ALARM.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def headlines(metrics: Iterable[str]) -> list[str]:
    """The metrics that a plot shows: AP50 of detection, recall@1 of all phrases and of each kind."""
    return [metric for metric in metrics if metric.rpartition("/")[2] in ("AP50", _RECALL)]


def spread(values: Sequence[float]) -> Spread:
    """Mean, deviation and extremes of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, min(values), max(values), tuple(values))


def compare(runs: Sequence[Run], wanted: Sequence[DifferenceRequest] = ()) -> Comparison:
    """Groups the runs by config, in the order given, and computes the wanted steps.

    Raises:
        ComparisonError: no run; a run twice; two runs of one config and seed; runs evaluated on different sets, annotations or
            images; a step of a config or metric that no run has, or of configs without a common seed.
    """
    if not runs:
        raise ComparisonError("no runs to compare: expected folders with evaluation.json")
    _check_same_sets(runs)
    _check_once(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    grouped = {name: tuple(sorted(members, key=lambda run: run.seed)) for name, members in groups.items()}
    # A metric that one run lacks is left out for all.
    keys = [metric for metric in runs[0].numbers if all(metric in run.numbers for run in runs)]
    numbers = {
        name: {key: spread([run.numbers[key] for run in members]) for key in keys} for name, members in grouped.items()
    }
    steps = tuple(_step(step, grouped, keys) for step in wanted)
    return Comparison(grouped, numbers, steps, _differing(grouped))


def _check_same_sets(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        sets, others = first.summary["sets"], run.summary["sets"]
        if set(sets) != set(others):
            only = sorted(set(sets) ^ set(others))
            where = first.path if only[0] in sets else run.path
            raise ComparisonError(
                f"{first.path} and {run.path} were evaluated on different sets ({', '.join(only)}, first only in {where}): "
                "evaluate both with the same config.evaluation.sets"
            )
        for name, entry in sets.items():
            for what, digest in entry["hashes"].items():
                other = others[name]["hashes"].get(what)
                if other != digest:
                    raise ComparisonError(
                        f"{first.path} and {run.path} were evaluated on different {what} of the set {name} "
                        f"(hashes {digest!s:.12} and {other!s:.12}): evaluate both on the same files"
                    )


def _check_once(runs: Sequence[Run]) -> None:
    seen: dict[Any, Run] = {}
    for run in runs:
        weights = run.summary["hashes"]["parameters"]
        # One network with and without a setting of inference are two runs.
        evaluated = weights, json.dumps(run.summary["settings"], sort_keys=True)
        keys: dict[str, Any] = {
            f"the same parameters ({weights:.12}) and settings": evaluated,
            f"config {run.name} with seed {run.seed}": (run.name, run.seed),
        }
        for what, key in keys.items():
            if key in seen:
                raise ComparisonError(
                    f"{seen[key].path} and {run.path} are both of {what}: expected each run once; replicas differ in "
                    "config.train.seed"
                )
        seen[evaluated] = seen[run.name, run.seed] = run


def _step(wanted: DifferenceRequest, groups: Mapping[str, Sequence[Run]], keys: Sequence[str]) -> PairedDifference:
    for name in (wanted.new, wanted.old):
        if name not in groups:
            raise ComparisonError(
                f"step {wanted.new}/{wanted.old}: no run is of config {name}; there are {', '.join(groups)}"
            )
    for metric in wanted.metrics:
        if metric not in keys:
            raise ComparisonError(
                f"step {wanted.new}/{wanted.old}: {metric} is not measured; there are {', '.join(keys)}"
            )
    new, old = ({run.seed: run for run in groups[name]} for name in (wanted.new, wanted.old))
    seeds = tuple(seed for seed in new if seed in old)
    if not seeds:
        raise ComparisonError(
            f"step {wanted.new}/{wanted.old}: runs are compared seed by seed, {wanted.new} has {', '.join(map(str, new))} "
            f"and {wanted.old} {', '.join(map(str, old))}: expected a common one"
        )
    differences = {
        metric: spread([new[seed].numbers[metric] - old[seed].numbers[metric] for seed in seeds])
        for metric in wanted.metrics or [key for key in keys if not key.endswith(_CHANCE)]
    }
    return PairedDifference(wanted.new, wanted.old, seeds, differences)


def _differing(groups: Mapping[str, Sequence[Run]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    def settings(run: Run) -> dict[str, str]:
        values = {name: str(run.summary[name]) for name in ("step", "parameters")}
        values |= {name: str(value) for name, value in run.summary["settings"].items()}
        return values | {"code": f"{run.summary['hashes'].get('code', {}).get('files', '-'):.12}"}

    by_run = {run.path: settings(run) for members in groups.values() for run in members}
    rows = []
    for name in dict.fromkeys(name for values in by_run.values() for name in values):
        if len({values.get(name, "-") for values in by_run.values()}) > 1:
            counts = (Counter(by_run[run.path].get(name, "-") for run in members) for members in groups.values())
            rows.append((name, tuple(", ".join(each) for each in counts)))
    return tuple(rows)
