"""All implementations of deformable convolution equal its definition in plain loops, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import HeadConfig
from glip_jax.models import deformable
from glip_jax.models.deformable import Taps, deformable_convolution, rows_of
from glip_jax.models.dynamic_head import DynamicConvolution

pytestmark = pytest.mark.compiles


def _by_loops(x: np.ndarray, offsets: np.ndarray, mask: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """The definition (glip-reference 2.7) in float64."""
    batch, height, width, _ = x.shape
    _, h, w, taps, _ = offsets.shape
    out = np.zeros((batch, h, w, kernel.shape[-1]))
    for b, y, xx, k in np.ndindex(batch, h, w, taps):
        i, j = divmod(k, 3)
        py = y * stride - 1 + i + offsets[b, y, xx, k, 0]
        px = xx * stride - 1 + j + offsets[b, y, xx, k, 1]
        if py <= -1 or py >= height or px <= -1 or px >= width:
            continue
        y0, x0 = int(np.floor(py)), int(np.floor(px))
        sample = np.zeros(x.shape[-1])
        for yy, xc in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
            if 0 <= yy < height and 0 <= xc < width:
                sample += x[b, yy, xc] * (1 - abs(py - yy)) * (1 - abs(px - xc))
        out[b, y, xx] += mask[b, y, xx, k] * sample @ kernel[i, j]
    return out


def _inputs(stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(stride)
    h, w = -(-5 // stride), -(-7 // stride)
    return (
        rng.normal(size=(2, 5, 7, 3)),
        np.clip(rng.normal(size=(2, h, w, 9, 2)) * 3, -6.9, 6.9),  # many samples fall outside
        rng.uniform(size=(2, h, w, 9)),
        rng.normal(size=(3, 3, 3, 4)),
    )


def _run(
    x: jax.Array,
    offsets: jax.Array,
    mask: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    stride: int,
    implementation: Any,
) -> jax.Array:
    """Reads the second of two maps and returns the second of two outputs, so that errors of indices show."""
    rows = rows_of([x[:, :2] * 0 + 7, x])
    first = Taps(0, stride, offsets[:, :1, :1], mask[:, :1, :1])
    bound = 7 if implementation == "window" else 0
    return deformable_convolution(rows, [first, Taps(1, stride, offsets, mask)], kernel, bias, implementation, bound)[1]


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation; `parts` is `gather` in parts, of which the last is not full."""
    if request.param != "parts":
        return request.param
    monkeypatch.setattr(deformable, "_MAX_GATHERED", 17)
    return "gather"


@pytest.mark.parametrize("implementation", ["gather", "parts", "loop", "window"], indirect=True)
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_the_definition(implementation: str, stride: int) -> None:
    x, offsets, mask, kernel = _inputs(stride)
    a, b, c, d = (jnp.asarray(a, jnp.float32) for a in (x, offsets, mask, kernel))
    found = _run(a, b, c, d, jnp.ones(4), stride, implementation)
    np.testing.assert_allclose(found, _by_loops(x, offsets, mask, kernel, stride) + 1, atol=2e-5)


@pytest.mark.parametrize("implementation", ["gather", "parts", "loop", "window"], indirect=True)
@pytest.mark.parametrize("stride", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradient_equals_finite_differences_of_the_definition(implementation: str, stride: int) -> None:
    arrays = _inputs(stride)
    rng = np.random.default_rng(9)
    x, offsets, mask, kernel = arrays
    weight = rng.normal(size=_by_loops(x, offsets, mask, kernel, stride).shape)

    def loss(x: Any, offsets: Any, mask: Any, kernel: Any) -> jax.Array:
        return (_run(x, offsets, mask, kernel, jnp.zeros(4), stride, implementation) * weight).sum()

    a, b, c, d = (jnp.asarray(a, jnp.float32) for a in arrays)
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(a, b, c, d)
    for which, gradient in enumerate(gradients):
        for element in rng.integers(0, arrays[which].size, 12):
            losses = []
            for sign in (1, -1):
                changed: Any = [a.copy() for a in arrays]
                changed[which].reshape(-1)[element] += sign * 1e-6
                x, offsets, mask, kernel = changed
                losses.append((_by_loops(x, offsets, mask, kernel, stride) * weight).sum())
            np.testing.assert_allclose(
                np.asarray(gradient).reshape(-1)[element], (losses[0] - losses[1]) / 2e-6, atol=2e-3, rtol=2e-4
            )


def test_nan_positions_count_as_zero() -> None:
    x, offsets, mask, kernel = (jnp.asarray(a, jnp.float32) for a in _inputs(1))
    for implementation in ("gather", "loop", "window"):
        found = _run(x, offsets.at[0, 0, 0].set(jnp.nan), mask, kernel, jnp.zeros(4), 1, implementation)
        assert np.isfinite(found).all()
        assert not np.asarray(found[0, 0, 0]).any()


@pytest.mark.slow
def test_regular_convolutions_are_those_with_offsets_of_zero() -> None:
    """Two levels, one image smaller than the canvas; the parameters of the offsets are 0."""
    levels = [jax.random.normal(jax.random.key(i), (2, 12 // n, 8 // n, 8)) for i, n in enumerate((1, 2))]
    sizes = [jnp.array([[12, 8], [8, 6]]) // n for n in (1, 2)]
    regular, general = (
        DynamicConvolution(HeadConfig(groups=2, deformable=kind), jnp.float32) for kind in (False, True)
    )
    params = regular.init(jax.random.key(9), levels, sizes)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(params["params"]["offset"]))

    def loss(module: DynamicConvolution) -> Any:
        def total(params: Any) -> Any:
            outputs: Any = module.apply(params, levels, sizes)
            return sum(jnp.sum(jnp.sin(x)) for x in outputs)

        return jax.jit(jax.grad(total))

    expected, found = (loss(module)(params)["params"] for module in (general, regular))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(found.pop("offset")))
    expected.pop("offset")
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), expected, found)
