"""Both directions of the attention of deep fusion as Pallas kernels for TPUs: logits exist in on-chip memory only.

The grid is images x blocks of locations; a block loops over the attention heads. All text operands of an image and what it has read
so far stay in VMEM, so the image is read once forward and once backward.

* The image reads the text: a softmax over the tokens of a row, whole in a block.
* The text reads the image: a softmax over all blocks, with a running maximum and sum (online softmax, arXiv 1805.02867). Sums are
  transposed, [C, T]: rescaling them multiplies by a row, and the transposed block is made once for all heads.

Exponentials are powers of two; the factor log2(e) is in the keys. The backward pass recomputes both softmaxes from the logits, the
second one from the logarithm of its sum, which the forward pass keeps; the sum over all locations of weight times gradient follows
from the forward results, so one pass is enough. Dropout compares the bits of `hashed_bits`, so it drops what the plain implementation drops.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, UInt32

from glip_jax.models.dropout import mixed_bits
from glip_jax.models.kernels.blocks import LANES, has_small_memory, padded_bytes, product

__all__ = ["Read", "attention_backward", "attention_forward"]

_MASKED = -1e30
_OUTSIDE = -2e30
"""Rows of the last block beyond the array. They are below the masked locations, so they have no weight even if all are masked."""
_LOG2E = math.log2(math.e)
_ROWS = 1024
"""Locations of a block at most: with fewer, what a block costs before its heads weighs more."""
_STEP = 256
"""Locations of a block are a multiple of this if there are several blocks."""
_VALID = 3
"""Index of the logits to be added among the operands of a kernel."""


class Read(NamedTuple):
    """What the text reads from the image."""

    features: Float[Array, "heads B T C"]
    weight: Float[Array, "heads B T"]
    """Sum of the attention weights; 1 without dropout."""
    log_sum: Float[Array, "heads B T"]
    """Logarithm to base 2 of the sum of the powers of the logits, without the bias of the keys, which cancels."""


# --- the kernels -----------------------------------------------------------------------------------------------------


def _fill_places(places: Any, tokens: int) -> None:
    """Index of each place of a block in [locations, tokens]."""
    row = lax.broadcasted_iota(jnp.uint32, places.shape, 0)
    places[...] = row * jnp.uint32(tokens) + lax.broadcasted_iota(jnp.uint32, places.shape, 1)


def _kept(words: Any, places: Any, head: Any, first: Any, rate: float) -> tuple[Any, Any]:
    """Which weights dropout keeps, over text and over image: `fusion`'s comparison of 16 bits each.

    A TPU compares signed numbers, so the highest bit of both halves is flipped.
    """
    start, middle = words[0, 2 * head], words[0, 2 * head + 1]
    bits = mixed_bits(places[...] + (first + start), middle) ^ jnp.uint32(0x80008000)
    threshold = jnp.int32((round(rate * 65536) << 16) - 2**31)
    over_text, over_image = (lax.bitcast_convert_type(x, jnp.int32) for x in (bits, bits << 16))
    return over_text >= threshold, over_image >= threshold


class _Block(NamedTuple):
    """A block of locations, in scratch memory: rows beyond the array are zero."""

    rows: Any
    columns: Any
    """The transposed rows."""

    def fill(self, source: Any, beyond: int) -> None:
        """Copies `source`; in the last block, `beyond` rows are not of the array and may hold anything."""
        self.rows[...] = source[0]
        if beyond:

            @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
            def _() -> None:
                self.rows[self.rows.shape[0] - beyond :] = jnp.zeros((beyond, self.rows.shape[1]), self.rows.dtype)

        self.columns[...] = self.rows[...].T


def _penalties(penalty: Any, rows: Any) -> None:
    """Logits added to a row of locations: 0, `_MASKED` or `_OUTSIDE`, in all lanes."""
    penalty[...] = jnp.broadcast_to(jnp.broadcast_to(rows[0, 0], (8, rows.shape[-1])).T[:, :1], penalty.shape)


def _across(penalty: Any, tokens: int) -> Any:
    return jnp.concatenate([penalty[...]] * (tokens // LANES), 1)


def _over_text(logits: Any, bias: Any) -> tuple[Any, Any]:
    """(numerators, sums) of the softmax over the tokens of each row."""
    shifted = logits + bias
    powers = jnp.exp2(shifted - jnp.max(shifted, 1, keepdims=True))
    return powers, jnp.sum(powers, 1, keepdims=True)


def _forward_kernel(rate: float, tokens: int, beyond: int, *refs: Any) -> None:
    words, visual, keys, valid, bias, values = refs[:6]
    for_image, features, weight, log_sum = refs[6:10]
    rows, columns, penalty, total, read, peak, powers, kept, places = refs[10:]
    step, block, (heads, _, width) = pl.program_id(1), _Block(rows, columns), keys.shape[1:]

    @pl.when(step == 0)
    def _() -> None:
        if rate:
            _fill_places(places, tokens)
        peak[...] = jnp.full(peak.shape, _OUTSIDE, peak.dtype)
        for sums in (read, powers, kept):
            sums[...] = jnp.zeros(sums.shape, sums.dtype)

    block.fill(visual, beyond)
    _penalties(penalty, valid)
    total[...] = jnp.zeros(total.shape, total.dtype)

    def head(h: Any, carry: Any) -> Any:
        logits = product(rows[...], keys[0, h], (1, 0))
        numerators, sums = _over_text(logits, bias[0, h])
        factor = pl.reciprocal((1.0 - rate) * sums, approx=rows.dtype == jnp.bfloat16)
        located = logits + _across(penalty, width)
        new = jnp.maximum(peak[h], jnp.max(located, 0, keepdims=True))
        weights, shrunk = jnp.exp2(located - new), jnp.exp2(peak[h] - new)
        peak[h], powers[h] = new, powers[h] * shrunk + jnp.sum(weights, 0, keepdims=True)
        if rate:
            first = (step * rows.shape[0] * tokens).astype(jnp.uint32)
            of_text, of_image = _kept(words, places, h, first, rate)
            numerators, weights = jnp.where(of_text, numerators, 0.0), jnp.where(of_image, weights, 0.0)
            kept[h] = kept[h] * shrunk + jnp.sum(weights, 0, keepdims=True)
        total[...] += product((numerators * factor).astype(rows.dtype), values[0, h], (1, 0))
        read[h] = read[h] * shrunk + product(columns[...], weights.astype(rows.dtype), (1, 0))
        return carry

    lax.fori_loop(0, heads, head, 0)
    for_image[0] = total[...].astype(for_image.dtype)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        factor = 1.0 / ((1.0 - rate) * powers[...])
        features[0] = read[...] * factor
        weight[0] = (kept if rate else powers)[...] * factor
        log_sum[0] = peak[...] + jnp.log2(powers[...])


def _backward_kernel(rate: float, tokens: int, beyond: int, *refs: Any) -> None:
    words, visual, keys, valid, bias, values, keys_back, log_sum, gradient, read, weight, mean = refs[:12]
    dvisual, dkeys, dbias, dvalues = refs[12:16]
    rows, columns, drows, dcolumns, penalty, total, places = refs[16:]
    step, block, (heads, _, width) = pl.program_id(1), _Block(rows, columns), keys.shape[1:]

    @pl.when(step == 0)
    def _() -> None:
        if rate:
            _fill_places(places, tokens)
        for sums in (dkeys, dbias, dvalues):
            sums[...] = jnp.zeros(sums.shape, sums.dtype)

    block.fill(visual, beyond)
    _Block(drows, dcolumns).fill(gradient, beyond)
    _penalties(penalty, valid)
    total[...] = jnp.zeros(total.shape, total.dtype)

    def head(h: Any, carry: Any) -> Any:
        logits = product(rows[...], keys[0, h], (1, 0))
        over_image = jnp.exp2(logits + _across(penalty, width) - log_sum[0, h])
        dover_image = product(rows[...], read[0, h], (1, 1)) + weight[0, h]
        numerators, sums = _over_text(logits, bias[0, h])
        over_text = numerators * pl.reciprocal(sums, approx=rows.dtype == jnp.bfloat16)
        dover_text = product(drows[...], values[0, h], (1, 0))
        dropped_text, dropped_image = over_text, over_image
        if rate:
            # Factors, not selections: a masked product is one that libtpu's static profile does not know.
            first = (step * rows.shape[0] * tokens).astype(jnp.uint32)
            of_text, of_image = (jnp.where(x, 1.0 / (1.0 - rate), 0.0) for x in _kept(words, places, h, first, rate))
            dropped_text, dropped_image = over_text * of_text, over_image * of_image
            dover_text, dover_image = dover_text * of_text, dover_image * of_image
        dlogits_text = over_text * (dover_text - jnp.sum(over_text * dover_text, 1, keepdims=True))
        dlogits = (dlogits_text + over_image * (dover_image - mean[0, h])).astype(rows.dtype)
        dbias[0, h] += jnp.sum(dlogits_text, 0, keepdims=True)
        total[...] += product(dropped_image.astype(rows.dtype), read[0, h], (1, 0)) + product(
            dlogits, keys_back[0, h], (1, 0)
        )
        dkeys[0, h] += product(columns[...], dlogits, (1, 0))
        dvalues[0, h] += product(dcolumns[...], dropped_text.astype(rows.dtype), (1, 0))
        return carry

    lax.fori_loop(0, heads, head, 0)
    dvisual[0] = total[...].astype(dvisual.dtype)


# --- calls -----------------------------------------------------------------------------------------------------------


def _rows_of_block(locations: int) -> int:
    """Locations of a block: multiples of 128, equal blocks of at most `_ROWS`."""
    blocks = -(-locations // (_ROWS // 4 if has_small_memory() else _ROWS))
    unit = LANES if blocks == 1 else _STEP
    return -(-locations // (blocks * unit)) * unit


class _Operands(NamedTuple):
    """What both kernels read, images first; tokens are padded to a multiple of 128 and masked."""

    words: UInt32[Array, "B 2*heads 1 T"]
    visual: Float[Array, "B A C"]
    keys: Float[Array, "B heads T C"]
    """Times log2(e)."""
    bias: Float[Array, "B heads 1 T"]
    """Times log2(e); `_MASKED` for padding."""
    values: Float[Array, "B heads T C"]
    valid: Float[Array, "B blocks 1 rows"]
    """Logits to be added, see `_penalties`."""


def _padded(x: Array, axis: int) -> Array:
    """Tokens padded to a multiple of 128."""
    spare = -x.shape[axis] % LANES
    return jnp.pad(x, [(0, spare if i == axis % x.ndim else 0) for i in range(x.ndim)])


def _operands(
    visual: Array, keys: Array, key_bias: Array, values: Array, valid: Array, mask: Array, words: Array | None, rows: int
) -> _Operands:  # fmt: skip
    heads, images, locations = len(keys), *visual.shape[:2]
    bias = jnp.where(mask[:, None], jnp.moveaxis(key_bias, 0, 1) * _LOG2E, _MASKED)
    spare = -bias.shape[-1] % LANES
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, spare)), constant_values=_OUTSIDE)[:, :, None]
    # An image without any location reads them all alike, as in the plain softmax.
    valid = valid | ~valid.any(1, keepdims=True)
    blocks = -(-locations // rows)
    penalty = jnp.pad(
        jnp.where(valid, 0.0, _MASKED), ((0, 0), (0, blocks * rows - locations)), constant_values=_OUTSIDE
    )
    if words is None:
        words = jnp.zeros((heads, images, 2), jnp.uint32)
    # The same number in all lanes: libtpu's static profile does not know operands in scalar memory.
    spread = jnp.moveaxis(words, 0, 1).reshape(images, 2 * heads, 1, 1)
    scaled = (keys.astype(jnp.float32) * _LOG2E).astype(keys.dtype)
    return _Operands(
        jnp.broadcast_to(spread, (images, 2 * heads, 1, bias.shape[-1])), visual, jnp.moveaxis(_padded(scaled, 2), 0, 1), bias,
        jnp.moveaxis(_padded(values, 2), 0, 1), penalty.reshape(images, blocks, 1, rows),
    )  # fmt: skip


def _of_text(x: Float[Array, "B heads C padded"], tokens: int) -> Float[Array, "heads B T C"]:
    """Results of a kernel without the padding of the tokens."""
    return jnp.moveaxis(x[..., :tokens].swapaxes(2, 3), 1, 0)


def _results(visual: Array, *text: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """An array as `visual`, and float32 ones of the shapes `text`."""
    return [jax.ShapeDtypeStruct(visual.shape, visual.dtype), *(jax.ShapeDtypeStruct(x, jnp.float32) for x in text)]


def _call(
    body: Callable[..., None], rate: float, tokens: int, rows: int, operands: Sequence[Array], results: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[tuple[int, ...], Any]], products: int, interpret: bool,
) -> Sequence[Array]:  # fmt: skip
    """Runs `body` over the blocks of each image. Arrays of three dimensions, and the logits to be added, are read by blocks."""
    images, locations, channels = operands[1].shape
    heads, width = operands[2].shape[1], operands[2].shape[3]
    blocks = -(-locations // rows)

    def block(x: Any, valid: bool) -> pl.BlockSpec:
        if x.ndim == 3:
            return pl.BlockSpec((1, rows, x.shape[2]), lambda image, i: (image, i, 0))
        if valid:
            return pl.BlockSpec((1, 1, *x.shape[2:]), lambda image, i: (image, i, 0, 0))
        # One buffer: it changes with the image only.
        return pl.BlockSpec((1, *x.shape[1:]), lambda image, _: (image, 0, 0, 0), pipeline_mode=pl.Buffered(1))

    arrays = [*operands, *results]
    specs = [block(x, k == _VALID) for k, x in enumerate(arrays)]
    held = sum(padded_bytes(spec.block_shape, x.dtype) for spec, x in zip(specs, arrays))  # pyright: ignore[reportArgumentType]
    held = 2 * held + sum(padded_bytes(shape, dtype) for shape, dtype in scratch)
    pairs = images * blocks * rows * width * heads
    return pl.pallas_call(
        partial(body, rate, tokens, blocks * rows - locations),
        grid=(images, blocks),
        in_specs=specs[: len(operands)],
        out_specs=specs[len(operands) :],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # Logits, weights and their gradients beside the blocks.
            vmem_limit_bytes=held + 12 * rows * width * 4 + 4 * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * channels,
            bytes_accessed=sum(padded_bytes(x.shape, x.dtype) for x in arrays),
            transcendentals=2 * pairs,
        ),
        interpret=interpret,
        name=body.__name__.strip("_").replace("_kernel", "_fusion"),
    )(*operands)


def attention_forward(
    visual: Float[Array, "B A C"],
    keys: Float[Array, "heads B T C"],
    key_bias: Float[Array, "heads B T"],
    values: Float[Array, "heads B T C"],
    valid: Bool[Array, "B A"],
    mask: Bool[Array, "B T"],
    words: UInt32[Array, "heads B 2"] | None,
    rate: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B A C"], Read]:
    """What the image reads, summed over heads, in the type of `visual`, and what the text reads, float32.

    `words`: those of `dropout.words_of` for each head and image; None without dropout (rate 0). `interpret` runs on any platform, slowly.
    """
    rows, tokens = _rows_of_block(visual.shape[1]), keys.shape[2]
    given = _operands(visual, keys, key_bias, values, valid, mask, words, rows)
    images, heads, width, channels = given.keys.shape
    wide, row = (images, heads, channels, width), (images, heads, 1, width)
    results = _results(visual, wide, row, row)
    scratch = [
        ((rows, channels), visual.dtype), ((channels, rows), visual.dtype), ((rows, LANES), jnp.float32), ((rows, channels), jnp.float32),
        (wide[1:], jnp.float32), *[(row[1:], jnp.float32)] * 3, ((rows, width), jnp.uint32),
    ]  # fmt: skip
    operands = [given.words, given.visual, given.keys.swapaxes(2, 3), given.valid, given.bias, given.values]
    for_image, features, *sums = _call(_forward_kernel, rate, tokens, rows, operands, results, scratch, 3, interpret)
    return for_image, Read(_of_text(features, tokens), *(jnp.moveaxis(x[:, :, 0, :tokens], 1, 0) for x in sums))


def attention_backward(
    visual: Float[Array, "B A C"],
    keys: Float[Array, "heads B T C"],
    key_bias: Float[Array, "heads B T"],
    values: Float[Array, "heads B T C"],
    valid: Bool[Array, "B A"],
    mask: Bool[Array, "B T"],
    words: UInt32[Array, "heads B 2"] | None,
    rate: float,
    read: Read,
    gradients: tuple[Float[Array, "B A C"], Float[Array, "heads B T C"], Float[Array, "heads B T"]],
    interpret: bool = False,
) -> tuple[Float[Array, "B A C"], Float[Array, "heads B T C"], Float[Array, "heads B T"], Float[Array, "heads B T C"]]:
    """Gradients of visual, keys, key_bias and values, in their types.

    `gradients`: those of the image's result, and of `Read.features` and `Read.weight`.
    """
    rows, tokens, dtype = _rows_of_block(visual.shape[1]), keys.shape[2], visual.dtype
    given = _operands(visual, keys, key_bias, values, valid, mask, words, rows)
    dvisual, dfeatures, dweight = gradients

    def row_of(x: Array) -> Array:
        return jnp.moveaxis(_padded(x, 2), 0, 1)[:, :, None]

    # Sum over locations of weight x gradient, for each token.
    mean = jnp.sum(read.features * dfeatures, -1) + read.weight * dweight
    images, heads, width, channels = given.keys.shape
    wide, row = (images, heads, channels, width), (images, heads, 1, width)
    operands = [
        given.words, given.visual, given.keys.swapaxes(2, 3), given.valid, given.bias, given.values.swapaxes(2, 3),
        jnp.moveaxis(_padded(keys, 2), 0, 1), row_of(read.log_sum), dvisual.astype(dtype),
        jnp.moveaxis(_padded(dfeatures.astype(dtype), 2), 0, 1), row_of(dweight), row_of(mean),
    ]  # fmt: skip
    results = _results(visual, wide, row, wide)
    scratch = [
        *[((rows, channels), dtype), ((channels, rows), dtype)] * 2, ((rows, LANES), jnp.float32), ((rows, channels), jnp.float32),
        ((rows, width), jnp.uint32),
    ]  # fmt: skip
    dx, dkeys, dbias, dvalues = _call(_backward_kernel, rate, tokens, rows, operands, results, scratch, 7, interpret)

    dbias = jnp.where(mask, jnp.moveaxis(dbias[:, :, 0, :tokens], 1, 0), 0.0)
    return dx, _of_text(dkeys, tokens).astype(keys.dtype), dbias, _of_text(dvalues, tokens).astype(values.dtype)
