"""The fusion kernels in the interpreter: equal to the scan with all gradients, for each image alone and on each device; compiled for TPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glip_jax.config import FusionConfig, MeshConfig, Remat
from glip_jax.distributed.mesh import batch_axes, batch_sharding, make_mesh
from glip_jax.models import fusion
from glip_jax.models.fusion import Fusion, Implementation, Operands, attend
from glip_jax.models.kernels import attention
from glip_jax.models.remat import rematerialized

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).resolve().parents[3]
HEADS = 2
NAMES = ("for_image", "for_text", "weight_sum", "visual", "keys", "key_bias", "values")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks already for a few hundred locations."""
    monkeypatch.setattr(attention, "_ROWS", 128)
    monkeypatch.setattr(attention, "_STEP", 16)


def _inputs(images: int, locations: int, tokens: int, channels: int = 32, dtype: Any = jnp.float32) -> Any:
    """Random extents, masks and operands, words of dropout, and gradients of the results."""
    rng = np.random.default_rng(locations + tokens)
    wide = (HEADS, images, tokens, channels)

    def normal(*shape: int, scale: float = 1.0, kind: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), kind)

    scale = 2 * channels**-0.5
    operands = Operands(
        normal(*wide, scale=scale, kind=dtype), normal(*wide[:3]), normal(*wide, scale=scale, kind=dtype)
    )
    valid = rng.uniform(size=(images, locations)) < rng.uniform(0.3, 1, size=(images, 1))
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, size=(images, 1))
    words = jnp.asarray(rng.integers(0, 2**32, size=(HEADS, images, 2)), jnp.uint32)
    given = (normal(images, locations, channels, kind=dtype), operands, jnp.asarray(valid), jnp.asarray(mask), words)
    return given, (normal(images, locations, channels, kind=dtype), normal(*wide), normal(*wide[:3]))


def _both(given: Any, gradients: Any, rate: float, implementation: Implementation) -> dict[str, np.ndarray]:
    visual, operands, valid, mask, words = given

    def run(visual: Any, operands: Any) -> Any:
        return tuple(attend(visual, operands, valid, mask, words if rate else None, rate, implementation))

    out, backward = jax.vjp(run, visual, operands)
    (dvisual, doperands) = backward(gradients)
    assert [x.dtype for x in (dvisual, *doperands)] == [x.dtype for x in (visual, *operands)]
    return dict(zip(NAMES, (*out, dvisual, *doperands)))


def _run(given: Any, gradients: Any, rate: float, implementation: Implementation) -> dict[str, np.ndarray]:
    found = jax.jit(_both, static_argnums=(2, 3))(given, gradients, rate, implementation)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), found)


def _close(found: Any, wanted: Any, tolerance: float) -> None:
    for name in NAMES:
        largest = np.abs(wanted[name]).max()
        assert np.isfinite(found[name]).all(), name
        assert np.abs(found[name] - wanted[name]).max() <= tolerance * largest, name


@pytest.mark.parametrize(
    "images, locations, tokens, rate, dtype, tolerance",
    [
        # Three blocks with rows beyond the array; tokens are padded.
        (2, 300, 40, 0.1, jnp.float32, 5e-6),
        pytest.param(1, 256, 128, 0.0, jnp.float32, 5e-6, marks=pytest.mark.slow),
        pytest.param(3, 97, 200, 0.3, jnp.float32, 5e-6, marks=pytest.mark.slow),
        pytest.param(2, 300, 40, 0.1, jnp.bfloat16, 0.015, marks=pytest.mark.slow),
    ],
)
def test_results_and_gradients_equal_the_scan(
    images: int, locations: int, tokens: int, rate: float, dtype: Any, tolerance: float
) -> None:
    given, gradients = _inputs(images, locations, tokens, dtype=dtype)
    found = _run(given, gradients, rate, "kernel")
    _close(found, _run(given, gradients, rate, "scan"), tolerance)
    # What dropout keeps is the same, place by place: another word changes the results by far more than the tolerance.
    if rate:
        *rest, words = given
        other = _run((*rest, words + jnp.uint32(1)), gradients, rate, "kernel")
        assert np.abs(other["for_image"] - found["for_image"]).max() > 10 * tolerance * np.abs(found["for_image"]).max()


def test_an_image_does_not_depend_on_its_batch_and_may_be_empty() -> None:
    (visual, operands, valid, mask, words), gradients = _inputs(3, 200, 24)
    valid = valid.at[1].set(False)
    given = (visual, operands, valid, mask, words)
    together = _run(given, gradients, 0.1, "kernel")
    # An image without a location: its text reads all of them alike, as far as their logits are alike.
    assert np.isfinite(together["for_text"]).all()
    for image in (0, 2):
        part: Any = slice(image, image + 1)
        own = _run(
            (visual[part], Operands(*(x[:, part] for x in operands)), valid[part], mask[part], words[:, part]),
            (gradients[0][part], *(x[:, part] for x in gradients[1:])), 0.1, "kernel",
        )  # fmt: skip
        _close(
            own, {n: np.take(x, [image], 0 if n in ("for_image", "visual") else 1) for n, x in together.items()}, 1e-6
        )


@pytest.mark.slow
def test_each_device_attends_to_its_own_images() -> None:
    """Within a program for several devices, whose images are split over them."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    given, gradients = _inputs(8, 140, 16)
    wanted = _run(given, gradients, 0.1, "scan")
    first, second = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec(None, batch_axes(mesh)))
    text: Any = second
    given = jax.device_put(given, (first, Operands(text, text, text), first, first, second))
    gradients = jax.device_put(gradients, (first, second, second))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered: Any = jax.jit(_both, static_argnums=(2, 3)).lower(given, gradients, 0.1, "kernel").compile()
    _close(jax.tree.map(lambda x: np.asarray(x, np.float32), lowered(given, gradients)), wanted, 5e-6)
    assert not [line for line in lowered.as_text().splitlines() if "all-gather(" in line or "all-to-all(" in line]


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("kernels", 1), ("elementwise", 1), ("blocks", 2)])
def test_remat_of_kernels_does_not_run_them_again(monkeypatch: pytest.MonkeyPatch, remat: Remat, times: int) -> None:
    monkeypatch.setattr(fusion, "is_possible", lambda *_: True)
    monkeypatch.setattr(fusion, "LANES", 1)
    block = rematerialized(Fusion, remat)(FusionConfig(width=16, heads=2, dropout=0.1), train=True, dtype=jnp.float32)
    shapes: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 140, 32), (1, 24, 12))]
    shapes += [jax.ShapeDtypeStruct(shape, bool) for shape in ((1, 140), (1, 24))]
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params: Any = jax.eval_shape(lambda *given: block.init(keys, *given), *shapes)

    apply: Any = block.apply

    def loss(params: Any, *given: Any) -> Any:
        visual, text = apply(params, *given, rngs={"dropout": keys["dropout"]})
        return visual.sum() + text.sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(params, *shapes))
    assert [program.count(f"name={kernel}_fusion") for kernel in ("forward", "backward")] == [times, 1]


@pytest.mark.tpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_compiles_for_a_tpu(chip: str) -> None:
    """With the sizes of GLIP-T, of a small image: the code for a large one has more turns, no other instructions."""
    few = "fusion|stride 1, bound 4|stride 2, bound 3|stage [14]"
    command = [
        sys.executable,
        "-m",
        "benchmarks.tpu_step",
        f"--chip={chip}",
        "--kernels",
        f"--only={few}",
        "--height=64",
        "--width=64",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(re.findall(r"^(.+?)\s+([\d.]+) M cycles", done.stdout, re.MULTILINE))
    wanted = {
        "fusion",
        "deformable, stride 1, bound 4",
        "deformable, stride 2, bound 3",
        "Swin's windows, stage 1",
        "Swin's windows, stage 4",
    }
    assert set(found) == {f"{kernel}, {way}" for kernel in wanted for way in ("forward", "backward")}
    assert all(float(cycles) > 0 for cycles in found.values())
