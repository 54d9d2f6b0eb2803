"""What the company of names in a prompt does to a detection set.

With fusion and a text encoder a name's score depends on the names beside it, and a set of more names than the token
budget holds is asked in chunks; so chunking moves the score, and by how much can only be measured.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.evaluate import Evaluated, FindsCategories, evaluate_detection
from glip_jax.inference import category_prompts
from glip_jax.structures.prompts import Tokenizer

__all__ = ["AskedAgain", "chunking_effect", "prompt_chunks"]


class AskedAgain(TypedDict):
    """A detection set asked for in another way."""

    asked: str
    """What was different."""
    AP50: float
    difference: float
    """AP50 minus that of the first time."""


def prompt_chunks(names: Sequence[str], tokenizer: Tokenizer, config: Config) -> list[list[str]]:
    """The names of each prompt, as `Detector.categories` asks for them."""
    return [[names[i] for i in chunk] for _, chunk in category_prompts(names, tokenizer, config)]


def chunking_effect(
    detector: FindsCategories,
    make: Callable[[Config], FindsCategories],
    config: Config,
    dataset: EvaluationSet,
    first: Evaluated,
    longest: int,
    name: str = "",
    progress: bool = True,
) -> list[AskedAgain]:
    """Asks for the names of a set again in two ways, and says what AP50 becomes.

    Shuffled: by `detector`, so in another order and in other chunks. In their order with half as many names a prompt as
    `longest`, the most of the first time: by the detector that `make` gives for such settings. A single name has no
    company: an empty list. `first` is the evaluation in the usual way.
    """
    count = len(first.prompts)
    if count < 2:
        return []
    half = -(-longest // 2)
    shorter = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, chunk=half))
    order = np.random.default_rng(0).permutation(count).tolist()
    again = [
        ("names shuffled", evaluate_detection(
            detector, config, dataset, name=f"{name} (names shuffled)", progress=progress, order=order)),
        (f"at most {half} names a prompt", evaluate_detection(
            make(shorter), shorter, dataset, name=f"{name} (shorter prompts)", progress=progress)),
    ]  # fmt: skip
    base = first.precision.numbers["AP50"]
    return [
        {"asked": asked, "AP50": found.precision.numbers["AP50"], "difference": found.precision.numbers["AP50"] - base}
        for asked, found in again
    ]
