"""BERT encoder in Hugging Face's sizes (arXiv 1810.04805), and its layer as the detection head uses it.

Layers are stacked along a leading axis by one scan. Padding rows are masked: no token attends to them.
"""

from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import LoraConfig, Remat, TextConfig
from glip_jax.models.dropout import Dropout
from glip_jax.models.gelu import gelu
from glip_jax.models.initializers import torch_dense
from glip_jax.models.lora import low_rank_product
from glip_jax.models.remat import rematerialized
from glip_jax.models.tensor_parallel import axis_index, column_parallel_input, row_parallel_dot_general, tensor_shards
from glip_jax.structures.prompts import segment_ids

__all__ = ["Bert", "BertLayer", "LOGIT_BOUND", "TextMask", "clamped", "text_mask"]

TextMask: TypeAlias = Bool[Array, "B T"] | Int[Array, "B T"]
"""Tokens that attention reads: False for padding; or the numbers of `segment_ids`: a token reads those of its own segment and of segment 1."""

LOGIT_BOUND = 50000.0
"""Attention logits and activations of the head are clamped to this magnitude (CLAMP_* of the original, glip-reference 1.1)."""


def clamped(x: jax.Array) -> jax.Array:
    """`x` clamped to +-LOGIT_BOUND."""
    return jnp.clip(x, -LOGIT_BOUND, LOGIT_BOUND)


def text_mask(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], config: TextConfig) -> TextMask:
    """The mask of `config` for a prompt whose tokens are where `mask` is True."""
    return mask if config.mask == "padding" else segment_ids(tokens, mask, config.separators)


def _readable(mask: TextMask) -> Bool[Array, "B _ T"]:
    """Which tokens each token reads. Padding reads something too, as a softmax needs."""
    if mask.dtype == bool:
        return mask[:, None]
    return (mask[:, :, None] == mask[:, None]) | (mask[:, None] == 1)


class BertLayer(nn.Module):
    """Post-norm self-attention and feed-forward.

    `clip` clamps logits and activations, as in the head (glip-reference 2.6). `start`: initial weights, "bert" for N(0, 0.02) or
    "torch" for the default of PyTorch's linear layers, which the original uses in the head. `lora`: deltas of the four projections.
    """

    config: TextConfig
    train: bool
    dtype: Any
    clip: bool = False
    start: Literal["bert", "torch"] = "bert"
    lora: LoraConfig = LoraConfig()

    def _dense(self, features: int, fan_in: int, name: str, **how: Any) -> nn.Dense:
        if self.start == "torch":
            return torch_dense(features, fan_in, self.dtype, name, **how)
        return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name, **how)

    def _projection(self, x: jax.Array, features: int, name: str, parallel: Literal["columns", "rows"]) -> jax.Array:
        """A dense layer of the attention, with its low-rank delta where there is one."""
        how: dict[str, Any] = {} if parallel == "columns" else {"dot_general": row_parallel_dot_general}
        y = self._dense(features, self.config.width, name, **how)(x)
        if not self.lora.rank:
            return y
        return y + low_rank_product(self, name, x, features, self.lora, self.dtype, parallel)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, use_fast_variance=False, name=name)

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], mask: TextMask) -> tuple[Float[Array, "B T C"], None]:
        """Returns (new x, None), as the body of a scan."""
        width, hidden_width, shards = self.config.width, self.config.hidden, tensor_shards()
        depth, heads, local_width = width // self.config.heads, self.config.heads // shards, width // shards
        drop = Dropout(self.config.dropout, self.train)
        clip = clamped if self.clip else lambda y: y
        by_head, inputs = (*x.shape[:2], heads, depth), column_parallel_input(x)
        query = self._projection(inputs, local_width, "query", "columns").reshape(by_head)
        key = self._projection(inputs, local_width, "key", "columns").reshape(by_head)
        value = self._projection(inputs, local_width, "value", "columns").reshape(by_head)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = clip(logits * depth**-0.5)
        logits = jnp.where(_readable(mask)[:, None], logits, jnp.finfo(jnp.float32).min)
        weights = drop(jax.nn.softmax(logits, axis=-1), axis_index() * heads).astype(self.dtype)
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:2], local_width)
        attended = self._projection(context, width, "attention_output", "rows")
        x = self._norm("attention_norm")(drop(attended) + x)
        hidden = clip(self._dense(hidden_width // shards, width, "intermediate")(column_parallel_input(x)))
        hidden = clip(gelu(hidden))
        out = self._dense(width, hidden_width, "output", dot_general=row_parallel_dot_general)(hidden)
        out = clip(drop(out))
        return clip(self._norm("output_norm")(out + x)), None


def _places(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart with every segment: [CLS] 0, [SEP] 1, and the tokens of a name from 1 on, as behind [CLS]."""
    before = jnp.tri(segments.shape[1], k=-1, dtype=bool) & (segments[:, :, None] == segments[:, None])
    return before.sum(-1) + (segments > 1)


class _Embeddings(nn.Module):
    """Sum of word, position and type embeddings, normalized."""

    config: TextConfig
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], mask: TextMask) -> Float[Array, "B T C"]:
        start, width = nn.initializers.normal(0.02), self.config.width
        word = self.param("word", start, (self.config.vocabulary_size, width))
        position = self.param("position", start, (self.config.positions, width))
        kind = self.param("type", start, (2, width))
        x = (
            word[tokens]
            + (position[None, : tokens.shape[1]] if mask.dtype == bool else position[_places(mask)])
            + kind[0]
        )
        x = nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, use_fast_variance=False, name="norm")(x)
        return Dropout(self.config.dropout, self.train)(x)


class Bert(nn.Module):
    """BERT text encoder without pooler (glip-reference 2.1)."""

    config: TextConfig
    train: bool = False
    dtype: Any = jnp.float32
    remat: Remat = "none"
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T C"]:
        """Hidden states of the last layer from token ids and mask; rows of padding are not zeroed."""
        train = self.train and not self.config.frozen
        visible = text_mask(tokens, mask, self.config)
        x = _Embeddings(self.config, train, self.dtype, name="embeddings")(tokens, visible)
        layer = rematerialized(BertLayer, self.remat)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=self.config.layers,
        )
        x, _ = layers(self.config, train, self.dtype, lora=self.lora, name="layers")(x, visible)
        return jax.lax.stop_gradient(x) if self.config.frozen else x
