"""Overlap of a benchmark with the training data: images by the hash of their files, names by their cleaned text.

A model is zero-shot on a set only as far as it has not been trained on the images or the names of the set. The shards of a run
record a hash of every image file (`glip_jax.data.records.content_hash`) and, of detection sources, the category names. An image
that was compressed again or resized has another hash and is not found; words of captions are not searched.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from glip_jax import UserError
from glip_jax.data.manifest import finished, read_file
from glip_jax.io.retry import StorageError
from glip_jax.structures.prompts import clean_name

__all__ = ["Training", "image_overlap", "name_overlap", "read_training"]

_EXAMPLES = 5
"""Number of images and names that an overlap lists."""


class Training(NamedTuple):
    """What the shards of the training data record of their images and names."""

    hashes: dict[str, Any]
    """UInt64[N] by source: content hashes of its records, sorted, each once."""
    names: dict[str, tuple[str, ...]]
    """Category names by source; empty for captions."""
    unread: dict[str, str]
    """Sources whose shards cannot be read, with the reason."""


def read_training(sources: Mapping[str, str]) -> Training:
    """Reads manifest and columns of each source; `sources`: folder of shards by name, local or gs://.

    A source that cannot be read is listed in `unread` and raises nothing: shards often lie on another machine than the benchmark.
    """
    hashes, names, unread = {}, {}, {}
    for name, folder in sources.items():
        try:
            manifest = finished(folder)
            if manifest is None:
                unread[name] = f"{folder} holds no finished shards"
                continue
            with np.load(io.BytesIO(read_file(f"{folder}/{manifest.columns['file']}"))) as columns:
                hashes[name] = np.unique(columns["hash"].astype(np.uint64))
            names[name] = manifest.names
        except (UserError, StorageError, OSError, ValueError, KeyError) as error:
            unread[name] = f"{folder}: {error}"
    return Training(hashes, names, unread)


def image_overlap(training: Training, digests: Mapping[str, str]) -> dict[str, Any]:
    """Images of a set that are also images of the training data.

    `digests`: SHA-256 of each file, in hexadecimal, by a name of the image. Returns `images` and `found` (numbers of different
    files), `by_source` and `examples` (names of images). A file that several prompts share counts once.
    """
    unique = {int(digest[:16], 16): name for name, digest in reversed([*digests.items()])}
    own = np.fromiter(unique, np.uint64, len(unique))
    by_source = {name: own[np.isin(own, hashes)] for name, hashes in training.hashes.items()}
    found = np.unique(np.concatenate([np.zeros(0, np.uint64), *by_source.values()]))
    return {
        "images": len(unique),
        "found": len(found),
        "by_source": {name: len(hits) for name, hits in by_source.items() if len(hits)},
        "examples": sorted(unique[int(value)] for value in found)[:_EXAMPLES],
    }


def name_overlap(training: Training, names: Iterable[str]) -> dict[str, Any]:
    """Names of a set that are also category names of the training data, compared as prompts have them, without regard to case.

    Returns `names` and `found` (numbers of different names), `by_source` and `missing` (the first that training does not have).
    """
    asked = {_plain(name): name for name in names}
    by_source = {source: asked.keys() & set(map(_plain, known)) for source, known in training.names.items()}
    found: set[str] = set().union(*by_source.values())
    absent: Sequence[str] = [name for key, name in asked.items() if key not in found]
    return {
        "names": len(asked),
        "found": len(found),
        "by_source": {source: len(hits) for source, hits in by_source.items() if hits},
        "missing": list(absent[:_EXAMPLES]),
    }


def _plain(name: str) -> str:
    return " ".join(clean_name(name).casefold().split())
