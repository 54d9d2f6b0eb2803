"""The score threshold of `predict`: given, or chosen by the report of an evaluation for a rate of false alarms."""

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from glip_jax.cli.command_line import CommandLineError
from glip_jax.config import Config, current_names
from glip_jax.io.provenance import score_settings

if TYPE_CHECKING:
    from glip_jax.io.checkpoint import Checkpoint

__all__ = ["RATE", "USUAL", "ScoreThresholds", "carried_report", "score_thresholds"]

logger = logging.getLogger(__name__)

USUAL = 0.3
"""The lowest score without a report."""

RATE = 0.05
"""False alarms per image and absent name of the default threshold, where there is a report."""

_SETTINGS = ("model.", "detection.", "evaluation.short_side", "evaluation.long_side")
"""Settings that must be those of the report; not the chunk of names, because what is asked differs anyway."""


class ScoreThresholds(NamedTuple):
    """Lowest scores at which detections are written."""

    threshold: float
    """Of phrases that have no other."""
    of_phrases: tuple[float, ...]
    chosen: dict[str, Any] | None
    """What chose them: the report, its set and its rate; None: given, or `USUAL`."""

    def text(self) -> str:
        """One line for the user."""
        if self.chosen is None:
            return f"threshold {self.threshold:g}"
        low, high = min(self.of_phrases), max(self.of_phrases)
        shown = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f} by name"
        return (
            f"threshold {shown}: {self.chosen['false_alarms']:g} false alarms per image and absent name "
            f"({self.chosen['report']}, set {self.chosen['set']}); --threshold gives another"
        )


def score_thresholds(
    threshold: float | None, rate: float | None, report: str, checkpoint: "Checkpoint", config: Config, phrases: Sequence[str], alone: bool,
) -> ScoreThresholds:  # fmt: skip
    """The lowest score of each of `phrases`.

    `threshold`, `rate`, `report`: as the flags of `predict`. Without any, the report of the checkpoint at `RATE` if it measured absent
    names with the same parameters and settings, else `USUAL`. `alone`: every prompt has one phrase.

    Raises CommandLineError for flags that exclude each other, ThresholdError for a report that gives no threshold.
    """
    from glip_jax.evaluation.thresholds import ThresholdError, read_thresholds

    if threshold is not None and (rate is not None or report):
        given = f"--false-alarms={rate}" if rate is not None else f"--report={report}"
        raise CommandLineError(f"--threshold={threshold} and {given} both choose the lowest score: give one of them")
    if threshold is not None and not 0 <= threshold < 1:
        raise CommandLineError(f"--threshold={threshold}: expected 0 <= threshold < 1")
    if rate is not None and not rate > 0:
        raise CommandLineError(f"--false-alarms={rate}: expected more than 0, such as {RATE}")
    usual = USUAL if threshold is None else threshold
    fixed = ScoreThresholds(usual, (usual,) * len(phrases), None)
    asked = rate is not None or bool(report)
    if threshold is not None:
        return fixed
    place = report or str(epath.Path(checkpoint.workdir) / "evaluation.json")
    try:
        chosen = read_thresholds(place, RATE if rate is None else rate, alone)
    except ThresholdError:
        if asked:
            raise
        return fixed
    if differs := _differences(place, checkpoint, config):
        logger.warning(
            f"note: {place} is of another {differs}"
            + ("" if asked else f", so it chooses no threshold: {USUAL} is taken")
        )
        if not asked:
            return fixed
    of_phrases = tuple(float(value) for value in chosen.of(phrases))
    return ScoreThresholds(chosen.threshold, of_phrases, {"report": place, **chosen.summary()})


def carried_report(checkpoint: "Checkpoint", config: Config) -> str:
    """What an export carries of the checkpoint's report, as JSON: its thresholds, if they are of these parameters and settings; else ""."""
    place = epath.Path(checkpoint.workdir) / "evaluation.json"
    try:
        found = json.loads(place.read_text())
        sets = {name: {"absence": entry["absence"]} for name, entry in found["sets"].items() if entry.get("absence")}
        if not sets or _differences(str(place), checkpoint, config):
            return ""
        kept = {key: found[key] for key in ("step", "parameters", "settings")} | {"sets": sets}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # no report, or one of another version
    return json.dumps(kept, indent=1)


def _differences(report: str, checkpoint: "Checkpoint", config: Config) -> str:
    """In what the report is of something else than what is asked now; "" if in nothing."""
    path = epath.Path(report)
    summary = json.loads((path / "evaluation.json" if path.is_dir() else path).read_text())
    found = [] if checkpoint.step in (None, summary.get("step")) else [f"step ({summary.get('step')})"]
    if summary.get("parameters") != config.evaluation.parameters:
        found.append(f"kind of parameters ({summary.get('parameters')})")
    saved = current_names(summary.get("settings", {}))
    now = json.loads(json.dumps(score_settings(config)))
    found += [
        f"{key} ({saved.get(key)})"
        for key, value in now.items()
        if key.startswith(_SETTINGS) and saved.get(key) != value
    ]
    return ", ".join(found[:3])
