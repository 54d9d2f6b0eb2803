"""Measures how the number and the order of the names in a prompt change the AP of a detection set.

With fusion and a text encoder the score of a name depends on the other names of the prompt. The names of a large set are split into
chunks that fit the token budget, so the split changes the scores. This module measures by how much.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.evaluate import CategoryDetector, Evaluated, evaluate_detection
from glip_jax.evaluation.shares import Share
from glip_jax.inference import category_prompts
from glip_jax.structures.prompts import Tokenizer

__all__ = ["Chunking", "ChunkingResult", "chunking_effect", "chunking_lines", "described", "prompt_chunks", "requested"]


@dataclasses.dataclass(frozen=True)
class Chunking:
    """What is compared: the names of a set in other prompts."""

    chunks: tuple[int, ...]
    """Maximum names a prompt; 0: as many as the token budget allows. The first, in the order of ids, is the reference."""
    seeds: tuple[int, ...] = ()
    """Every chunk is evaluated in the order of ids, and shuffled with each of these seeds."""
    images: int = 0
    """Number of first images that are evaluated; 0: as many as `config.evaluation.max_images`."""


class ChunkingResult(TypedDict):
    """Results of a detection set with the names in one size of chunk and one order."""

    asked: str
    """The chunk and the order, in words."""
    chunk: int
    seed: int | None
    """None: in the order of ids."""
    images: int
    """Number of evaluated images."""
    AP: float
    AP50: float
    difference: float
    """AP50 minus that of the reference."""


def prompt_chunks(names: Sequence[str], tokenizer: Tokenizer, config: Config) -> list[list[str]]:
    """The names of each prompt of `Detector.categories`."""
    return [[names[i] for i in chunk] for _, chunk in category_prompts(names, tokenizer, config)]


def requested(chunking: Chunking) -> list[tuple[int, int | None]]:
    """(chunk, seed) of every evaluation, the reference first."""
    seeds = (None, *dict.fromkeys(chunking.seeds))
    return [(chunk, seed) for chunk in dict.fromkeys(chunking.chunks) for seed in seeds]


def described(chunk: int, seed: int | None) -> str:
    """The chunk and the order in words."""
    asked = f"at most {chunk} names a prompt" if chunk else "as many names a prompt as fit"
    return asked if seed is None else f"{asked}, shuffled with seed {seed}"


def chunking_effect(
    make: Callable[[Config], CategoryDetector],
    config: Config,
    dataset: EvaluationSet,
    chunking: Chunking,
    first: Evaluated,
    name: str = "",
    progress: bool = True,
    share: Share | None = None,
) -> list[ChunkingResult]:
    """Evaluates a set with its names in chunks of several sizes and in several orders.

    `make` returns a detector for changed settings. `first` is the evaluation with the settings of `config`, which is not repeated
    where it is one of those compared. The first result is the reference. Returns an empty list for a set of one name. `share`: see
    `evaluate`.
    """
    count = len(first.prompts)
    if count < 2:
        return []
    images = chunking.images or config.evaluation.max_images
    known = (config.evaluation.chunk, None) if not images or images >= len(first.image_ids) else None
    results: list[ChunkingResult] = []
    for chunk, seed in requested(chunking):
        evaluation = dataclasses.replace(config.evaluation, chunk=chunk, max_images=images)
        changed = dataclasses.replace(config, evaluation=evaluation)
        asked = described(chunk, seed)
        if (chunk, seed) == known:
            found = first
        else:
            order = None if seed is None else np.random.default_rng(seed).permutation(count).tolist()
            title = f"{name} ({asked})".strip()
            found = evaluate_detection(
                make(changed), changed, dataset, name=title, progress=progress, order=order, share=share
            )
        numbers = found.precision.numbers
        difference = numbers["AP50"] - (results[0]["AP50"] if results else numbers["AP50"])
        results.append({
            "asked": asked, "chunk": chunk, "seed": seed, "images": len(found.image_ids), "AP": numbers["AP"],
            "AP50": numbers["AP50"], "difference": difference,
        })  # fmt: skip
    return results


def chunking_lines(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(chunk and order, number) of every result, and mean and range over the orders of each chunk, as text.

    Results of a benchmark have the number as `value`, named `metric`; others have AP50, those of earlier versions without a chunk.
    """
    if not results:
        return []
    name, key = (results[0]["metric"], "value") if "metric" in results[0] else ("AP50", "AP50")
    defined = [one for one in results if one[key] is not None]
    lines = [(one["asked"], f"{name} {one[key]:.4f}, {one['difference']:+.4f}") for one in defined]
    for chunk in dict.fromkeys(one["chunk"] for one in defined if "chunk" in one):
        values = [one[key] for one in defined if one["chunk"] == chunk]
        if len(values) > 1:
            spread = f"mean {name} {np.mean(values):.4f}, {min(values):.4f} to {max(values):.4f}"
            lines.append((f"{described(chunk, None)}, {len(values)} orders", spread))
    return lines
