"""Text states of prompts whose names do not read one another (`TextConfig.mask` phrase): each name is encoded once for all prompts."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32

from glip_jax.config import TextConfig
from glip_jax.structures.prompts import segment_ids

__all__ = ["SegmentStates"]

_ROWS = 32
"""Segments that are encoded in one call."""
_UNIT = 16
"""Rows have a multiple of as many tokens: few shapes to compile."""
_MOST = 16384
"""Segments that are kept, LVIS's names and more: 130 MB of float32 at width 768 and 2.6 tokens a name."""


class SegmentStates:
    """Encoded segments (`prompts.segment_ids`). A segment is encoded in a row of its own between [CLS] and [SEP], so its states do not depend on what
    was asked with it or before, but for rounding: rows are as long as the longest segment of a call.
    """

    def __init__(self, config: TextConfig) -> None:
        self._special = config.separators
        self._states: dict[tuple[int, ...], Any] = {}

    def clear(self) -> None:
        """Forgets all; after the parameters changed."""
        self._states.clear()

    def __call__(
        self, tokens: Int32[np.ndarray, " T"], mask: Bool[np.ndarray, " T"], encode: Callable[[Any, Any], Any]
    ) -> Float[np.ndarray, "T D"]:
        """States of a prompt, zeros at padding. `encode`: the text encoder, of Int32 and Bool[K t] to Float[K t D]; called for new segments only."""
        numbers = segment_ids(tokens, mask, self._special)
        places = [np.flatnonzero(numbers == number) for number in np.unique(numbers[numbers > 0])]
        # [CLS] and [SEP], which all segments read, are the first one: those of an empty row.
        keys = [(), *(tuple(tokens[place].tolist()) for place in places[1:])]
        if len(self._states) > _MOST:
            self.clear()
        missing = [key for key in dict.fromkeys(keys) if key not in self._states]
        for begin in range(0, len(missing), _ROWS):
            self._encode(missing[begin : begin + _ROWS], encode)
        parts = [self._states[key] for key in keys]
        states = np.zeros((len(tokens), parts[0].shape[-1]), parts[0].dtype)
        for place, part in zip(places, parts):
            states[place] = part
        return states

    def _encode(self, keys: list[tuple[int, ...]], encode: Callable[[Any, Any], Any]) -> None:
        length = -(-(2 + max(map(len, keys))) // _UNIT) * _UNIT
        tokens, mask = np.zeros((_ROWS, length), np.int32), np.zeros((_ROWS, length), bool)
        for row, key in enumerate(keys):
            tokens[row, : len(key) + 2] = [self._special[0], *key, self._special[1]]
            mask[row, : len(key) + 2] = True
        found = np.asarray(encode(tokens, mask))
        for row, key in enumerate(keys):
            self._states[key] = found[row, 1 : len(key) + 1] if key else found[row, :2]
