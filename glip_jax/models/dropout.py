"""Randomness by example: what is dropped of an example depends on the key and on the example's place in the batch.

So a batch may be spread over any number of devices, and each makes the random numbers of its own examples alone.

threefry, JAX's generator, makes keys. What is drawn at each of millions of places is a hash of the place and two words of
such a key instead: some fifteen operations where threefry has a hundred, and XLA may repeat them in every operation that
reads the result. In a fusion block threefry was three fifths of the cycles that a TPU's compiler expects
(`benchmarks/fusion_cycles.py`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from glip_jax.structures.batch import BATCH_AXES

__all__ = ["Dropout", "bernoulli", "example_keys", "hashed_bits"]


def example_keys(key: jax.Array, examples: int) -> jax.Array:
    """A key for each of the `examples` on this device.

    In `jax.shard_map` (`glip_jax.distributed.mesh.per_shard`) the device's place along the axes that split the batch says which
    examples these are; elsewhere they are the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.manual_axes)
    first = jax.lax.axis_index(axes) * examples if axes else 0
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(examples))


def hashed_bits(key: jax.Array, shape: tuple[int, ...], begin: Int32[Array, ""] | int = 0) -> UInt32[Array, "..."]:
    """32 random bits for each place of `shape` (at most 2^32 places), the same on every kind of device.

    `begin`: where the first axis begins, if this is a part of a larger array, which has the same bits as a whole.

    The finalizer `triple32` (C. Wellons, "Prospecting for hash functions", 2018) of the place's number, counted from one
    word of the key, with the other word added half way: two keys do not walk through the same numbers.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.full(shape, begin).astype(jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size if axis else 1) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = place + first
    x = (x ^ (x >> 17)) * jnp.uint32(0xED5AD4BB)
    x = ((x ^ (x >> 11)) + second) * jnp.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * jnp.uint32(0x31848BAB)
    return x ^ (x >> 14)


def bernoulli(
    key: jax.Array, share: Float[Array, ""] | float, shape: tuple[int, ...], begin: Int32[Array, ""] | int = 0
) -> Bool[Array, "B ..."]:
    """True with the chance `share` (it may be traced) in each place of `shape`, whose first axis is the examples.

    `begin`: where the second axis begins, as in `hashed_bits`.
    """

    def of_example(own: jax.Array) -> Bool[Array, "..."]:
        # 24 bits are what a float32 between 0 and 1 holds.
        return (hashed_bits(own, shape[1:], begin) >> 8).astype(jnp.float32) * 2.0**-24 < share

    return jax.vmap(of_example)(example_keys(key, shape[0]))


class Dropout(nn.Module):
    """Zeroes elements with chance `rate` and divides the others by 1 - rate (rng collection "dropout")."""

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], begin: Int32[Array, ""] | int = 0) -> Float[Array, "B ..."]:
        """New x; the same x outside of training. `begin`: where the second axis begins, if x is a part of a larger array."""
        if not self.train or self.rate == 0:
            return x
        stays = bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape, begin)
        return jnp.where(stays, x / (1.0 - self.rate), 0).astype(x.dtype)
