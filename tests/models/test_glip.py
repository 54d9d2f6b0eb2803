"""Settings that may change speed and memory, but not what the network says."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import InputConfig, ModelConfig
from glip_jax.models.extents import place_features
from glip_jax.models.glip import GLIP, normalize
from glip_jax.structures.batch import Predictions
from tests import tiny_run

pytestmark = pytest.mark.compiles

HEAD = dataclasses.replace(tiny_run.model().head, blocks=2, log_scale=-0.5, box_scale=3.0, offset_scale=0.125)
MODEL = dataclasses.replace(tiny_run.model(dropout=0.0), head=HEAD)


def _inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 64, 96, 3)).astype(np.float32)
    extent = np.array([[64, 96], [64, 64]], np.int32)
    image[1, :, 64:] = 0
    return image, extent, rng.integers(1, 500, (2, 8)).astype(np.int32), np.ones((2, 8), bool)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(GLIP(MODEL).init)(jax.random.key(1), *_inputs())["params"]


def _gradients(model: ModelConfig, params: Any) -> tuple[Predictions, Any]:
    def loss(params: Any, inputs: Any) -> Any:
        found: Any = GLIP(model, train=True).apply({"params": params}, *inputs, rngs={"dropout": jax.random.key(0)})
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(found)), found

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(params, _inputs())
    return found, gradients


@pytest.fixture(scope="module")
def plain(params: Any) -> tuple[Predictions, Any]:
    return _gradients(MODEL, params)


def test_initial_scales_are_the_settings() -> None:
    # Of the head alone, because the rest takes long to compile.
    head: Any = jax.jit(lambda *given: GLIP(MODEL).init(*given)["params"]["head"])(jax.random.key(1), *_inputs())
    np.testing.assert_array_equal(head["log_scale"], [-0.5])
    np.testing.assert_array_equal(head["scales"], np.full(len(MODEL.pyramid.strides), 3.0))
    kernel = np.abs(head["tower"]["convolution"]["offset"]["kernel"])
    bound = 0.125 * (9 * MODEL.pyramid.channels) ** -0.5
    assert 0.9 * bound < kernel.max() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["blocks", "kernels"])
def test_remat_changes_nothing(remat: Any, params: Any, plain: tuple[Predictions, Any]) -> None:
    other = dataclasses.replace(MODEL, remat=remat)
    for a, b in zip(jax.tree.leaves(_gradients(other, params)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.slow
def test_unrolling_changes_nothing(params: Any, plain: tuple[Predictions, Any]) -> None:
    # Forward alone: two blocks that are unrolled take three times as long to compile backward.
    other = dataclasses.replace(MODEL, head=dataclasses.replace(MODEL.head, unroll=2))
    found = jax.jit(GLIP(other).apply)({"params": params}, *_inputs())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.slow
def test_bfloat16_computes_coarsely_what_float32_does(params: Any, plain: tuple[Predictions, Any]) -> None:
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    found: Any = jax.jit(GLIP(model).apply)({"params": params}, *_inputs())
    pairs = [each for each in zip(Predictions._fields, found, plain[0], strict=True) if jax.tree.leaves(each[1:])]
    assert len(pairs) >= 3
    for name, a, b in pairs:
        assert a.dtype == jnp.float32, name
        # 8 bits of mantissa through two blocks; the same to a few per cent, and not exactly the same.
        difference = float(jnp.abs(a - b).max()) / float(jnp.abs(b).max())
        assert 0 < difference < 0.1, name


def test_normalize_orders_channels_and_zeroes_beyond_the_size() -> None:
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[..., 0], image[..., 2] = 200, 10
    size = np.array([[2, 3]], np.int32)
    bgr = np.asarray(normalize(jnp.asarray(image), jnp.asarray(size), InputConfig()))
    np.testing.assert_allclose(bgr[0, 0, 0], [(10 - 103.53) / 57.375, -116.28 / 57.12, (200 - 123.675) / 58.395], 1e-5)
    assert not bgr[0, 2:].any() and not bgr[0, :, 3:].any()
    rgb = normalize(jnp.asarray(image), jnp.asarray(size), InputConfig("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(np.asarray(rgb)[0, 1, 2], [200, 0, 10])


def test_without_fusion_the_blocks_of_the_head_run_once_for_all_prompts() -> None:
    model = dataclasses.replace(MODEL, fusion=dataclasses.replace(MODEL.fusion, enabled=False))
    params: Any = tiny_run.parameters(model)
    rng = np.random.default_rng(0)
    levels = tuple(rng.normal(size=(1, n, n, 16)).astype(np.float32) for n in (4, 2, 1))
    extent, mask = np.array([[64, 64]], np.int32), np.ones((1, 8), bool)
    head = jax.jit(GLIP(model).apply, static_argnames=("method", "refined"))
    refined = head({"params": {"head": params["head"]}}, levels, extent, method="refine")
    # Without the parameters of the blocks: `ground` does not run them.
    outputs = {"params": {"head": {name: leaf for name, leaf in params["head"].items() if name != "tower"}}}
    for seed in range(2):
        text = np.random.default_rng(seed).normal(size=(1, 8, 16)).astype(np.float32)
        whole = head({"params": {"head": params["head"]}}, levels, extent, text, mask, method="ground")
        once = head(outputs, refined, extent, text, mask, method="ground", refined=True)
        for a, b in zip(once, whole, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_positions_tell_cells_apart_by_their_place_in_the_image() -> None:
    """Of the image, not of the canvas: the batch-invariance test has them too."""
    small, large = (
        np.asarray(place_features(jnp.array([[2, 4]]), height, width)) for height, width in ((2, 4), (3, 7))
    )
    np.testing.assert_allclose(small, large[:, :2, :4], atol=1e-6)
    np.testing.assert_allclose(small[0, :, 0, 0], [-0.5, 0.5])
    assert len(np.unique(small.reshape(8, -1).round(4), axis=0)) == 8
    placed = dataclasses.replace(MODEL, head=dataclasses.replace(MODEL.head, positions=True))
    params: Any = jax.device_put(tiny_run.parameters(placed))
    text, rng = jnp.ones((1, 8, 16)), np.random.default_rng(0)
    levels = tuple(jnp.asarray(rng.normal(size=(1, n, n, 16)), jnp.float32) for n in (4, 2, 1))
    given: Any = (levels, jnp.array([[64, 64]]), text, jnp.ones((1, 8), bool))

    def logits(model: ModelConfig, head: Any) -> np.ndarray:
        found: Any = jax.jit(GLIP(model).apply, static_argnames="method")(
            {"params": {"head": head}}, *given, method="ground"
        )
        return np.asarray(found.logits)

    kernels = {name: params["head"].pop(name)["kernel"] for name in ("positions", "directions")}
    without = logits(MODEL, params["head"])

    def having(*names: str) -> np.ndarray:
        own = {name: {"kernel": kernel if name in names else 0 * kernel} for name, kernel in kernels.items()}
        return logits(placed, params["head"] | own)

    np.testing.assert_allclose(having(), without, atol=1e-5)
    assert np.abs(having("positions") - without).max() > 1e-3
    # The places of the cells, as far as each token points: a product with the place, whatever the cell shows.
    added = (having("directions") - without)[0]
    places = np.concatenate(
        [np.asarray(place_features(jnp.array([[n, n]]), n, n)).reshape(n * n, -1) for n in (4, 2, 1)]
    )
    assert np.abs(added).max() > 1e-3
    solved = np.linalg.lstsq(places, added, rcond=None)[0]
    np.testing.assert_allclose(places @ solved, added, atol=1e-4)
