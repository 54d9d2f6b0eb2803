"""The flags of `evaluate` and `benchmark` that compare numbers and orders of the names in a prompt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glip_jax.config.ranges import Limit

if TYPE_CHECKING:
    from glip_jax.evaluation.chunking import Chunking

__all__ = ["ChunkArguments", "chunking_of"]


@dataclass(frozen=True)
class ChunkArguments:
    """The flags."""

    chunk: tuple[Limit, ...] = ()
    """Names per prompt to compare, such as 20,40,80 (0: as many as fit): every set that is prompted with names is detected again with
    each, in the order of ids and shuffled, and the report says how the numbers change."""
    chunk_seeds: tuple[Limit, ...] = (0, 1)
    """Seeds of the shuffled orders of --chunk."""
    chunk_images: Limit = 0
    """Number of first images of each set that --chunk takes; 0: all that are evaluated."""


def chunking_of(arguments: ChunkArguments) -> "Chunking | None":
    """What --chunk compares; None without it."""
    if not arguments.chunk:
        return None
    from glip_jax.evaluation.chunking import Chunking

    return Chunking(arguments.chunk, arguments.chunk_seeds, arguments.chunk_images)
