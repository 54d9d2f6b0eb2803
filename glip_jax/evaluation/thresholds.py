"""Thresholds that an evaluation chose for a rate of false alarms, and what an evaluated set gives from there on."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float64

from glip_jax import UserError
from glip_jax.evaluation.absent_names import found_in, pairs_of
from glip_jax.evaluation.average_precision import average_precision, coco_results
from glip_jax.evaluation.evaluate import Evaluated, Grounded
from glip_jax.evaluation.metrics.absence import measure, rate_key, thresholds_of
from glip_jax.evaluation.recall import phrase_recall
from glip_jax.structures.batch import Detections
from glip_jax.structures.prompts import clean_name, words

__all__ = ["ThresholdError", "Thresholds", "choose", "numbers_at", "read_thresholds"]

_ARTICLES = ("a", "an", "the")


class ThresholdError(UserError, ValueError):
    """A report of an evaluation that gives no threshold for a rate of false alarms."""


class Thresholds(NamedTuple):
    """Lowest scores at which detections count."""

    rate: float
    """False alarms per image and absent name that were aimed at."""
    source: str
    """The evaluated set that they are from."""
    threshold: float
    """Of names without their own."""
    per_name: dict[tuple[str, ...], float]
    """By the `words` of a name."""

    def of(self, texts: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """The threshold of each name, or phrase of a caption: an article before it is no part of the name."""
        return np.array([self.per_name.get(_key(text), self.threshold) for text in texts], np.float64)

    def summary(self) -> dict[str, Any]:
        """For reports, as JSON holds it."""
        return {
            "false_alarms": self.rate, "set": self.source, "threshold": self.threshold, "names_with_their_own": len(self.per_name),
        }  # fmt: skip


def read_thresholds(report: str, rate: float, alone: bool = False) -> Thresholds:
    """`choose` from the sets of an evaluation.json. Raises ThresholdError if it cannot be read, or as `choose`."""
    path = epath.Path(report)
    path = path / "evaluation.json" if path.is_dir() else path
    try:
        sets = json.loads(path.read_text())["sets"]
        measured = {name: entry["absence"] for name, entry in sets.items() if entry.get("absence")}
        return choose(measured, rate, str(path), alone)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ThresholdError):
            raise
        raise ThresholdError(
            f"{path} is no report of `evaluate` that gives thresholds ({error!r:.100}): expected its evaluation.json"
        ) from None


def choose(measured: Mapping[str, Mapping[str, Any]], rate: float, where: str, alone: bool = False) -> Thresholds:
    """The thresholds of a rate, from the set with the most absent pairs.

    `measured`: results of `metrics.absence.measure` by set; `where`: what they were read from, for messages. `alone`: for a prompt of one
    name, whose threshold is higher where that was measured. Raises ThresholdError if there are none, or none of this rate.
    """
    if not measured:
        raise ThresholdError(
            f"{where} has no set with names that are known to be absent, so no threshold was chosen for a rate of false alarms: "
            "evaluate a set whose images list `known_absent`"
        )
    source = max(measured, key=lambda name: measured[name]["absent_pairs"])
    if rate_key(rate) not in measured[source]["rates"]:
        there = ", ".join(measured[source]["rates"])
        raise ThresholdError(
            f"{where} has thresholds for {there} false alarms per image and absent name, not for {rate_key(rate)}: take one of "
            f"these, or measure it with `evaluate --false-alarms={rate_key(rate)}`"
        )
    if alone and rate_key(rate) in (measured[source].get("alone") or {"rates": {}})["rates"]:
        return Thresholds(
            rate, f"{source}, one name a prompt", measured[source]["alone"]["rates"][rate_key(rate)]["threshold"], {}
        )
    threshold, own = thresholds_of(measured[source], rate)
    return Thresholds(rate, source, threshold, {_key(name): value for name, value in own.items()})


def numbers_at(result: Evaluated | Grounded, chosen: Thresholds) -> dict[str, float | None]:
    """The numbers of a set without the detections below the thresholds.

    Detection: AP, AP50, AR100, and with absent names the measures of `metrics.absence`; grounding: `recall@1` and so on, as
    `Recall.numbers`.
    """
    match result:
        case Evaluated():
            least = chosen.of(result.prompts)
            kept = {key: _from(found, least) for key, found in result.detections.items()}
            ids = list(result.image_ids)
            precision = average_precision(result.truth, coco_results(result.truth, kept), ids).numbers
            numbers: dict[str, float | None] = {name: precision[name] for name in ("AP", "AP50", "AR100")}
            pairs = pairs_of(result.truth, ids)
            if not len(pairs.absent):
                return numbers
            every = measure(pairs, found_in(result.truth, kept, ids), None, (0.0,), ())["thresholds"][rate_key(0.0)]
            return numbers | every
        case Grounded():
            images = {image.id: image for image in result.truth.images}

            def kept_of(key: Any) -> Detections:
                caption, phrases = images[key].caption, images[key].phrases
                texts = [" ".join(caption[begin:end] for begin, end in phrase.spans) for phrase in phrases]
                return _from(result.detections[key], chosen.of(texts))

            recall = phrase_recall((images[key].phrases, kept_of(key)) for key in result.image_ids)
            return dict(recall.numbers)


def _from(found: Detections, least: Float64[np.ndarray, " n"]) -> Detections:
    """The detections whose score reaches the threshold of their phrase."""
    phrases, scores = np.asarray(found.phrases), np.asarray(found.scores)
    rows = (phrases >= 0) & (scores >= np.append(least, np.inf)[phrases])
    return Detections(np.asarray(found.boxes)[rows], scores[rows], phrases[rows])


def _key(name: str) -> tuple[str, ...]:
    found = words(clean_name(name))
    return found[1:] if len(found) > 1 and found[0] in _ARTICLES else found
