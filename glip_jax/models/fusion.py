"""Deep fusion (paper section 3.2, equations 4-6): image and text attend to each other with one shared map of logits.

Parameters are those of the original (glip-reference 2.5), the order of the products is not. The query projection is folded into
the text keys, the visual output projection into the text values, and the visual value projection is applied after the attention of
the text. This leaves three products over the A locations of the image instead of six dense layers. The backward pass recomputes the
logits. On a TPU they are never in memory (`kernels.attention`); elsewhere those [A, T] of one attention head at a time are, and images with
large ones are processed one after the other.

Softmax over the text excludes padding tokens; softmax over the image excludes locations beyond the extent.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from glip_jax.config import FusionConfig, LoraConfig
from glip_jax.models.bert import clamped
from glip_jax.models.dropout import example_keys, hashed_bits, words_of
from glip_jax.models.initializers import xavier_uniform
from glip_jax.models.kernels.attention import Read, attention_backward, attention_forward
from glip_jax.models.kernels.blocks import LANES, is_possible, per_device
from glip_jax.models.lora import with_low_rank_delta
from glip_jax.models.remat import images_at_once, save_activation

__all__ = ["Attended", "Fusion", "Implementation", "Operands", "attend"]

Implementation = Literal["auto", "scan", "kernel"]

_MASKED = -1e30
_OUTSIDE = -2e30
_MAX_LOGITS_BYTES = 32 * 2**20
"""Maximum bytes of logits of a head at once, of a block of an image and of several images. One image of 800 x 1344 with 256 tokens has 23 MB."""
_CACHED_LOGITS_BYTES = 1310720
"""Maximum bytes of logits of a block on a CPU: so many stay in the cache."""


class _Dense(NamedTuple):
    kernel: Array
    bias: Array


class Operands(NamedTuple):
    """Text operands of the attention, the dense layers of the image folded into them (leading axis: heads)."""

    keys: Float[Array, "heads B T C"]
    key_bias: Float[Array, "heads B T"]
    values: Float[Array, "heads B T C"]


def _dropped(kept: Bool[Array, "B a T"] | None, weights: Float[Array, "B a T"], rate: float) -> Float[Array, "B a T"]:
    return weights if kept is None else jnp.where(kept, weights / (1.0 - rate), 0.0)


def _kept(
    words: UInt32[Array, "B 2"] | None, shape: tuple[int, ...], rate: float, begin: Int[Array, ""] | int = 0
) -> tuple[Bool[Array, "B a T"] | None, Bool[Array, "B a T"] | None]:
    """Which attention weights dropout keeps, over text and over image, of the locations from `begin`; `words`: those of a key per image.

    Each direction uses 16 of 32 random bits.
    """
    if words is None:
        return None, None
    bits = jax.vmap(lambda own: hashed_bits(own, shape[1:], begin))(words)
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
        operands = Operands(
            jnp.einsum("bthd,chd->hbtc", keys, query.kernel.reshape(channels, heads, depth), precision=exact).astype(
                self.dtype
            ),
            jnp.einsum("bthd,hd->hbt", keys, query.bias.reshape(heads, depth), precision=exact),
            jnp.einsum("bthd,hdc->hbtc", values, output.kernel.reshape(heads, depth, channels), precision=exact).astype(
                self.dtype
            ),
        )
        rate = config.dropout if self.train else 0.0
        words = None
        if rate > 0:
            keys_of_heads = jax.random.split(self.make_rng("dropout"), heads)
            words = jax.vmap(lambda key: jax.vmap(words_of)(example_keys(key, len(visual))))(keys_of_heads)
        for_image, for_text, weight_sum = attend(visual, operands, valid, mask, words, rate)

        # With dropout the attention weights over the image sum to `weight_sum`, not to 1; so the bias is scaled by it.
        read = jnp.einsum("hbtc,chd->bthd", for_text, value.kernel.reshape(channels, heads, depth), precision=exact)
        read += jnp.moveaxis(weight_sum, 0, 2)[..., None] * value.bias.reshape(heads, depth)
        new_text = jnp.matmul(read.reshape(*text.shape[:2], -1), text_output.kernel, precision=exact) + text_output.bias
        visual = visual + (gamma * (for_image + output.bias)).astype(self.dtype)
        return visual, text + (text_gamma * new_text).astype(self.dtype)


class Attended(NamedTuple):
    """Results of both directions of the attention."""

    for_image: Float[Array, "B A C"]
    """Text values read by the image, summed over heads, in the type of the image's features."""
    for_text: Float[Array, "heads B T C"]
    """Visual features read by the text, float32."""
    weight_sum: Float[Array, "heads B T"]
    """Sum of the attention weights of each token over the image."""


class _Settings(NamedTuple):
    """Static settings of the attention."""

    rate: float
    implementation: Implementation
    mesh: Any
    """The mesh of the enclosing program, whose BATCH_AXES split the images; empty if none is set."""


def attend(
    visual: Float[Array, "B A C"], operands: Operands, valid: Bool[Array, "B A"], mask: Bool[Array, "B T"],
    words: UInt32[Array, "heads B 2"] | None, rate: float, implementation: Implementation = "auto",
) -> Attended:  # fmt: skip
    """Both directions of the attention.

    Args:
        words: `dropout.words_of` a key for each head and image; None with a `rate` of 0.
        implementation: `kernel` is the one for TPUs (`kernels.attention`), and runs elsewhere, but slowly; `scan` runs everywhere; `auto` selects
            by the platform. The kernel does not clamp logits.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    return _attend(visual, operands, valid, mask, words, _Settings(rate, implementation, mesh))


def _run(settings: _Settings, scan: Any, kernel: Any, arrays: tuple[Any, ...], inputs: Any, outputs: Any) -> Any:
    """The selected implementation of a pass. `inputs`, `outputs`: dimension of the images, see `kernels.per_device`."""

    def on_each(interpret: bool) -> Any:
        return per_device(partial(kernel, interpret=interpret), settings.mesh, inputs, outputs)

    def blockwise(logits_bytes: int) -> Any:
        images, locations, tokens = *arrays[0].shape[:2], arrays[3].shape[1]
        group = images_at_once(images, min(4 * locations * tokens, logits_bytes), _MAX_LOGITS_BYTES)
        return _in_groups(partial(scan, logits_bytes=logits_bytes), images // group, inputs, outputs)

    plain = {"cpu": blockwise(_CACHED_LOGITS_BYTES), "default": blockwise(_MAX_LOGITS_BYTES)}
    match settings.implementation:
        case "kernel":
            return jax.lax.platform_dependent(*arrays, tpu=on_each(False), default=on_each(True))
        case "auto" if is_possible(settings.mesh, len(arrays[0])) and arrays[0].shape[-1] % LANES == 0:
            return jax.lax.platform_dependent(*arrays, tpu=on_each(False), **plain)
        case _:
            return jax.lax.platform_dependent(*arrays, **plain)


def _in_groups(run: Any, groups: int, inputs: Any, outputs: Any) -> Any:
    """`run` for one group of images after the other. `inputs`, `outputs`: dimension of the images."""

    def split(axis: int, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]), axis, 0), tree
        )

    def join(axis: int, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.moveaxis(x, 0, axis).reshape(*x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :]), tree
        )

    def on_all(*arrays: Any) -> Any:
        results = jax.lax.map(lambda part: run(*part), jax.tree.map(split, inputs, arrays))
        return jax.tree.map(join, outputs, results)

    return run if groups == 1 else on_all


_INPUTS = (0, Operands(1, 1, 1), 0, 0, 1)  # pyright: ignore[reportArgumentType]
_OUTPUTS = (Attended(0, 1, 1), 1)  # pyright: ignore[reportArgumentType]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, settings: _Settings) -> Attended:
    return _attend_forward(visual, operands, valid, mask, words, settings)[0]


def _attend_forward(
    visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, settings: _Settings
) -> tuple[Attended, Any]:
    def kernel(visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, interpret: bool) -> Any:
        for_image, read = attention_forward(visual, *operands, valid, mask, words, settings.rate, interpret)
        return Attended(for_image, read.features, read.weight), read.log_sum

    arrays = (visual, operands, valid, mask, words)
    plain = partial(_forward, rate=settings.rate)
    found, log_sum = save_activation(_run(settings, plain, kernel, arrays, _INPUTS, _OUTPUTS))
    return found, (*arrays, (found.for_text, found.weight_sum, log_sum))


def _attend_backward(settings: _Settings, saved: Any, gradients: Attended) -> tuple[Any, ...]:
    def kernel(
        visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, read: Any, gradients: Attended, interpret: bool
    ) -> Any:  # fmt: skip
        dvisual, *rest = attention_backward(
            visual, *operands, valid, mask, words, settings.rate, Read(*read), gradients, interpret
        )
        return dvisual, Operands(*rest)

    inputs = (*_INPUTS, (1, 1, 1), _OUTPUTS[0])
    dvisual, doperands = _run(
        settings, partial(_backward, rate=settings.rate), kernel, (*saved, gradients), inputs, _INPUTS[:2]
    )
    # Integers have no gradient; JAX represents it as zeros of type float0.
    return dvisual, doperands, *(jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), x) for x in saved[2:5])


_attend.defvjp(_attend_forward, _attend_backward)


# --- the plain form --------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Locations whose logits are in memory together."""

    rows: Float[Array, "B a C"]
    penalty: Float[Array, "B a"]
    """Added to logits over the image: 0, `_MASKED`, or `_OUTSIDE` in rows that fill the last block."""
    begin: Int[Array, ""]
    """Index of the first location."""


def _in_blocks(x: Float[Array, "B A ..."], size: int, fill: float = 0.0) -> Float[Array, "blocks B a ..."]:
    spare = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _blocks(visual: Float[Array, "B A C"], valid: Bool[Array, "B A"], tokens: int, logits_bytes: int) -> _Block:
    """All locations, in blocks of equal size along a new first axis."""
    locations = visual.shape[1]
    count = -(-4 * tokens * locations // logits_bytes)
    size = -(-locations // count)
    penalty = _in_blocks(jnp.where(valid, 0.0, _MASKED), size, _OUTSIDE)
    return _Block(_in_blocks(visual, size), penalty, size * jnp.arange(len(penalty)))


def _joined(blocks: Float[Array, "blocks B a C"], shape: tuple[int, ...]) -> Float[Array, "B A C"]:
    return jnp.moveaxis(blocks, 0, 1).reshape(shape[0], -1, shape[2])[:, : shape[1]]


def _product(over: str, a: Array, b: Array) -> Array:
    return jnp.einsum(over, a, b, preferred_element_type=jnp.float32)


def _over_text(logits: Float[Array, "B a T"], mask: Bool[Array, "B T"]) -> Float[Array, "B a T"]:
    return jax.nn.softmax(jnp.where(mask[:, None], logits, _MASKED), axis=2)


def _forward(
    visual: Float[Array, "B A C"], operands: Operands, valid: Bool[Array, "B A"], mask: Bool[Array, "B T"], words: Any, *, rate: float,
    logits_bytes: int,
) -> tuple[Attended, Float[Array, "heads B T"]]:  # fmt: skip
    """Both directions, and the logarithm of each token's sum of exponentials over the image (online softmax, arXiv 1805.02867)."""
    shape = operands.keys.shape
    zeros = jnp.zeros(shape[:3], jnp.float32)
    nothing = (zeros + _OUTSIDE, zeros, zeros, jnp.zeros(shape, jnp.float32))

    def block(read: tuple[Array, ...], own: _Block) -> tuple[tuple[Array, ...], Array]:
        def head(out: Array, item: tuple[Operands, Any, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
            text, head_words, (peak, total, weight, features) = item
            logits = clamped(_product("bac,btc->bat", own.rows, text.keys) + text.key_bias[:, None])
            kept_of_text, kept_of_image = _kept(head_words, logits.shape, rate, own.begin)
            over_text = _dropped(kept_of_text, _over_text(logits, mask), rate).astype(visual.dtype)
            out += _product("bat,btc->bac", over_text, text.values)
            over_image = logits + own.penalty[..., None]
            highest = jnp.maximum(peak, over_image.max(1))
            powers, factor = jnp.exp(over_image - highest[:, None]), jnp.exp(peak - highest)
            kept = _dropped(kept_of_image, powers, rate)
            features = features * factor[..., None] + _product("bat,bac->btc", kept.astype(visual.dtype), own.rows)
            return out, (highest, total * factor + powers.sum(1), weight * factor + kept.sum(1), features)

        out, read = jax.lax.scan(head, jnp.zeros(own.rows.shape, jnp.float32), (operands, words, read))
        return read, out.astype(visual.dtype)

    read, for_image = jax.lax.scan(block, nothing, _blocks(visual, valid, mask.shape[1], logits_bytes))
    peak, total, weight, features = read
    attended = Attended(_joined(for_image, visual.shape), features / total[..., None], weight / total)
    return attended, peak + jnp.log(total)


def _backward(
    visual: Float[Array, "B A C"], operands: Operands, valid: Bool[Array, "B A"], mask: Bool[Array, "B T"], words: Any,
    read: tuple[Float[Array, "heads B T C"], Float[Array, "heads B T"], Float[Array, "heads B T"]], gradients: Attended, *, rate: float,
    logits_bytes: int,
) -> tuple[Float[Array, "B A C"], Operands]:  # fmt: skip
    """Gradients of `visual` and `operands`; `read`: `for_text`, `weight_sum` and the logarithms of `_forward`.

    Logits are computed again, block by block. The sum over the image of weight times gradient follows from what was read.
    """
    for_text, weight_sum, log_sum = read
    blocks, tokens = _blocks(visual, valid, mask.shape[1], logits_bytes), mask.shape[1]
    mean = (for_text * gradients.for_text).sum(-1) + weight_sum * gradients.weight_sum
    # Products with both are one.
    keys = jnp.concatenate([operands.keys, gradients.for_text.astype(visual.dtype)], 2)
    of_heads = (operands, keys, words, gradients.weight_sum, mean, log_sum)
    zeros = jnp.zeros(operands.keys.shape, jnp.float32)

    def block(sums: Operands, part: tuple[_Block, Array]) -> tuple[Operands, Array]:
        own, dfor_image = part

        def head(dvisual: Array, item: tuple[Any, Operands]) -> tuple[Array, Operands]:
            (text, keys, head_words, dweight, own_mean, own_log_sum), sums = item
            product = _product("bac,btc->bat", own.rows, keys)
            raw, dpowers = product[..., :tokens] + text.key_bias[:, None], product[..., tokens:] + dweight[:, None]
            logits = clamped(raw)
            over_text = _over_text(logits, mask)
            over_image = jnp.exp(logits + own.penalty[..., None] - own_log_sum[:, None])
            kept_of_text, kept_of_image = _kept(head_words, logits.shape, rate, own.begin)
            dover_text = _dropped(kept_of_text, _product("bac,btc->bat", dfor_image, text.values), rate)
            dover_text = over_text * (dover_text - (over_text * dover_text).sum(2, keepdims=True))
            dover_image = over_image * (_dropped(kept_of_image, dpowers, rate) - own_mean[:, None])
            dlogits = jnp.where(logits == raw, dover_text + dover_image, 0.0)
            over_text, over_image, narrow = (
                x.astype(visual.dtype)
                for x in (_dropped(kept_of_text, over_text, rate), _dropped(kept_of_image, over_image, rate), dlogits)
            )
            dvisual += _product("bat,btc->bac", jnp.concatenate([narrow, over_image], 2), keys)
            return dvisual, Operands(
                sums.keys + _product("bat,bac->btc", narrow, own.rows),
                sums.key_bias + dlogits.sum(1),
                sums.values + _product("bat,bac->btc", over_text, dfor_image),
            )

        dvisual, sums = jax.lax.scan(head, jnp.zeros(own.rows.shape, jnp.float32), (of_heads, sums))
        return sums, dvisual.astype(visual.dtype)

    parts = (blocks, _in_blocks(gradients.for_image, blocks.rows.shape[2]))
    doperands, dvisual = jax.lax.scan(block, Operands(zeros, zeros[..., 0], zeros), parts)
    return _joined(dvisual, visual.shape), jax.tree.map(lambda x, like: x.astype(like.dtype), doperands, operands)
