"""Randomness by example: what is dropped of an example depends on the key and on the example's place in the batch.

So a batch may be spread over any number of devices, and each makes the random numbers of its own examples alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Dropout", "bernoulli", "example_keys"]


def example_keys(key: jax.Array, examples: int) -> jax.Array:
    """A key for each of the `examples` on this device.

    In `jax.shard_map` the axes that it maps by hand are those that split the batch (`glip_jax.parallel.per_shard`), so
    the device's place along them says which examples these are; elsewhere they are the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.axis_names if axis in mesh.manual_axes)
    first = jax.lax.axis_index(axes) * examples if axes else 0
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(examples))


def bernoulli(key: jax.Array, share: Float[Array, ""] | float, shape: tuple[int, ...]) -> Bool[Array, "B ..."]:
    """True with the chance `share` (it may be traced) in each place of `shape`, whose first axis is the examples."""
    keys = example_keys(key, shape[0])
    return jax.vmap(lambda own: jax.random.bernoulli(own, share, shape[1:]))(keys)


class Dropout(nn.Module):
    """Zeroes elements with chance `rate` and divides the others by 1 - rate (rng collection "dropout")."""

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """New x; the same x outside of training."""
        if not self.train or self.rate == 0:
            return x
        stays = bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        return jnp.where(stays, x / (1.0 - self.rate), 0).astype(x.dtype)
