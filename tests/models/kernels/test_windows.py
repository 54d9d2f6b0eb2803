"""Swin's window kernels in the interpreter: a block equals the one by rows with all gradients, for each image alone and on each device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from glip_jax.config import MeshConfig
from glip_jax.distributed.mesh import batch_axes, make_mesh
from glip_jax.models import swin
from glip_jax.models.kernels.windows import grouping

pytestmark = pytest.mark.compiles


def _inputs(images: int, height: int, width: int, channels: int, dtype: Any = jnp.float32) -> Any:
    """Random maps, extents and gradients of the result."""
    rng = np.random.default_rng(width)
    size = np.stack([rng.integers(1, side + 1, images) for side in (height, width)], -1).astype(np.int32)
    size[0] = height, width
    maps = [jnp.asarray(rng.normal(size=(images, height, width, channels)), dtype) for _ in range(2)]
    return maps[0], jnp.asarray(size), maps[1]


def _run(
    monkeypatch: pytest.MonkeyPatch, kernel: bool, given: Any, heads: int, window: int, shifted: bool = True, mesh: Any = None
) -> dict[str, np.ndarray]:  # fmt: skip
    """Result and gradients of a block."""
    x, size, gradient = given

    def layout(images: int, *sizes: int) -> Any:
        return grouping(*sizes) if kernel else None

    monkeypatch.setattr(swin, "_layout_of_kernel", layout)
    block = swin._Block(heads, window, shifted, False, x.dtype)
    shapes: Any = jax.eval_shape(block.init, jax.random.key(0), x, size, jnp.zeros(()))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.4 * jnp.asarray(rng.normal(size=p.shape), p.dtype), shapes)

    def both(params: Any, x: Any, size: Any, gradient: Any) -> Any:
        apply: Any = partial(block.apply, size=size, rate=jnp.zeros(()))
        found, backward = jax.vjp(lambda params, x: apply({"params": params}, x), params, x)
        return found, backward(gradient)

    if mesh is not None:
        by_image, whole = PartitionSpec(batch_axes(mesh)), PartitionSpec()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), (whole, by_image, by_image, by_image))
            found = jax.jit(both, in_shardings=shardings)(params, x, size, gradient)
    else:
        found = jax.jit(both)(params, x, size, gradient)
    leaves: Any = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def _close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert np.isfinite(found[name]).all(), name
        assert np.abs(found[name] - wanted[name]).max() <= tolerance * np.abs(wanted[name]).max(), name


@pytest.mark.parametrize(
    ("shape", "heads", "window", "shifted", "dtype", "tolerance"),
    [
        # 17 windows in a row: a group of 16 and another; an odd number; two groups of three heads; borders within the images.
        pytest.param((2, 13, 115, 192), 6, 7, True, jnp.float32, 5e-6, marks=pytest.mark.slow),
        pytest.param((1, 7, 21, 24), 3, 7, False, jnp.float32, 5e-6, marks=pytest.mark.slow),
        ((3, 9, 20, 128), 4, 4, True, jnp.float32, 5e-6),
        pytest.param((2, 14, 21, 96), 3, 7, True, jnp.bfloat16, 0.02, marks=pytest.mark.slow),
    ],
)
def test_a_block_equals_the_one_by_rows(
    monkeypatch: pytest.MonkeyPatch, shape: Any, heads: int, window: int, shifted: bool, dtype: Any, tolerance: float
) -> None:
    given = _inputs(*shape, dtype=dtype)
    found, wanted = (_run(monkeypatch, kernel, given, heads, window, shifted) for kernel in (True, False))
    _close(found, wanted, tolerance)
    # The labels act: without the shift the cells attend to others.
    if shifted:
        other = _run(monkeypatch, True, given, heads, window, not shifted)
        assert np.abs(other["[0]"] - found["[0]"]).max() > 10 * tolerance * np.abs(found["[0]"]).max()


def test_an_image_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, size, gradient = _inputs(2, 14, 21, 24)
    together = _run(monkeypatch, True, (x, size, gradient), 3, 7)
    for image in range(2):
        part = slice(image, image + 1)
        alone = _run(monkeypatch, True, (x[part], size[part], gradient[part]), 3, 7)
        own = {name: alone[name] for name in ("[0]", "[1][1]")}
        _close(own, {name: together[name][part] for name in own}, 1e-6)


@pytest.mark.slow
def test_each_device_attends_in_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a program for several devices; the gradient of the biases is the sum over them."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    given = _inputs(8, 7, 14, 24)
    wanted = _run(monkeypatch, False, given, 3, 7)
    _close(_run(monkeypatch, True, given, 3, 7, mesh=mesh), wanted, 5e-6)


def test_what_has_no_layout_is_attended_by_rows() -> None:
    assert grouping(3, 32, 12) is None and grouping(2, 120, 7) is None
    found = grouping(4, 32, 7)
    assert found is not None and found.together == 2 and found.groups == 2
