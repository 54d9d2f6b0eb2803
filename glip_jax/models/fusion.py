"""Deep fusion (paper section 3.2, equations 4-6): image and text attend to each other through one map of logits.

The parameters are the original's (glip-reference 2.5), the order of products is not: with visual width C equal to the
head's, the query projection folds into the text keys, the visual output projection into the text values, and the
visual value projection is applied after the text-side attention. That leaves three products over the image's A
locations instead of six dense layers. The logits [A, T] of one attention head at a time live in memory, and the
backward pass computes them again. Where there are several images and these logits are large, one image after another
is attended to: a TPU then keeps what lies between the products beside its matrix units, and its memory sees little of it.

Softmax over the text leaves padding tokens out; softmax over the image leaves out what lies beyond an image's extent.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from glip_jax.config import FusionConfig
from glip_jax.models.bert import bounded
from glip_jax.models.dropout import example_keys, hashed_bits
from glip_jax.models.initializers import xavier_uniform
from glip_jax.models.remat import images_at_once, save_activation

__all__ = ["Fusion"]

_NEVER = -1e30
_HELD = 32 * 2**20
"""Most bytes of logits at once, where several images may be told apart: the on-chip memory of a TPU (128 MB on v5e) holds a few
such arrays. One image of 800 x 1344 with 256 tokens has 23 MB."""


class _Dense(NamedTuple):
    kernel: Array
    bias: Array


class _Operands(NamedTuple):
    """The text folded for one attention head (leading axis of all: heads)."""

    keys: Float[Array, "heads B T C"]
    key_bias: Float[Array, "heads B T"]
    values: Float[Array, "heads B T C"]


def _dropped(kept: Bool[Array, "B A T"] | None, weights: Float[Array, "B A T"], rate: float) -> Float[Array, "B A T"]:
    return weights if kept is None else jnp.where(kept, weights / (1.0 - rate), 0.0)


def _kept(
    keys: jax.Array | None, shape: tuple[int, ...], rate: float
) -> tuple[Bool[Array, "B A T"] | None, Bool[Array, "B A T"] | None]:
    """Which weights of either direction dropout keeps; `keys`: one for each image.

    16 random bits are enough to decide, so one draw of 32 serves both directions.
    """
    if keys is None:
        return None, None
    bits = jax.vmap(lambda own: hashed_bits(own, shape[1:]))(keys)
    least = round(rate * 65536)
    return (bits >> 16) >= least, (bits & 0xFFFF) >= least


class Fusion(nn.Module):
    """One bidirectional attention block over all locations and tokens."""

    config: FusionConfig
    train: bool
    dtype: Any

    def _dense(self, name: str, inputs: int, outputs: int) -> _Dense:
        kernel = self.param(f"{name}_kernel", xavier_uniform, (inputs, outputs))
        return _Dense(kernel, self.param(f"{name}_bias", nn.initializers.zeros, (outputs,)))

    @nn.compact
    def __call__(
        self,
        visual: Float[Array, "B A C"],
        text: Float[Array, "B T D"],
        inside: Bool[Array, "B A"],
        mask: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B A C"], Float[Array, "B T D"]]:
        """New (visual, text). The residual starts from the normed inputs, as in the original."""
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

        # Folding sums over few text rows and many products: float32.
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
        random = None
        if rate > 0:
            of_heads = jax.random.split(self.make_rng("dropout"), heads)
            random = jax.vmap(lambda own: example_keys(own, len(visual)))(of_heads)
        for_image, for_text, share = _attend(visual, operands, inside, mask, random, rate)

        # Dropout makes the attention over the image sum to `share`, not to 1; the value's bias goes with it.
        read = jnp.einsum("hbtc,chd->bthd", for_text, value.kernel.reshape(channels, heads, depth), precision=exact)
        read += jnp.moveaxis(share, 0, 2)[..., None] * value.bias.reshape(heads, depth)
        new_text = jnp.matmul(read.reshape(*text.shape[:2], -1), text_output.kernel, precision=exact) + text_output.bias
        visual = visual + (gamma * (for_image + output.bias)).astype(self.dtype)
        return visual, text + (text_gamma * new_text).astype(self.dtype)


class _Attended(NamedTuple):
    """What both directions of the attention read (leading axis of the latter two: heads)."""

    for_image: Float[Array, "B A C"]
    """What the image reads, summed over heads, float32."""
    for_text: Float[Array, "heads B T C"]
    """What the text reads of the visual features."""
    share: Float[Array, "heads B T"]
    """Sums of each token's weights over the image."""


def _attend(
    visual: Float[Array, "B A C"],
    operands: _Operands,
    inside: Bool[Array, "B A"],
    mask: Bool[Array, "B T"],
    random: Any,
    rate: float,
) -> _Attended:
    """Both directions; `random`: keys [heads, B], or None. As many images at a time as `_HELD` allows."""
    images = len(visual)
    some = images_at_once(images, 4 * visual.shape[1] * mask.shape[1], _HELD)
    if some == images:
        return save_activation(_attend_at_once(visual, operands, inside, mask, random, rate))

    def apart(x: Array) -> Array:
        return x.reshape(-1, some, *x.shape[1:])

    def apart_behind_heads(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(len(x), -1, some, *x.shape[2:]), 1, 0)

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], images, *x.shape[3:])

    parts = (
        apart(visual), jax.tree.map(apart_behind_heads, operands), apart(inside), apart(mask),
        jax.tree.map(apart_behind_heads, random),
    )  # fmt: skip
    found = jax.lax.map(lambda part: _attend_at_once(*part, rate=rate), parts)
    whole = _Attended(found.for_image.reshape(visual.shape), joined(found.for_text), joined(found.share))
    return save_activation(whole)


def _attend_at_once(
    visual: Float[Array, "B A C"],
    operands: _Operands,
    inside: Bool[Array, "B A"],
    mask: Bool[Array, "B T"],
    random: Any,
    rate: float,
) -> _Attended:
    """Both directions over a scan of attention heads."""

    @jax.checkpoint
    def head(
        for_image: Float[Array, "B A C"], item: tuple[_Operands, Any]
    ) -> tuple[Float[Array, "B A C"], tuple[Float[Array, "B T C"], Float[Array, "B T"]]]:
        own, keys = item
        logits = jnp.einsum("bac,btc->bat", visual, own.keys, preferred_element_type=jnp.float32)
        logits = bounded(logits + own.key_bias[:, None, :])
        over_text = jax.nn.softmax(jnp.where(mask[:, None, :], logits, _NEVER), axis=2)
        kept_of_text, kept_of_image = _kept(keys, logits.shape, rate)
        over_text = _dropped(kept_of_text, over_text, rate).astype(visual.dtype)
        for_image += jnp.einsum("bat,btc->bac", over_text, own.values, preferred_element_type=jnp.float32)
        over_image = jax.nn.softmax(jnp.where(inside[:, :, None], logits, _NEVER), axis=1)
        over_image = _dropped(kept_of_image, over_image, rate)
        read = jnp.einsum("bat,bac->btc", over_image.astype(visual.dtype), visual, preferred_element_type=jnp.float32)
        return for_image, (read, over_image.sum(1))

    start = jnp.zeros(visual.shape, jnp.float32)
    for_image, (for_text, share) = jax.lax.scan(head, start, (operands, random))
    return _Attended(for_image, for_text, share)
