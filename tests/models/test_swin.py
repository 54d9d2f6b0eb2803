"""Attention by rows of windows, for large maps, equals attention over all windows at once."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import BackboneConfig, InputConfig
from glip_jax.models import swin
from glip_jax.models.glip import normalize
from glip_jax.models.remat import images_at_once
from glip_jax.structures.canvas import patches_of, pixels_of

CONFIG = BackboneConfig(width=8, depths=(2, 1, 1, 1), heads=(1, 2, 2, 4), window=3, drop_path=0.0)


pytestmark = pytest.mark.compiles


def _found(module: swin.Swin) -> tuple[Any, int]:
    """Maps and gradients of images of different extents, and how many loops the program has."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(2, 64, 96, 3)), jnp.float32)
    extent = jnp.asarray([[64, 64], [32, 96]])
    shapes: Any = jax.eval_shape(module.init, jax.random.key(0), image, extent)["params"]
    params = jax.tree.map(lambda x: (x.ndim == 1) + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    weights = [
        rng.normal(size=x.shape)
        for x in jax.tree.leaves(jax.eval_shape(module.apply, {"params": params}, image, extent))
    ]

    def loss(params: Any, image: Any) -> Any:
        maps: Any = module.apply({"params": params}, image, extent)
        return sum((x * weight).sum() for x, weight in zip(maps, weights, strict=True)), maps

    loops = str(jax.make_jaxpr(lambda *own: loss(*own))(params, image)).count("scan[")
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, image), loops


@pytest.fixture(scope="module")
def at_once() -> tuple[Any, int]:
    return _found(swin.Swin(CONFIG))


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, pytest.param(1 << 30, marks=pytest.mark.slow)], ids=["one image", "all images"])
def test_rows_of_windows_equal_all_windows(monkeypatch: pytest.MonkeyPatch, row: int, at_once: tuple[Any, int]) -> None:
    """Different extents, maps that are no multiple of the window, shifted and regular windows, forward and backward."""
    monkeypatch.setattr(swin, "_MAX_LOGITS_BYTES", 0)
    monkeypatch.setattr(swin, "_MAX_ROW_BYTES", row)
    by_rows, loops = _found(swin.Swin(CONFIG))
    assert loops == at_once[1] + sum(CONFIG.depths), "one loop per block"
    for one, other in zip(jax.tree.leaves(by_rows), jax.tree.leaves(at_once[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, float(jnp.abs(other).max())))


@pytest.mark.slow
def test_patches_equal_pixels() -> None:
    """The input exactly, with pixels beyond the image at any place of a patch; the maps but for rounding."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(2, 64, 96, 3), dtype=np.uint8)
    size, extent = jnp.asarray([[61, 90], [30, 95]]), jnp.asarray([[64, 96], [32, 96]])
    pixels = normalize(jnp.asarray(image), size, InputConfig())
    patches = normalize(jnp.asarray(patches_of(image[..., ::-1])), size, InputConfig())
    np.testing.assert_array_equal(pixels_of(patches), pixels)
    module = swin.Swin(CONFIG)
    params = jax.jit(module.init)(jax.random.key(0), pixels, extent)
    run = jax.jit(module.apply)
    for one, other in zip(run(params, patches, extent), run(params, pixels, extent), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


def test_images_at_once() -> None:
    """The largest divisor that fits, at least one."""
    assert [images_at_once(12, 10, limit) for limit in (200, 119, 60, 59, 10, 9, 0)] == [12, 6, 6, 4, 1, 1, 1]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from _equations(getattr(inner, "jaxpr", inner))


def test_no_gradient_pads_between_cells() -> None:
    """As that of a strided slice does: a pad of [4, 200, 336, 96] takes a v6e 30 million cycles."""
    module, image, extent = swin.Swin(CONFIG), jnp.zeros((1, 64, 64, 3)), jnp.array([[64, 64]])
    params = jax.eval_shape(module.init, jax.random.key(0), image, extent)

    def total(params: Any) -> Any:
        maps: Any = module.apply(params, image, extent)
        return sum(x.sum() for x in maps)

    equations = [*_equations(jax.make_jaxpr(jax.grad(total))(params).jaxpr)]
    pads = [each.params["padding_config"] for each in equations if each.primitive.name == "pad"]
    assert any(each.primitive.name == "dot_general" for each in equations) and pads
    assert not [config for config in pads if any(interior for _, _, interior in config)]
