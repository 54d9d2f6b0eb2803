"""Counts of each source over a run: examples, epochs, and corrupt records."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from glip_jax import UserError
from glip_jax.config import DataConfig
from glip_jax.data.mixture import Mixture
from glip_jax.structures.canvas import canvas_size, nearest_aspect

__all__ = ["CorruptDataError", "SourceCounts", "reduced_records"]

_MAX_NAMED = 5
"""Corrupt records that a message names."""


class CorruptDataError(UserError, RuntimeError):
    """More of a source is corrupt than `data.max_corrupt_rate`; the message names the source, the share and the first records."""


class SourceCounts:
    """Counts of the sources of a mixture, over a whole run."""

    def __init__(
        self, names: Sequence[str], records: Sequence[int], data: DataConfig, describe: Callable[[int, int], str]
    ) -> None:
        """`records`: number of records of each source. `describe(source, record)` names a record in a message."""
        self._names, self._records, self._data, self._describe = names, records, data, describe
        self._seen = np.zeros(len(names), np.int64)
        self._window = np.zeros(len(names), np.int64)
        self._corrupt: list[list[int]] = [[] for _ in names]

    def resume(self, lines: Sequence[Mapping[str, Any]], shares: Sequence[float], examples: int) -> None:
        """Continues from the counts in the latest of the recorded `lines` that has any.

        Where no line has counts (a run of an older version), each source is taken to have had its share of the `examples` so
        far. A source that the counts lack is new in this phase and starts at 0.
        """
        counted = next((line for line in reversed(lines) if any(k.endswith("/seen") for k in line)), None)
        for index, name in enumerate(self._names):
            guess = round(shares[index] * examples) if counted is None else 0
            self._seen[index] = guess if counted is None else counted.get(f"source/{name}/seen", guess)

    def add(
        self, source: Int[np.ndarray, " B"], record: Int[np.ndarray, " B"], corrupt: Bool[np.ndarray, " B"]
    ) -> None:
        """Adds the examples of one step: source, record, and whether it was corrupt.

        Raises CorruptDataError as soon as more than `data.max_corrupt_rate` of `data.corrupt_window` examples of a
        source are corrupt, within the first window if all of them are.
        """
        counts = np.bincount(source, minlength=len(self._names))
        self._seen += counts
        self._window += counts
        for index in range(len(self._names)):
            self._corrupt[index] += record[corrupt & (source == index)].tolist()
            # A step can reach beyond the end of a window.
            over = max(self._data.corrupt_window, int(self._window[index]))
            if len(self._corrupt[index]) > self._data.max_corrupt_rate * over:
                raise CorruptDataError(self._message(index))
            if self._window[index] >= self._data.corrupt_window:
                self._window[index], self._corrupt[index] = 0, []

    def metrics(self) -> dict[str, int | float]:
        """`source/NAME/seen`: examples since step 0; `source/NAME/epochs`: passes over the records of the source."""
        numbers: dict[str, int | float] = {}
        for name, seen, records in zip(self._names, self._seen.tolist(), self._records, strict=True):
            numbers |= {f"source/{name}/seen": seen, f"source/{name}/epochs": round(seen / records, 4)}
        return numbers

    def _message(self, index: int) -> str:
        bad, seen = self._corrupt[index], int(self._window[index])
        records = list(dict.fromkeys(bad))
        shown = "; ".join(self._describe(index, record) for record in records[:_MAX_NAMED])
        more = f" and {len(records) - _MAX_NAMED} more" if len(records) > _MAX_NAMED else ""
        return (
            f"data.sources.{self._names[index]}: {len(bad)} of its last {seen} examples are corrupt "
            f"({len(bad) / seen:.1%}), data.max_corrupt_rate allows {self._data.max_corrupt_rate:.1%} of "
            f"{self._data.corrupt_window}: {shown}{more}. Nothing of this step is saved; copy or import "
            "the source again, or raise data.max_corrupt_rate to train without these records"
        )


def reduced_records(mixture: Mixture) -> list[str]:
    """A note on each source of which records are trained more than 1 % smaller than the sides say, as their canvas is too small."""
    config, data, notes = mixture.config, mixture.config.data, []
    for source, shards in zip(mixture.source_names, mixture.shards):
        sides, share = np.stack([shards.height, shards.width], 1), np.ones(len(shards))
        nearest, ratio = nearest_aspect(shards.height, shards.width, data.aspects), sides / sides.min(1, keepdims=True)
        for side in data.short_sides:
            canvases = [canvas_size(side, a, data.long_side, config.model.input.extent_multiple) for a in data.aspects]
            wanted = ratio * np.minimum(side, data.long_side / ratio.max(1, keepdims=True))
            share = np.minimum(share, (np.array(canvases)[nearest] / wanted).min(1))
        worst = int(share.argmin())
        height, width = sides[worst]
        if share[worst] < 0.99:
            notes.append(
                f"data.sources.{source}: {(share < 0.99).sum():,} of {len(shards):,} records are trained smaller than "
                f"data.short_sides and data.long_side say, as no canvas holds them; record {worst} ({height} x {width}) by "
                f"{1 - share[worst]:.0%}: {height / width:.6f} in data.aspects would hold it"
            )
    return notes
