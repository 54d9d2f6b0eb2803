"""Measures how the other names in a prompt change the AP50 of a detection set.

With fusion and a text encoder the score of a name depends on the other names of the prompt. The names of a large set are split into
chunks that fit the token budget, so the split changes the scores. This module measures by how much.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.evaluate import CategoryDetector, Evaluated, evaluate_detection
from glip_jax.inference import category_prompts
from glip_jax.structures.prompts import Tokenizer

__all__ = ["PromptVariant", "chunking_effect", "prompt_chunks"]


class PromptVariant(TypedDict):
    """Results of a detection set with other prompts."""

    asked: str
    """What differs in the prompts."""
    AP50: float
    difference: float
    """AP50 minus that of the usual prompts."""


def prompt_chunks(names: Sequence[str], tokenizer: Tokenizer, config: Config) -> list[list[str]]:
    """The names of each prompt of `Detector.categories`."""
    return [[names[i] for i in chunk] for _, chunk in category_prompts(names, tokenizer, config)]


def chunking_effect(
    detector: CategoryDetector,
    make: Callable[[Config], CategoryDetector],
    config: Config,
    dataset: EvaluationSet,
    first: Evaluated,
    longest: int,
    name: str = "",
    progress: bool = True,
) -> list[PromptVariant]:
    """Evaluates a set again with two variants of the prompts.

    1. Shuffled names, by `detector`: another order and other chunks. 2. Half as many names a prompt as `longest`, the longest of
    the usual prompts, by the detector that `make` returns for these settings. `first` is the evaluation with the usual prompts.
    Returns an empty list for a single name.
    """
    count = len(first.prompts)
    if count < 2:
        return []
    half = -(-longest // 2)
    shorter = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, chunk=half))
    order = np.random.default_rng(0).permutation(count).tolist()
    variants = [
        ("names shuffled", evaluate_detection(
            detector, config, dataset, name=f"{name} (names shuffled)", progress=progress, order=order)),
        (f"at most {half} names a prompt", evaluate_detection(
            make(shorter), shorter, dataset, name=f"{name} (shorter prompts)", progress=progress)),
    ]  # fmt: skip
    base = first.precision.numbers["AP50"]
    return [
        {
            "asked": asked,
            "AP50": result.precision.numbers["AP50"],
            "difference": result.precision.numbers["AP50"] - base,
        }
        for asked, result in variants
    ]
