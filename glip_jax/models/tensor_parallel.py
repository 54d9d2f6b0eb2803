"""Tensor parallelism: layers whose widths are sharded over the mesh axis `tensor` (Megatron-LM, arXiv 1909.08053, section 3).

Two matrix products form a pair. The first kernel is sharded by columns, the second by the matching rows. Activations between the
two are sharded; before and after the pair they are replicated. The pair communicates one all-reduce in the forward pass, of the
outputs of the second product (again where a block is recomputed, `remat="blocks"`), and one in the backward pass, of the gradient
of the input of the first.

This holds within `glip_jax.distributed.mesh.per_shard`, where the axis is mapped manually. Elsewhere there is one shard.
"""

from typing import Any

import jax

from glip_jax.models.remat import save_activation

__all__ = ["axis_index", "column_parallel_input", "row_parallel_dot_general", "tensor_shards"]

_AXIS = "tensor"


def tensor_shards() -> int:
    """Number of shards of the widths in the current program."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[_AXIS] if _AXIS in mesh.manual_axes else 1


def axis_index() -> jax.Array | int:
    """Index of the shard of this device: Int32[]."""
    return jax.lax.axis_index(_AXIS) if tensor_shards() > 1 else 0


def column_parallel_input(x: jax.Array) -> jax.Array:
    """`x` as input of the first product: the identity, whose gradient is summed over the shards."""
    return _sum_gradient(x) if tensor_shards() > 1 else x


def row_parallel_dot_general(left: jax.Array, right: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.dot_general` of the second product, summed over the shards; a bias, which is replicated, is added after it."""
    product = jax.lax.dot_general(left, right, *args, **kwargs)
    return save_activation(_summed(product)) if tensor_shards() > 1 else product


# The gradient of the sum is the identity, because all shards compute the same from its result. JAX cannot know that: its own
# transpose of psum would sum again.
@jax.custom_vjp
def _sum_gradient(x: jax.Array) -> jax.Array:
    return x


@jax.custom_vjp
def _summed(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, _AXIS)


_sum_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.psum(gradient, _AXIS),))
_summed.defvjp(lambda x: (jax.lax.psum(x, _AXIS), None), lambda _, gradient: (gradient,))
