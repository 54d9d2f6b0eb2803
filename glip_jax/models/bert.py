"""BERT encoder in Hugging Face's sizes (arXiv 1810.04805), and its layer as the detection head uses it.

Layers are stacked along a leading axis by one scan. Padding rows are inert: nobody attends to them.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import Remat, TextConfig
from glip_jax.models.dropout import Dropout
from glip_jax.models.initializers import torch_dense
from glip_jax.models.remat import rematerialized
from glip_jax.models.tensor_parallel import axis_index, entering, parts, summed_dot_general

__all__ = ["Bert", "BertLayer", "LOGIT_BOUND", "bounded"]

LOGIT_BOUND = 50000.0
"""The original clips attention logits and activations of its head to this (CLAMP_*, glip-reference 1.1)."""


def bounded(x: jax.Array) -> jax.Array:
    """`x` clipped to +-50000."""
    return jnp.clip(x, -LOGIT_BOUND, LOGIT_BOUND)


class BertLayer(nn.Module):
    """Post-norm self-attention and feed-forward.

    `clip` adds the head's clips (glip-reference 2.6); `start` is "bert" for N(0, 0.02), or "torch" for the linear
    layers' default, which the original leaves its in-head layers at.
    """

    config: TextConfig
    train: bool
    dtype: Any
    clip: bool = False
    start: Literal["bert", "torch"] = "bert"

    def _dense(self, features: int, fan_in: int, name: str, **how: Any) -> nn.Dense:
        if self.start == "torch":
            return torch_dense(features, fan_in, self.dtype, name, **how)
        return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name, **how)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, use_fast_variance=False, name=name)

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, "B T C"], None]:
        """Returns (new x, None): the form of a scan's body."""
        width, hidden_width, shares = self.config.width, self.config.hidden, parts()
        depth, heads, own = width // self.config.heads, self.config.heads // shares, width // shares
        drop = Dropout(self.config.dropout, self.train)
        clip = bounded if self.clip else lambda y: y
        split, whole = (*x.shape[:2], heads, depth), entering(x)
        query = self._dense(own, width, "query")(whole).reshape(split)
        key = self._dense(own, width, "key")(whole).reshape(split)
        value = self._dense(own, width, "value")(whole).reshape(split)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = clip(logits * depth**-0.5)
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = drop(jax.nn.softmax(logits, axis=-1), axis_index() * heads).astype(self.dtype)
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:2], own)
        attended = self._dense(width, width, "attention_output", dot_general=summed_dot_general)(context)
        x = self._norm("attention_norm")(drop(attended) + x)
        hidden = clip(self._dense(hidden_width // shares, width, "intermediate")(entering(x)))
        hidden = clip(nn.gelu(hidden, approximate=False))
        out = self._dense(width, hidden_width, "output", dot_general=summed_dot_general)(hidden)
        out = clip(drop(out))
        return clip(self._norm("output_norm")(out + x)), None


class _Embeddings(nn.Module):
    """Word, position and type embeddings, normalised."""

    config: TextConfig
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T C"]:
        start, width = nn.initializers.normal(0.02), self.config.width
        word = self.param("word", start, (self.config.vocabulary_size, width))
        position = self.param("position", start, (self.config.positions, width))
        kind = self.param("type", start, (2, width))
        x = word[tokens] + position[None, : tokens.shape[1]] + kind[0]
        x = nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, use_fast_variance=False, name="norm")(x)
        return Dropout(self.config.dropout, self.train)(x)


class Bert(nn.Module):
    """The text encoder without pooler (glip-reference 2.1)."""

    config: TextConfig
    train: bool = False
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T C"]:
        """Token ids and mask to hidden states of the last layer; padding rows are not zeroed."""
        train = self.train and not self.config.frozen
        x = _Embeddings(self.config, train, self.dtype, name="embeddings")(tokens)
        layer = rematerialized(BertLayer, self.remat)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=self.config.layers,
        )
        x, _ = layers(self.config, train, self.dtype, name="layers")(x, mask)
        return jax.lax.stop_gradient(x) if self.config.frozen else x
