"""Deep fusion (paper section 3.2, equations 4-6): image and text attend to each other with one shared map of logits.

Parameters are those of the original (glip-reference 2.5), the order of the products is not. The query projection is folded into
the text keys, the visual output projection into the text values, and the visual value projection is applied after the attention of
the text. This leaves three products over the A locations of the image instead of six dense layers. The logits [A, T] of one
attention head at a time are in memory, and the backward pass recomputes them. If the logits of several images are large, images
are processed one after the other, so that on a TPU the intermediate results stay in on-chip memory.

Softmax over the text excludes padding tokens; softmax over the image excludes locations beyond the extent.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from glip_jax.config import FusionConfig, LoraConfig
from glip_jax.models.bert import clamped
from glip_jax.models.dropout import example_keys, hashed_bits
from glip_jax.models.initializers import xavier_uniform
from glip_jax.models.lora import with_low_rank_delta
from glip_jax.models.remat import images_at_once, save_activation

__all__ = ["Fusion"]

_MASKED = -1e30
_MAX_LOGITS_BYTES = 32 * 2**20
"""Maximum bytes of logits of several images at once: the on-chip memory of a TPU (128 MB on v5e) holds a few such arrays. One
image of 800 x 1344 with 256 tokens has 23 MB."""


class _Dense(NamedTuple):
    kernel: Array
    bias: Array


class _Operands(NamedTuple):
    """Folded text operands of the attention (leading axis: heads)."""

    keys: Float[Array, "heads B T C"]
    key_bias: Float[Array, "heads B T"]
    values: Float[Array, "heads B T C"]


def _dropped(kept: Bool[Array, "B A T"] | None, weights: Float[Array, "B A T"], rate: float) -> Float[Array, "B A T"]:
    return weights if kept is None else jnp.where(kept, weights / (1.0 - rate), 0.0)


def _kept(
    keys: jax.Array | None, shape: tuple[int, ...], rate: float
) -> tuple[Bool[Array, "B A T"] | None, Bool[Array, "B A T"] | None]:
    """Which attention weights dropout keeps, over text and over image; `keys`: one per image.

    Each direction uses 16 of 32 random bits.
    """
    if keys is None:
        return None, None
    bits = jax.vmap(lambda key: hashed_bits(key, shape[1:]))(keys)
    threshold = round(rate * 65536)
    return (bits >> 16) >= threshold, (bits & 0xFFFF) >= threshold


class Fusion(nn.Module):
    """Bidirectional attention between all locations and tokens."""

    config: FusionConfig
    train: bool
    dtype: Any
    lora: LoraConfig = LoraConfig()

    def _dense(self, name: str, inputs: int, outputs: int) -> _Dense:
        kernel = self.param(f"{name}_kernel", xavier_uniform, (inputs, outputs))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (outputs,))
        return _Dense(with_low_rank_delta(self, name, kernel, self.lora), bias)

    @nn.compact
    def __call__(
        self,
        visual: Float[Array, "B A C"],
        text: Float[Array, "B T D"],
        valid: Bool[Array, "B A"],
        mask: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B A C"], Float[Array, "B T D"]]:
        """New (visual, text). The residual connection starts at the normalized inputs, as in the original."""
        config, channels, text_width = self.config, visual.shape[-1], text.shape[-1]
        heads, depth = config.heads, config.width // config.heads
        norm = {"epsilon": 1e-5, "dtype": self.dtype, "use_fast_variance": False}
        visual = nn.LayerNorm(**norm, name="visual_norm")(visual)
        text = nn.LayerNorm(**norm, name="text_norm")(text)
        query = self._dense("visual_query", channels, config.width)
        key = self._dense("text_key", text_width, config.width)
        value = self._dense("visual_value", channels, config.width)
        text_value = self._dense("text_value", text_width, config.width)
        output = self._dense("visual_output", config.width, channels)
        text_output = self._dense("text_output", config.width, text_width)
        start = nn.initializers.constant(config.gamma)
        gamma, text_gamma = (
            self.param("visual_gamma", start, (channels,)),
            self.param("text_gamma", start, (text_width,)),
        )

        # Folding is over few text rows and wide sums: float32.
        exact = jax.lax.Precision.HIGHEST
        text32 = text.astype(jnp.float32)
        by_head = (*text.shape[:2], heads, depth)
        keys = (jnp.matmul(text32, key.kernel, precision=exact) + key.bias).reshape(by_head) * depth**-0.5
        values = (jnp.matmul(text32, text_value.kernel, precision=exact) + text_value.bias).reshape(by_head)
        operands = _Operands(
            jnp.einsum("bthd,chd->hbtc", keys, query.kernel.reshape(channels, heads, depth), precision=exact).astype(
                self.dtype
            ),
            jnp.einsum("bthd,hd->hbt", keys, query.bias.reshape(heads, depth), precision=exact),
            jnp.einsum("bthd,hdc->hbtc", values, output.kernel.reshape(heads, depth, channels), precision=exact).astype(
                self.dtype
            ),
        )
        rate = config.dropout if self.train else 0.0
        keys_of_images = None
        if rate > 0:
            keys_of_heads = jax.random.split(self.make_rng("dropout"), heads)
            keys_of_images = jax.vmap(lambda key: example_keys(key, len(visual)))(keys_of_heads)
        for_image, for_text, weight_sum = _attend(visual, operands, valid, mask, keys_of_images, rate)

        # With dropout the attention weights over the image sum to `weight_sum`, not to 1; so the bias is scaled by it.
        read = jnp.einsum("hbtc,chd->bthd", for_text, value.kernel.reshape(channels, heads, depth), precision=exact)
        read += jnp.moveaxis(weight_sum, 0, 2)[..., None] * value.bias.reshape(heads, depth)
        new_text = jnp.matmul(read.reshape(*text.shape[:2], -1), text_output.kernel, precision=exact) + text_output.bias
        visual = visual + (gamma * (for_image + output.bias)).astype(self.dtype)
        return visual, text + (text_gamma * new_text).astype(self.dtype)


class _Attended(NamedTuple):
    """Results of both directions of the attention."""

    for_image: Float[Array, "B A C"]
    """Text values read by the image, summed over heads, float32."""
    for_text: Float[Array, "heads B T C"]
    """Visual features read by the text."""
    weight_sum: Float[Array, "heads B T"]
    """Sum of the attention weights of each token over the image."""


def _attend(
    visual: Float[Array, "B A C"], operands: _Operands, valid: Bool[Array, "B A"], mask: Bool[Array, "B T"], keys: Any, rate: float
) -> _Attended:  # fmt: skip
    """Both directions, for as many images at once as `_MAX_LOGITS_BYTES` allows. `keys`: dropout keys [heads B], or None."""
    images = len(visual)
    group = images_at_once(images, 4 * visual.shape[1] * mask.shape[1], _MAX_LOGITS_BYTES)
    if group == images:
        return save_activation(_attend_at_once(visual, operands, valid, mask, keys, rate))

    def grouped(x: Array) -> Array:
        return x.reshape(-1, group, *x.shape[1:])

    def grouped_after_heads(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(len(x), -1, group, *x.shape[2:]), 1, 0)

    def ungrouped_after_heads(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], images, *x.shape[3:])

    parts = (
        grouped(visual), jax.tree.map(grouped_after_heads, operands), grouped(valid), grouped(mask),
        jax.tree.map(grouped_after_heads, keys),
    )  # fmt: skip
    results = jax.lax.map(lambda part: _attend_at_once(*part, rate=rate), parts)
    whole = _Attended(
        results.for_image.reshape(visual.shape),
        ungrouped_after_heads(results.for_text),
        ungrouped_after_heads(results.weight_sum),
    )
    return save_activation(whole)


def _attend_at_once(
    visual: Float[Array, "B A C"], operands: _Operands, valid: Bool[Array, "B A"], mask: Bool[Array, "B T"], keys: Any, rate: float
) -> _Attended:  # fmt: skip
    """Both directions, as a scan over attention heads."""

    @jax.checkpoint
    def head(
        for_image: Float[Array, "B A C"], item: tuple[_Operands, Any]
    ) -> tuple[Float[Array, "B A C"], tuple[Float[Array, "B T C"], Float[Array, "B T"]]]:
        text, head_keys = item
        logits = jnp.einsum("bac,btc->bat", visual, text.keys, preferred_element_type=jnp.float32)
        logits = clamped(logits + text.key_bias[:, None, :])
        over_text = jax.nn.softmax(jnp.where(mask[:, None, :], logits, _MASKED), axis=2)
        kept_of_text, kept_of_image = _kept(head_keys, logits.shape, rate)
        over_text = _dropped(kept_of_text, over_text, rate).astype(visual.dtype)
        for_image += jnp.einsum("bat,btc->bac", over_text, text.values, preferred_element_type=jnp.float32)
        over_image = jax.nn.softmax(jnp.where(valid[:, :, None], logits, _MASKED), axis=1)
        over_image = _dropped(kept_of_image, over_image, rate)
        read = jnp.einsum("bat,bac->btc", over_image.astype(visual.dtype), visual, preferred_element_type=jnp.float32)
        return for_image, (read, over_image.sum(1))

    start = jnp.zeros(visual.shape, jnp.float32)
    for_image, (for_text, weight_sum) = jax.lax.scan(head, start, (operands, keys))
    return _Attended(for_image, for_text, weight_sum)
