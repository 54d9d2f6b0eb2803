"""Tuned prompts (paper section 4): a table of text states by name, which takes the place of BERT's output.

The original adds a table by token position to the states of one prompt. This table is keyed by name: the states of BERT for
the name, P0, and a trained delta. The tokens of a name are found in the token ids, so names may be asked in any order, in several
prompts, and beside names that were not tuned.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import PromptsConfig

__all__ = ["CLS", "NONE", "SEP", "SEPARATOR", "SPECIAL_ROWS", "FoundStates", "TunedPrompts", "find_rows"]

NONE = -1
"""Token id of an unused cell of the table."""
SPECIAL_ROWS = 3
"""Rows behind those of the names."""
CLS, SEP, SEPARATOR = range(SPECIAL_ROWS)
"""Which of them holds [CLS], [SEP], and the separator between two names (whose states are in the rows of the names)."""


class FoundStates(NamedTuple):
    """Tuned states of a batch of prompts."""

    states: Float[Array, "B T D"]
    covered: Bool[Array, "B T"]
    """Tokens with a tuned state: those of tuned names with the separator behind them; where these are all, [CLS] and [SEP] too."""

    def applied(self, encoded: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The states of BERT, `encoded`, with the tuned ones in their place."""
        return jnp.where(self.covered[..., None], self.states.astype(encoded.dtype), encoded)


class TunedPrompts(nn.Module):
    """The table. Its rows: one for each name, with its separator, then [CLS], [SEP] and the separator alone."""

    config: PromptsConfig
    width: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> FoundStates:
        """The tuned states of the tokens."""
        shape = (self.config.names + SPECIAL_ROWS, self.config.tokens)
        table = self.param("tokens", lambda _: jnp.full(shape, NONE, jnp.int32))
        embeddings = self.param("embeddings", nn.initializers.zeros, (*shape, self.width))
        deltas = self.param("deltas", nn.initializers.zeros, (*shape, self.width))
        row, column, covered = find_rows(table, tokens, mask)
        return FoundStates(embeddings[row, column] + deltas[row, column], covered)


def find_rows(
    table: Int[Array, "N L"], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Row and column in `table` of each token, and whether it has one (elsewhere both are 0).

    A name is found where it begins behind [CLS] or a separator and ends before a separator or [SEP]. Where several are found the
    longest counts, of these the first.
    """
    names, special = table[:-SPECIAL_ROWS], table[-SPECIAL_ROWS:]
    cells, position = table.shape[1], jnp.arange(tokens.shape[1])
    ids = jnp.where(mask, tokens, NONE)
    separator, gap = special[SEPARATOR], jnp.sum(special[SEPARATOR] != NONE)
    length = jnp.sum(names != NONE, axis=1)
    # Windows [B T L] of the tokens from each position on, and of as many as a separator has before it.
    ahead = _windows(ids, position, cells)
    behind = _windows(ids, position - gap, cells)
    after_separator = jnp.all((behind == separator) | (separator == NONE), axis=-1) & (position > gap)
    begins = (position == 1) | after_separator
    column = jnp.arange(cells)
    inside = column < (length - gap)[:, None]  # [N L]: cells of the name without its separator
    cell_equal = ahead[:, :, None, :] == names
    same_name = jnp.all(cell_equal | ~inside, axis=-1)
    whole = jnp.all(cell_equal | (names == NONE), axis=-1)
    following = _windows(ids, position, cells + 1)[:, :, jnp.minimum(length - gap, cells)]
    found = begins[..., None] & (length > gap) & same_name & (whole | (following == special[SEP, 0]))
    span = jnp.where(found, jnp.where(whole, length, length - gap), 0)  # [B T N]
    row_here, span_here = jnp.argmax(span, axis=-1), jnp.max(span, axis=-1)
    # The name that a token lies in: the longest one that begins at or before it and reaches it.
    offset = position[:, None] - position[None, :]  # [T of the token, T of the first token]
    reaching = jnp.where((offset >= 0) & (offset < span_here[:, None, :]), span_here[:, None, :], 0)
    first = jnp.argmax(reaching, axis=-1)
    covered = jnp.max(reaching, axis=-1) > 0
    row = jnp.take_along_axis(row_here, first, axis=1)
    place = position - first
    last = jnp.sum(mask, axis=1, keepdims=True) - 1
    is_cls, is_sep = (position == 0) & (ids == special[CLS, 0]), (position == last) & (ids == special[SEP, 0])
    complete = jnp.all(covered | is_cls | is_sep | ~mask, axis=1, keepdims=True) & jnp.any(
        covered, axis=1, keepdims=True
    )
    row = jnp.where(is_cls, len(names) + CLS, jnp.where(is_sep, len(names) + SEP, row))
    ends = is_cls | is_sep
    covered = jnp.where(ends, complete, covered)
    return jnp.where(covered, row, 0), jnp.where(covered & ~ends, place, 0), covered


def _windows(ids: Int[Array, "B T"], start: Int[Array, " T"], width: int) -> Int[Array, "B T W"]:
    """Tokens from each of the positions `start` on; NONE beyond both ends."""
    place = start[:, None] + jnp.arange(width)
    inside = (place >= 0) & (place < ids.shape[1])
    return jnp.where(inside, ids[:, jnp.clip(place, 0, ids.shape[1] - 1)], NONE)
