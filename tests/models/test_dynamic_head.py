"""Parts of the dynamic head that have another form than the original's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.models import dynamic_head
from glip_jax.models.extents import valid_mask

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize(("height", "width"), [(12, 21), (7, 8), (2, 3), (1, 1)])
def test_offsets_reread_by_rows_are_those_reread_by_cells(height: int, width: int) -> None:
    """Of images of any size on a canvas, exactly, with gradients; and both are the memory of the image with other strides."""
    rng, shape = np.random.default_rng(height), (-(-height // 2), -(-width // 2))
    sizes = np.array([(height, width), *rng.integers(1, (height + 1, width + 1), (3, 2))], np.int32)
    x = rng.normal(size=(4, height, width, 18)).astype(np.float32)
    coarse = -(-sizes // 2)
    valid = valid_mask(jnp.asarray(coarse), *shape)
    gradient = jnp.where(valid, rng.normal(size=(4, *shape, 18)), 0).astype(jnp.float32)

    def run(read: Any) -> tuple[np.ndarray, np.ndarray]:
        values, back = jax.vjp(lambda x: read(x, jnp.asarray(sizes), jnp.asarray(coarse), shape), jnp.asarray(x))
        return np.where(valid, values, 0), np.asarray(back(gradient)[0])

    by_rows, by_cells = run(dynamic_head._reread_rows), run(dynamic_head._reread_cells)
    np.testing.assert_array_equal(by_rows[0], by_cells[0])
    np.testing.assert_array_equal(by_rows[1], by_cells[1])
    for found, image, (h, w), (coarse_h, coarse_w) in zip(by_rows[0], x, sizes, coarse, strict=True):
        memory = image[:h, :w].transpose(2, 0, 1).ravel()[: 18 * coarse_h * coarse_w]
        np.testing.assert_array_equal(
            found[:coarse_h, :coarse_w].transpose(2, 0, 1), memory.reshape(18, coarse_h, coarse_w)
        )


def test_a_narrow_convolution_is_the_convolution() -> None:
    rng = np.random.default_rng(0)
    x, kernel, gradient = (rng.normal(size=size) for size in ((2, 5, 7, 16), (3, 3, 16, 27), (2, 5, 7, 27)))
    x, kernel, gradient = (jnp.asarray(value, jnp.float32) for value in (x, kernel, gradient))

    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)

    found, wanted = (jax.vjp(run, x, kernel) for run in (dynamic_head._narrow_convolution, whole))
    for one, other in zip((found[0], *found[1](gradient)), (wanted[0], *wanted[1](gradient)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(other).max()))
    assert dynamic_head._narrow_convolution(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16
