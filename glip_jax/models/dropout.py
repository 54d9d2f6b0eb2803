"""Dropout whose random numbers depend on the key and on the position of the example in the batch.

A batch can therefore be sharded over any number of devices: each device generates the random numbers of its own examples.

Keys come from threefry, JAX's generator. The bits of single elements are a hash of the element's index and two words of a key:
some fifteen operations instead of a hundred for threefry, which matters because XLA may recompute them in every operation that
reads the result. In a fusion block threefry took three fifths of the cycles that the TPU compiler estimates (benchmarks/RESULTS.md).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from glip_jax.structures.batch import BATCH_AXES

__all__ = ["Dropout", "bernoulli", "drop_path", "example_keys", "hashed_bits", "mixed_bits", "words_of"]


def example_keys(key: jax.Array, examples: int) -> jax.Array:
    """One key for each of the `examples` on this device.

    Within `jax.shard_map` (`glip_jax.distributed.mesh.per_shard`), the index of the device along the batch axes of the mesh tells
    which examples these are; elsewhere they are the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.manual_axes)
    first = jax.lax.axis_index(axes) * examples if axes else 0
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(examples))


def words_of(key: jax.Array) -> UInt32[Array, "2"]:
    """The two words of a key that `hashed_bits` needs."""
    return jax.random.bits(key, (2,), jnp.uint32)


def mixed_bits(x: Any, middle: Any) -> Any:
    """The finalizer `triple32` (C. Wellons, "Prospecting for hash functions", 2018) of uint32 numbers.

    `middle` is added half way, so that the sequences of two keys do not overlap.
    """
    x = (x ^ (x >> 17)) * jnp.uint32(0xED5AD4BB)
    x = ((x ^ (x >> 11)) + middle) * jnp.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * jnp.uint32(0x31848BAB)
    return x ^ (x >> 14)


def hashed_bits(
    words: UInt32[Array, "2"], shape: tuple[int, ...], begin: Int32[Array, ""] | int = 0
) -> UInt32[Array, "..."]:
    """32 random bits for each element of `shape` (at most 2^32 elements), equal on all platforms: its index plus a word, mixed.

    `begin`: offset along the first axis if this is a part of a larger array; the bits are those of the larger array.
    """
    index = jnp.full(shape, begin).astype(jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size if axis else 1) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return mixed_bits(index + words[0], words[1])


def bernoulli(
    key: jax.Array, probability: Float[Array, ""] | float, shape: tuple[int, ...], begin: Int32[Array, ""] | int = 0
) -> Bool[Array, "B ..."]:
    """True with probability `probability` (it may be traced) in each element of `shape`, whose first axis is the examples.

    `begin`: offset along the second axis, as in `hashed_bits`.
    """

    def of_example(example_key: jax.Array) -> Bool[Array, "..."]:
        # A float32 in [0, 1) has 24 bits.
        return (hashed_bits(words_of(example_key), shape[1:], begin) >> 8).astype(jnp.float32) * 2.0**-24 < probability

    return jax.vmap(of_example)(example_keys(key, shape[0]))


def drop_path(
    module: nn.Module, x: Float[Array, "B ..."], rate: Float[Array, ""] | float, train: bool
) -> Float[Array, "B ..."]:
    """Stochastic depth (arXiv 1603.09382) of a residual branch: zero for an example with probability `rate`, else divided by 1 - rate.

    In training only; keys are those of the rng collection "dropout" of `module`.
    """
    if not train:
        return x
    keep = bernoulli(module.make_rng("dropout"), 1.0 - rate, (x.shape[0], *(1,) * (x.ndim - 1)))
    return (x * keep / (1.0 - rate)).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and divides the others by 1 - rate (rng collection "dropout")."""

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], begin: Int32[Array, ""] | int = 0) -> Float[Array, "B ..."]:
        """Applied in training only. `begin`: offset along the second axis if x is a part of a larger array."""
        if not self.train or self.rate == 0:
            return x
        keep = bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape, begin)
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)
