"""Both directions of the attention of deep fusion in plain JAX, for CPUs and GPUs: one head and one block of locations at a time.

What `kernels.attention` does on a TPU: a block reads all text operands, the softmax over the image has a running maximum and sum, and
the backward pass computes the logits again. Outer loop: blocks, inner loop: heads, so that what is read of a block stays in the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from glip_jax.models.bert import clamped
from glip_jax.models.dropout import hashed_bits

__all__ = ["Attended", "Operands", "blockwise_backward", "blockwise_forward"]

_MASKED = -1e30
_OUTSIDE = -2e30


class Operands(NamedTuple):
    """Text operands of the attention, the dense layers of the image folded into them (leading axis: heads)."""

    keys: Float[Array, "heads B T C"]
    key_bias: Float[Array, "heads B T"]
    values: Float[Array, "heads B T C"]


class Attended(NamedTuple):
    """Results of both directions of the attention."""

    for_image: Float[Array, "B A C"]
    """Text values read by the image, summed over heads, in the type of the image's features."""
    for_text: Float[Array, "heads B T C"]
    """Visual features read by the text, float32."""
    weight_sum: Float[Array, "heads B T"]
    """Sum of the attention weights of each token over the image."""


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


def blockwise_forward(
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


def blockwise_backward(
    visual: Float[Array, "B A C"], operands: Operands, valid: Bool[Array, "B A"], mask: Bool[Array, "B T"], words: Any,
    read: tuple[Float[Array, "heads B T C"], Float[Array, "heads B T"], Float[Array, "heads B T"]], gradients: Attended, *, rate: float,
    logits_bytes: int,
) -> tuple[Float[Array, "B A C"], Operands]:  # fmt: skip
    """Gradients of `visual` and `operands`; `read`: `for_text`, `weight_sum` and the logarithms of `blockwise_forward`.

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
