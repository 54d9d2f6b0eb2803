"""Layers whose widths are split over the mesh's axis `tensor` (Megatron-LM, arXiv 1909.08053, section 3).

A pair of products shares the work: of the first kernel each device has some columns, of the second the rows that belong to
them. Between the two lies the wide part, of which a device knows its own alone; before and after, every device has the
whole. What is sent is one sum forward (of the second's outputs; once more where a block is computed again, `remat="blocks"`)
and one backward (of what the first's input gets).

That is so within `glip_jax.distributed.mesh.per_shard`, where the axis is mapped by hand. Elsewhere there is one part.
"""

from typing import Any

import jax

from glip_jax.models.remat import save_activation

__all__ = ["entering", "parts", "axis_index", "summed_dot_general"]

_AXIS = "tensor"


def parts() -> int:
    """Into how many parts widths are split here."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[_AXIS] if _AXIS in mesh.manual_axes else 1


def axis_index() -> jax.Array | int:
    """Which of the parts is this device's: Int32[]."""
    return jax.lax.axis_index(_AXIS) if parts() > 1 else 0


def entering(x: jax.Array) -> jax.Array:
    """`x` at the entrance of such layers: its gradient is the sum of what the parts give it."""
    return _entering(x) if parts() > 1 else x


def summed_dot_general(left: jax.Array, right: jax.Array, *how: Any, **more: Any) -> jax.Array:
    """`jax.lax.dot_general` at their end: the sum of the parts' products, before a bias (which every device has) is added."""
    product = jax.lax.dot_general(left, right, *how, **more)
    return save_activation(_summed(product)) if parts() > 1 else product


# The transpose of a sum over devices that all go on with the same is no second sum; JAX's own would be, as it cannot know.
@jax.custom_vjp
def _entering(x: jax.Array) -> jax.Array:
    return x


@jax.custom_vjp
def _summed(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, _AXIS)


_entering.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.psum(gradient, _AXIS),))
_summed.defvjp(lambda x: (jax.lax.psum(x, _AXIS), None), lambda _, gradient: (gradient,))
