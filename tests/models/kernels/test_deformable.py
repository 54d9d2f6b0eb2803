"""Windowed deformable convolution: equal to `gather`, forward and backward; bounds; declared cost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glip_jax.config import Config, ConfigError, HeadConfig, MeshConfig, ModelConfig, validate
from glip_jax.distributed.mesh import batch_sharding, make_mesh
from glip_jax.models.deformable import Taps, clamp_offsets, deformable_convolution, exceeds_bound, rows_of
from glip_jax.models.dynamic_head import DynamicConvolution
from glip_jax.models.kernels.deformable import window_forward


def _inputs(images: int, stride: int, bound: int, dtype: Any, shapes: Any = ((9, 18), (3, 5))) -> Any:
    """Maps of images with different extents, offsets within and beyond the bound, and gradients of the results."""
    rng = np.random.default_rng(bound)
    maps = [rng.normal(size=(images, *shape, 4)) for shape in shapes]
    for image in range(1, images):
        maps[0][image, 7:], maps[0][image, :, 11:] = 0, 0
    outputs = [(images, -(-h // stride), -(-w // stride)) for h, w in shapes]
    offsets = [rng.normal(size=(*shape, 9, 2)) * bound for shape in outputs]
    offsets[0][0, 0, 0], offsets[0][0, 0, 1], offsets[0][0, 1, :2] = bound, -bound, 0
    given = (
        [jnp.asarray(x, dtype) for x in maps],
        [clamp_offsets(jnp.asarray(x, jnp.float32), bound) for x in offsets],
        [jnp.asarray(rng.uniform(size=(*shape, 9)), jnp.float32) for shape in outputs],
        jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32),
        jnp.asarray(rng.normal(size=5), jnp.float32),
    )
    return given, [jnp.asarray(rng.normal(size=(*shape, 5)), dtype) for shape in outputs]


def _convolve(implementation: Any, stride: int, bound: int) -> Any:
    def run(maps: Any, offsets: Any, masks: Any, kernel: Any, bias: Any) -> Any:
        taps = [Taps(i, stride, o, m) for i, (o, m) in enumerate(zip(offsets, masks))]
        return deformable_convolution(rows_of(maps), taps, kernel, bias, implementation, bound)

    return run


def _with_gradients(run: Any, given: Any, gradients: Any) -> Any:
    def both(given: Any, gradients: Any) -> Any:
        out, backward = jax.vjp(run, *given)
        return out, backward(gradients)

    return jax.jit(both)(given, gradients)


def _close(found: Any, wanted: Any, tolerance: float) -> None:
    """Compares the maximum difference of each array with its maximum value."""
    for path, want in jax.tree_util.tree_leaves_with_path(wanted):
        have = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        assert have.dtype == want.dtype, path
        have, want = np.asarray(have, np.float32), np.asarray(want, np.float32)
        assert np.abs(have - want).max() <= tolerance * np.abs(want).max(), path


@pytest.mark.compiles
@pytest.mark.parametrize(
    "stride, bound, dtype, tolerance",
    # Bounds with two and with three rows of blocks, of 8 columns and of 16; rows of taps that share window rows, and that do not.
    [
        (1, 4, jnp.float32, 3e-6),
        (1, 3, jnp.float32, 3e-6),
        pytest.param(2, 3, jnp.float32, 3e-6, marks=pytest.mark.slow),
        pytest.param(1, 1, jnp.bfloat16, 0.02, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_equal_gather(stride: int, bound: int, dtype: Any, tolerance: float) -> None:
    given, gradients = _inputs(2, stride, bound, dtype)
    found = _with_gradients(_convolve("window", stride, bound), given, gradients)
    _close(found, _with_gradients(_convolve("gather", stride, bound), given, gradients), tolerance)


@pytest.mark.compiles
def test_each_device_convolves_its_own_images() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    given, gradients = _inputs(4, 2, 1, jnp.float32, shapes=((5, 6),))
    wanted = _with_gradients(_convolve("gather", 2, 1), given, gradients)
    split, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    given = jax.device_put(given, (split, split, split, whole, whole))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run: Any = jax.jit(lambda given, g: _with_gradients(_convolve("window", 2, 1), given, g))
        lowered = run.lower(given, jax.device_put(gradients, split)).compile()
    _close(lowered(given, jax.device_put(gradients, split)), wanted, 3e-6)
    # Devices exchange gradients of kernel and bias, but no maps.
    exchanged = [line for line in str(lowered.as_text()).splitlines() if "all-gather(" in line or "all-to-all(" in line]
    assert not exchanged


def test_gradients_pass_the_bound_only_inward() -> None:
    offsets = jnp.asarray([-3.0, -3.0, -2.0, 0.5, 1.75, 2.0, 2.0, 7.0, 7.0, jnp.nan])
    gradient = jnp.asarray([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    found: Any = jax.vjp(lambda x: clamp_offsets(x, 2), offsets)
    values, (passed,) = found[0], found[1](gradient)
    np.testing.assert_array_equal(values[:-1], [*[1 / 256 - 2] * 3, 0.5, 1.75, *[2 - 1 / 256] * 4])
    # Gradient descent may decrease offsets above the bound and increase those below it.
    np.testing.assert_array_equal(passed, [0, -1, 0, 1, -1, 1, 0, 1, 0, 1])
    assert exceeds_bound(offsets, 2).tolist() == [True, True, True, False, False, True, True, True, True, False]


@pytest.mark.slow
@pytest.mark.compiles
def test_clamped_offsets_are_counted_over_valid_cells() -> None:
    rng = np.random.default_rng(0)
    levels = [jnp.asarray(rng.normal(size=(2, *shape, 8)), jnp.float32) for shape in ((6, 8), (3, 4))]
    sizes = [jnp.asarray([[6, 8], [4, 5]]), jnp.asarray([[3, 4], [2, 3]])]
    module = DynamicConvolution(HeadConfig(groups=2, offset_bound=1, offset_scale=6.0), jnp.float32)
    params = module.init(jax.random.key(0), levels, sizes)
    assert set(params) == {"params"}
    found: Any = module.apply(params, levels, sizes, mutable=["intermediates"])
    (share,) = found[1]["intermediates"]["offsets_clamped"]
    own: Any = params["params"]["offset"]
    beyond, count = np.zeros(2), np.zeros(2)
    for level, size in zip(levels, sizes):
        for image, (height, width) in enumerate(np.asarray(size)):
            # The image alone at its own extent.
            x = level[image : image + 1, :height, :width]
            maps = jax.lax.conv_general_dilated(
                x, own["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            offsets = np.asarray(maps + own["bias"])[..., :18]
            beyond[image] += (np.abs(offsets) > 1 - 1 / 256).sum()
            count[image] += offsets.size
    assert 0.05 < share[0] < 0.95
    np.testing.assert_allclose(share, beyond / count, rtol=1e-6)


def _declared(images: int, stride: int, bound: int, shape: tuple[int, int]) -> Any:
    given, _ = _inputs(images, stride, bound, jnp.float32, shapes=(shape,))

    def run(maps: Any, offsets: Any, masks: Any, kernel: Any) -> Any:
        return window_forward(maps, offsets, masks, kernel, stride, bound)

    equations = jax.make_jaxpr(run)(*given[:4]).jaxpr.eqns
    (call,) = [e for e in equations if e.primitive.name == "pallas_call"]
    return call.params["cost_estimate"]


def test_declared_bytes_and_flops() -> None:
    # 128 outputs: 128 rows of 128 lanes of 4 bytes. A block has 64 cells. Samples, and their positions: three rows, and two (8 each),
    # of five pairs of taps for two parts. The kernel: 9 x 8 x 128.
    tile, samples, kernel = 128 * 128 * 4, 8 * 2 * 5 * 128 * 4, 9 * 8 * 128 * 4
    # One tile: six blocks (two of the map, four of zeros), samples, their positions, outputs.
    assert _declared(1, 1, 1, (6, 14)).bytes_accessed == 6 * tile // 2 + 2 * samples + kernel + tile
    # Two images are two tiles. Zeros, positions and the kernel are copied once.
    assert _declared(2, 1, 1, (6, 14)).bytes_accessed == 8 * tile // 2 + 3 * samples + kernel + 2 * tile
    # Per tap 128 outputs from a window of 16 x 16 cells of 4 channels, then 4 x 5 products; with a larger bound two such groups.
    assert _declared(1, 1, 1, (6, 14)).flops == 9 * 2 * 128 * (256 * 4 + 4 * 5)
    assert _declared(1, 1, 4, (3, 11)).flops == 9 * 2 * 128 * (2 * 256 * 4 + 4 * 5)


@pytest.mark.parametrize(
    "stride, bound, implementation, message",
    [
        (3, 4, "window", "stride 3 and bound 4: expected stride 1 or 2"),
        (1, 8, "window", "bound 8: expected stride 1 or 2 and a bound of 1 to 7"),
        (1, 0, "window", "implementation 'window' needs a bound"),
    ],
)
def test_unsupported_settings_are_refused(stride: int, bound: int, implementation: str, message: str) -> None:
    given, _ = _inputs(1, stride, bound or 1, jnp.float32)
    with pytest.raises(ValueError, match=message):
        _convolve(implementation, stride, bound)(*given)


def test_bounded_calls_have_one_stride() -> None:
    (maps, offsets, masks, kernel, bias), _ = _inputs(1, 1, 2, jnp.float32)
    taps = [Taps(i, 1 + i, o, m) for i, (o, m) in enumerate(zip(offsets, masks))]
    with pytest.raises(ValueError, match=r"strides \[1, 2\]: expected one"):
        deformable_convolution(rows_of(maps), taps, kernel, bias, bound=2)


def test_limits_of_the_setting() -> None:
    for bound, fine in ((0, True), (7, True), (8, False), (-1, False)):
        config = Config(model=ModelConfig(head=HeadConfig(offset_bound=bound)))
        if fine:
            validate(config)
        else:
            with pytest.raises(ConfigError, match=f"model.head.offset_bound is {bound}"):
                validate(config)
