from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from glip_jax.config import BackboneConfig
from glip_jax.models.efficientnet import EfficientNetLite0, depthwise

pytestmark = pytest.mark.compiles

CONFIG = BackboneConfig(kind="efficientnet_lite0")


@pytest.fixture(scope="module")
def params():
    model = EfficientNetLite0(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.array([[32, 32]]))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path.rsplit("/", 1)[-1]
        if name == "frozen_scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if name == "frozen_shift":
            # Not zero, so that a missing mask shows: padding cells become non-zero after it.
            return rng.normal(0.3, 0.3, leaf.shape).astype(np.float32)
        return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)

    flat = traverse_util.flatten_dict(shapes["params"], sep="/")
    return traverse_util.unflatten_dict({name: draw(name, leaf) for name, leaf in flat.items()}, sep="/")


@jax.jit
def forward(params, image, extent):
    return EfficientNetLite0(CONFIG).apply({"params": params}, image, extent)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_shifted_sums_equal_grouped_convolution(kernel, stride):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 8, 12, 6)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(kernel, kernel, 1, 6)), jnp.float32)
    probe = jnp.asarray(rng.normal(size=(2, 8 // stride, 12 // stride, 6)), jnp.float32)

    def run(implementation):
        outcome = depthwise(x, weights, stride, implementation)
        gradients = jax.grad(lambda x, w: (depthwise(x, w, stride, implementation) * probe).sum(), (0, 1))(x, weights)
        return outcome, *gradients

    for implementation in ("shifted", "platform"):
        for ours, expected in zip(run(implementation), run("grouped"), strict=True):
            np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_padding_is_same_of_tensorflow():
    """Even sizes at stride 2 pad (0, 1) for 3 x 3, (1, 2) for 5 x 5."""
    x = np.random.default_rng(2).normal(size=(1, 4, 4, 1)).astype(np.float32)
    for kernel, before in ((3, 0), (5, 1)):
        weights = np.random.default_rng(3).normal(size=(kernel, kernel, 1, 1)).astype(np.float32)
        padded = np.zeros((4 + kernel, 4 + kernel))
        padded[before : before + 4, before : before + 4] = x[0, :, :, 0]
        expected = [
            [(padded[r : r + kernel, c : c + kernel] * weights[:, :, 0, 0]).sum() for c in (0, 2)] for r in (0, 2)
        ]
        np.testing.assert_allclose(depthwise(jnp.asarray(x), jnp.asarray(weights), 2)[0, :, :, 0], expected, atol=1e-5)


def test_shapes_and_strides(params):
    features = forward(params, np.zeros((2, 96, 64, 3), np.float32), np.array([[96, 64], [32, 32]], np.int32))
    assert [f.shape for f in features] == [(2, 12, 8, 40), (2, 6, 4, 112), (2, 3, 2, 320)]


@pytest.mark.slow
def test_batch_invariance(params):
    rng = np.random.default_rng(4)
    extents = np.array([[32, 64], [96, 64], [64, 32]], np.int32)
    canvas = np.zeros((3, 96, 64, 3), np.float32)
    for row, (height, width) in enumerate(extents):
        canvas[row, :height, :width] = rng.normal(size=(height, width, 3))
    together = forward(params, canvas, extents)
    for row, (height, width) in enumerate(extents):
        alone = forward(params, canvas[row : row + 1, :height, :width], extents[row : row + 1])
        for stride, big, small in zip((8, 16, 32), together, alone, strict=True):
            h, w = height // stride, width // stride
            scale = float(np.abs(small).max())
            assert scale > 0
            np.testing.assert_allclose(big[row, :h, :w], small[0], atol=2e-5 * scale)
            assert not np.asarray(big[row, h:]).any()
            assert not np.asarray(big[row, :, w:]).any()


def test_canvas_of_another_multiple_is_refused(params):
    with pytest.raises(ValueError, match="canvas of 40 x 64 pixels; its padding needs multiples of 32"):
        EfficientNetLite0(CONFIG).apply({"params": params}, jnp.zeros((1, 40, 64, 3)), jnp.array([[32, 64]]))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 3])
def test_frozen_stages_and_norms_get_no_gradient(params, frozen):
    model = EfficientNetLite0(BackboneConfig(kind="efficientnet_lite0", frozen_stages=frozen))
    image = jnp.asarray(np.random.default_rng(5).normal(size=(1, 32, 32, 3)), jnp.float32)

    @jax.jit
    def gradients(params):
        def total(params):
            features: Any = model.apply({"params": params}, image, jnp.array([[32, 32]]))
            # Not the sum of squares, which the norms of the outputs keep constant.
            return sum((f * jnp.cos(jnp.arange(f.size)).reshape(f.shape)).sum() for f in features)

        return jax.grad(total)(params)

    for name, gradient in traverse_util.flatten_dict(gradients(params), sep="/").items():
        stage = 0 if name.startswith("stem") else int(name[len("stage")]) if name.startswith("stage") else 8
        still = "frozen_" in name or (frozen > 0 and stage <= frozen)
        assert bool(np.asarray(gradient).any()) != still, name
