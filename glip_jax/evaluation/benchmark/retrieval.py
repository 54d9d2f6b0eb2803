"""Names of a very large vocabulary that a cheap pass finds in an image, for the detection with these names alone.

V3Det has 13,204 names, 331 prompts of 40 an image. The cheap pass has small images and prompts as long as the token budget allows.
Of each image the names with the highest scores are prompted again, at the size of the protocol.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glip_jax.config import Config
from glip_jax.evaluation.benchmark.prompted import ImageEntry, ImagePrompt, PromptedImage, PromptedSet, SharedPrompts
from glip_jax.evaluation.benchmark.prompts import PromptBuilder, Texts
from glip_jax.evaluation.benchmark.sets import BenchmarkError, PromptMode
from glip_jax.structures.prompts import Tokenizer

__all__ = ["best_of_names", "narrowed", "retrieval_mode", "retrieved_names"]


def retrieval_mode(mode: PromptMode) -> PromptMode:
    """The prompt mode of the cheap pass for `mode`: images of `retrieval_side`, long prompts, detections of any score."""
    side = mode.retrieval_side
    return dataclasses.replace(
        mode, retrieved=0, chunk=0, threshold=0.0, short_side=side, long_side=round(side * mode.long_side / mode.short_side)
    )  # fmt: skip


def best_of_names(rows: Any) -> Any:
    """The rows (`blocks.ROW`) with the highest score of each image, prompt and phrase; of equal scores the first."""
    order = np.lexsort((-rows["score"], rows["phrase"], rows["prompt"], rows["image"]))
    keys = np.stack([rows[name][order] for name in ("image", "prompt", "phrase")], axis=1)
    first = np.ones(len(order), bool)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return rows[np.sort(order[first])]


def retrieved_names(prompted: PromptedSet, pieces: Iterable[Any]) -> dict[Any, list[Any]]:
    """By id of the image, the keys of the names that were detected in it, in the order of the prompts.

    `prompted`: the set in the mode of the cheap pass; `pieces`: rows of its blocks. Raises BenchmarkError for a set whose images have
    prompts of their own.
    """
    parts = _shared(prompted).parts
    ends = np.cumsum([0, *(len(keys) for _, keys in parts)])
    every = [key for _, keys in parts for key in keys]
    found: dict[Any, list[Any]] = {}
    for rows in pieces:
        places = ends[rows["prompt"]] + rows["phrase"]
        order = np.lexsort((places, rows["image"]))
        edges = np.flatnonzero(np.diff(rows["image"][order], prepend=-1))
        for own in np.split(order, edges[1:]) if len(order) else ():
            found[prompted.images[int(rows["image"][own[0]])].id] = [every[i] for i in places[own].tolist()]
    return found


class _NarrowedPrompts(Sequence[PromptedImage]):
    """Images with prompts of their own names, which are joined when an image is read."""

    def __init__(
        self, entries: Sequence[ImageEntry], texts: Texts, names: Mapping[Any, Sequence[Any]], prompts: PromptBuilder
    ) -> None:
        self._entries, self._texts, self._names, self._prompts = entries, texts, names, prompts
        self._made = functools.lru_cache(maxsize=1024)(self._make)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _NarrowedPrompts(self._entries[index], self._texts, self._names, self._prompts)
        return self._made(index)

    def _make(self, index: int) -> PromptedImage:
        entry = self._entries[index]
        parts = self._prompts.grouped({key: self._texts[key] for key in self._names.get(entry.id, ())})
        return PromptedImage(*entry, tuple(ImagePrompt(entry.id, *part) for part in parts))


def narrowed(
    prompted: PromptedSet, names: Mapping[Any, Sequence[Any]], tokenizer: Tokenizer, config: Config
) -> PromptedSet:
    """The same set with the `names` of each image only (keys by id of the image), in prompts of `mode.chunk` names.

    Raises BenchmarkError for a set whose images have prompts of their own.
    """
    shared = _shared(prompted)
    texts = {
        key: ("", prompt.caption[slice(*prompt.spans[i][0])], "")
        for prompt, keys in shared.parts
        for i, key in enumerate(keys)
    }
    images = _NarrowedPrompts(shared.entries, texts, names, PromptBuilder(prompted.mode, tokenizer, config))
    counts = {**prompted.counts, "prompts": sum(len(image.prompts) for image in images)}
    note = f"{counts['prompts']:,} prompts of retrieved names instead of {len(images) * len(shared.parts):,}"
    return dataclasses.replace(prompted, images=images, counts=counts, notes=(*prompted.notes, note))


def _shared(prompted: PromptedSet) -> SharedPrompts:
    if not isinstance(prompted.images, SharedPrompts):
        raise BenchmarkError(
            f"{prompted.item.name}: names are retrieved only for sets whose images have the same prompts"
        )
    return prompted.images
