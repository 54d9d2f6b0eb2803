"""A sample of the names that are known to be absent from an image, or in it, each asked in a prompt of its own.

With fusion a name's score depends on the names beside it in the prompt. Where a name is asked alone, nothing else can take its
place: a detector that was trained on prompts with something to find may then find it anywhere.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.absent_names import found_in, pairs_of
from glip_jax.evaluation.evaluate import Evaluated, PhraseDetector, detect_single_names
from glip_jax.evaluation.metrics.absence import RATES, Pairs, measure
from glip_jax.evaluation.shares import Share

__all__ = ["single_name_absence"]


def single_name_absence(
    detector: PhraseDetector,
    config: Config,
    dataset: EvaluationSet,
    result: Evaluated,
    per_image: int,
    name: str = "",
    progress: bool = True,
    share: Share | None = None,
    rates: Sequence[float] = (),
) -> dict[str, Any]:
    """Measures of `metrics.absence` with one name a prompt, without AP and without those by name.

    Asks `per_image` times the number of images pairs of an image and an absent name, as many of present names, and as many of look-alikes,
    whose false alarms are in `look_alikes`; drawn from all without replacement, with a fixed seed. `result`: the evaluation with the
    usual prompts.
    """
    pairs, count = pairs_of(result.truth, result.image_ids), len(result.prompts)
    limit = per_image * len(result.image_ids)
    rng = np.random.default_rng(0)

    def drawn(of: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
        return np.sort(rng.choice(of, min(limit, len(of)), replace=False))

    absent, present, alike = drawn(pairs.absent), drawn(pairs.present), drawn(pairs.look_alikes)
    asked: defaultdict[Any, list[int]] = defaultdict(list)
    for pair in np.unique(np.concatenate([absent, present, alike])).tolist():
        asked[result.image_ids[pair // count]].append(pair % count)
    detections = detect_single_names(
        detector, config, dataset, result.truth, asked, name=f"{name} (one name a prompt)".strip(), progress=progress, share=share
    )  # fmt: skip
    found = found_in(result.truth, detections, result.image_ids)
    measured = measure(_part(pairs, absent, present), found, None, rates=sorted({*RATES, *rates}))
    if len(alike):
        only = dataclasses.replace(_part(pairs, alike, present[:0]), look_alikes=alike)
        measured["look_alikes"] = measure(only, found, None)["look_alikes"]
    return {key: value for key, value in measured.items() if key not in ("per_name", "boxes_not_judged")}


def _part(pairs: Pairs, absent: Int64[np.ndarray, " A"], present: Int64[np.ndarray, " P"]) -> Pairs:
    """Of the present pairs the chosen ones with their boxes, and these absent pairs."""
    rows = np.isin(pairs.of_boxes, present)
    return dataclasses.replace(
        pairs, absent=absent, boxes=pairs.boxes[rows], of_boxes=pairs.of_boxes[rows], crowd=pairs.crowd[rows],
        look_alikes=pairs.look_alikes[:0],
    )  # fmt: skip
