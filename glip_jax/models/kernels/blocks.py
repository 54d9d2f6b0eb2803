"""What the Pallas kernels share: products in a kernel, sizes in a TPU's memory, and each device's own images."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from glip_jax.structures.batch import BATCH_AXES

__all__ = ["LANES", "has_small_memory", "is_possible", "on_chip_bytes", "open_batch_axes", "padded_bytes", "per_device", "product"]  # fmt: skip

LANES = 128


def product(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """Matrix product over one dimension of each factor, summed in float32; float32 factors are not rounded to bfloat16."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def on_chip_bytes() -> int:
    """The on-chip memory of the TPU that a program is traced for, that of the present mesh or of this process; 0 on other platforms."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except (ValueError, NotImplementedError):  # no TPU, or one that Pallas does not know
        return 0


def has_small_memory() -> bool:
    """Whether the on-chip memory of that TPU is less than 32 MiB: on a v4 (16 MiB), not on later ones; on other platforms False."""
    return 0 < on_chip_bytes() < 32 * 2**20


def padded_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of a block in the layout of a TPU: tiles of 8 x 128 four-byte words."""
    width = jnp.dtype(dtype).itemsize
    rows = 8 * 4 // width
    *rest, second, last = shape
    return int(np.prod(rest, dtype=np.int64)) * -(-second // rows) * rows * -(-last // LANES) * LANES * width


def open_batch_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of `mesh` that split the images of the present program.

    Within a jax.shard_map over them the images are already those of this device.
    """
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names and axis not in mesh.manual_axes)


def is_possible(mesh: Any, images: int) -> bool:
    """Whether `auto` may use a kernel on a TPU: a program for several devices must define how its images are sharded."""
    if not mesh.empty and mesh.manual_axes:
        return len(mesh.manual_axes) == len(mesh.axis_names)
    shards = int(np.prod([mesh.shape.get(axis, 1) for axis in BATCH_AXES]))
    return jax.device_count() == 1 if mesh.empty else images % shards == 0


def per_device(function: Callable[..., Any], mesh: Any, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on the images of each device.

    Args:
        inputs: for each argument (or leaf) the dimension of the images, None for what all devices have.
        outputs: the same of the results.
    """
    axes = open_batch_axes(mesh)
    if not axes:
        return function

    def spec(dimension: int | None) -> PartitionSpec:
        return PartitionSpec() if dimension is None else PartitionSpec(*(None,) * dimension, axes)

    def specs(tree: Any) -> Any:
        return jax.tree.map(spec, tree, is_leaf=lambda x: x is None)

    return jax.shard_map(function, mesh=mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)
