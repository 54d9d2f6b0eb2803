"""The part of a set that this process works on, and the results of all processes.

Each process detects in its own images, on its own devices, at its own pace; at the end of a set all get the results of all.
"""

import contextlib
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

__all__ = ["Share"]

_Item = TypeVar("_Item")
_PIECE_BYTES = 16 << 20
"""Bytes of each process in one collective, whose result lies in the memory of every device."""


@dataclass(frozen=True)
class Share:
    """Which of several processes this is; the default is the only one."""

    index: int = 0
    """Of `jax.process_index`. Process 0 writes files and prints tables."""
    count: int = 1
    meet: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Makes the context of a collective: within training it raises in all processes if a signal came to one."""

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def of(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """The items of this process: every `count`-th, so that processes get alike ones of sorted items."""
        return items[self.index :: self.count]

    def groups(
        self, items: Iterable[_Item], key: Callable[[_Item], Hashable], batch_size: int, group_size: int
    ) -> Iterator[list[_Item]]:
        """The items of this process, in groups for a call of the detector: of one `key`, a batch for each device.

        A batch holds the same items on any number of devices and processes, so that boxes and their order agree, and scores to rounding.
        """
        by_key: dict[Hashable, list[_Item]] = {}
        for item in items:
            by_key.setdefault(key(item), []).append(item)
        cuts = [(own, begin) for own in by_key.values() for begin in range(0, len(own), batch_size)]
        group: list[_Item] = []
        for own, begin in self.of(cuts):
            if group and (len(group) == group_size or key(group[0]) != key(own[0])):
                yield group
                group = []
            group += own[begin : begin + batch_size]
        if group:
            yield group

    def gather(self, value: _Item) -> list[_Item]:
        """The values of all processes, in their order, in each of them. To be called by all processes equally often.

        A value is pickled. The bits of arrays are kept.
        """
        if self.count == 1:
            return [value]
        from jax.experimental import multihost_utils  # only now: jobs make a Share before they need jax

        own = np.frombuffer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), np.uint8)
        with self.meet():
            sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(own))))
            # Few sizes of pieces, so that few programs are compiled.
            piece = min(_PIECE_BYTES, 1 << int(sizes.max() - 1).bit_length())
            padded = np.zeros(-(-int(sizes.max()) // piece) * piece, np.uint8)
            padded[: len(own)] = own
            parts = [np.asarray(multihost_utils.process_allgather(part)) for part in padded.reshape(-1, piece)]
        rows = np.concatenate(parts, axis=1)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
