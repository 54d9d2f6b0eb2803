"""Vectors of descriptions, and what they do: averaged with the states of names before fusion, or predicted from the image (a side loss).

Averaging texts of one class is of CLIP's prompt ensembles (arXiv 2103.00020, 3.1.4).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glip_jax.config import ModelConfig
from glip_jax.models.bert import text_mask
from glip_jax.models.glip import GLIP
from glip_jax.structures.batch import Batch
from glip_jax.structures.descriptions import Descriptions, DescriptionTable
from glip_jax.structures.prompts import PromptError, Tokenizer

__all__ = ["averaged", "description_table", "with_described_names"]

_BATCH = 64
"""Descriptions that are encoded at once."""


def description_table(
    params: Mapping[str, Any], config: ModelConfig, descriptions: Descriptions, tokenizer: Tokenizer
) -> DescriptionTable:
    """Encodes all descriptions, each alone. `params`: of the network, or its part `text`. Raises PromptError for a text beyond the token budget."""
    owners = np.array([row for row, own in enumerate(descriptions.texts, 1) for _ in own])
    encoded = [tokenizer.encode(text).ids for own in descriptions.texts for text in own]
    length = max(map(len, encoded))
    if length > config.text.max_tokens:
        name = descriptions.names[owners[int(np.argmax([len(ids) for ids in encoded]))] - 1]
        raise PromptError(
            f"a description of {name!r} has {length} tokens with [CLS] and [SEP], model.text.max_tokens is {config.text.max_tokens}: shorten it"
        )

    @jax.jit
    def pooled(params: Any, tokens: Array, mask: Array, inner: Array) -> Array:
        states: Any = GLIP(config).apply(
            {"params": params}, tokens, mask, method=lambda network, *given: network.text(*given)
        )
        return jnp.where(inner[..., None], states.astype(jnp.float32), 0).sum(1) / jnp.maximum(inner.sum(1), 1)[:, None]

    vectors = np.zeros((len(descriptions.texts) + 1, config.text.width), np.float32)
    for begin in range(0, len(encoded), _BATCH):
        tokens, count = np.zeros((_BATCH, length), np.int32), np.zeros((_BATCH, 1), np.int32)
        for row, ids in enumerate(encoded[begin : begin + _BATCH]):
            tokens[row, : len(ids)], count[row] = ids, len(ids)
        place = np.arange(length)
        inner = (place > 0) & (place < count - 1)
        found = np.asarray(pooled({"text": params["text"]}, tokens, place < count, inner))
        np.add.at(vectors, owners[begin : begin + _BATCH], found[: len(encoded) - begin])
    number = np.bincount(owners, minlength=len(vectors)).astype(np.float32)
    return DescriptionTable(vectors / np.maximum(number, 1)[:, None], number / (1 + number))


def averaged(
    states: Float[Array, "B T D"], rows: Int[Array | np.ndarray, "B T"], table: DescriptionTable
) -> Float[Array, "B T D"]:
    """At the tokens of described names the mean of their own state and of the descriptions; `rows` of the table, 0 at other tokens."""
    weight = jnp.asarray(table.share)[rows][..., None]
    mean = (1 - weight) * states.astype(jnp.float32) + weight * jnp.asarray(table.vectors)[rows]
    return jnp.where(weight > 0, mean, states.astype(jnp.float32)).astype(states.dtype)


def with_described_names(network: GLIP, image: Array, batch: Batch, table: DescriptionTable) -> Any:
    """`GLIP.__call__` with averaged text states; `image`: normalized."""
    levels = network.encode_image(image, batch.extent)
    text = averaged(network.encode_text(batch.tokens, batch.token_mask), batch.described, table)
    return network.ground(levels, batch.extent, text, text_mask(batch.tokens, batch.token_mask, network.config.text))
