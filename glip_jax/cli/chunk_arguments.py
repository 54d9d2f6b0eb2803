"""The flags of `evaluate` and `benchmark` that compare numbers and orders of the names in a prompt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glip_jax.cli.command_line import CommandLineError

if TYPE_CHECKING:
    from glip_jax.evaluation.chunking import Chunking

__all__ = ["ChunkArguments", "checked_chunks"]


@dataclass(frozen=True)
class ChunkArguments:
    """The flags."""

    chunk: tuple[int, ...] = ()
    """Names per prompt to compare, such as 20,40,80 (0: as many as fit): every set that is prompted with names is detected again with
    each, in the order of ids and shuffled, and the report says how the numbers change."""
    chunk_seeds: tuple[int, ...] = (0, 1)
    """Seeds of the shuffled orders of --chunk."""
    chunk_images: int = 0
    """Number of first images of each set that --chunk takes; 0: all that are evaluated."""


def checked_chunks(arguments: ChunkArguments) -> "Chunking | None":
    """What --chunk compares; None without it. Raises CommandLineError for negative numbers."""
    for flag in ("chunk", "chunk_seeds"):
        if any(value < 0 for value in getattr(arguments, flag)):
            given = ",".join(map(str, getattr(arguments, flag)))
            raise CommandLineError(f"--{flag.replace('_', '-')}={given}: expected numbers of at least 0")
    if arguments.chunk_images < 0:
        raise CommandLineError(f"--chunk-images={arguments.chunk_images}: expected at least 0")
    if not arguments.chunk:
        return None
    from glip_jax.evaluation.chunking import Chunking

    return Chunking(arguments.chunk, arguments.chunk_seeds, arguments.chunk_images)
