"""Compile time and run time of the training step of GLIP-T on this machine, whole and by part of the network.

Float32, one image of 480 x 640 pixels, 256 tokens, random weights, dropout on. A part runs forward and backward on random inputs; `x 6` is
a block of the head, which the step scans. GFLOP are those of the products (`training/monitoring/flops.py`), so GFLOP/s below that
of a large product say how much of the time is for anything else. Of the whole step only the compilation is timed.

    python -m benchmarks.parts --rounds 5
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.sample import made_batch, tiny
from glip_jax.config import Config
from glip_jax.distributed.mesh import make_mesh
from glip_jax.models.bert import Bert, BertLayer
from glip_jax.models.dynamic_head import DynamicConvolution
from glip_jax.models.fusion import Fusion
from glip_jax.models.pyramid import Pyramid
from glip_jax.models.swin import Swin
from glip_jax.structures.canvas import PATCH
from glip_jax.training.monitoring.flops import flops_per_image
from glip_jax.training.state import abstract_state
from glip_jax.training.step import glip_objective, make_step

HEIGHT, WIDTH = 480, 640


def _parts(config: Config) -> dict[str, tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """For each part its name in `flops_per_image`, module, inputs, and which of them get a gradient."""
    model, dtype, key = config.model, jnp.float32, jax.random.key(0)
    channels, tokens = model.pyramid.channels, model.text.max_tokens
    shapes = [(-(-HEIGHT // stride), -(-WIDTH // stride)) for stride in model.pyramid.strides]

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape)

    levels, sizes = tuple(normal(1, *s, channels) for s in shapes), tuple(jnp.array([s]) for s in shapes)
    maps = tuple(normal(1, *s, 2**k * model.backbone.width) for k, s in enumerate(shapes[:3], 1))
    anchors, extent = sum(h * w for h, w in shapes), jnp.array([[HEIGHT, WIDTH]])
    patches = normal(1, HEIGHT // PATCH, WIDTH // PATCH, 3 * PATCH**2)
    text, mask = normal(1, tokens, model.text.width), jnp.ones((1, tokens), bool)
    pyramid = Pyramid(model.pyramid, True, dtype)
    layer = BertLayer(model.text, True, dtype, True, "torch", model.lora)
    fused = (normal(1, anchors, channels), text, jnp.ones((1, anchors), bool), mask)
    blocks = f"x {model.head.blocks}"
    return {
        "backbone": ("backbone", Swin(model.backbone, True, dtype), (patches, extent), ()),
        "pyramid": ("pyramid", pyramid, (maps, extent), (0,)),
        "text": ("text", Bert(model.text, True, dtype), (jnp.ones((1, tokens), jnp.int32), mask), ()),
        f"fusion {blocks}": ("fusion", Fusion(model.fusion, True, dtype), fused, (0, 1)),
        f"head text {blocks}": ("head_text", layer, (text, mask), (0,)),
        f"convolutions {blocks}": ("dynamic", DynamicConvolution(model.head, dtype), (levels, sizes), (0,)),
    }


def _gradients(
    module: Any, inputs: tuple[Any, ...], wanted: tuple[int, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Forward and backward pass of a module as a function, and its arguments."""
    key = jax.random.key(0)
    params = jax.jit(lambda: module.init({"params": key, "dropout": key}, *inputs)["params"])()

    def loss(params: Any, given: tuple[Any, ...]) -> jax.Array:
        arguments = list(inputs)
        for place, x in zip(wanted, given):
            arguments[place] = x
        outputs = jax.tree.leaves(module.apply({"params": params}, *arguments, rngs={"dropout": key}))
        return sum((jnp.square(x).sum() for x in outputs), start=jnp.zeros(()))

    return jax.grad(loss, (0, 1)), (params, tuple(inputs[place] for place in wanted))


def _compiled(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, str]:
    """The compiled program, and its times as cells of the table."""
    start = time.perf_counter()
    traced = function.trace(*arguments)
    at_trace = time.perf_counter()
    lowered = traced.lower()
    at_lower = time.perf_counter()
    program = lowered.compile()
    return program, f"{at_trace - start:.1f} | {at_lower - at_trace:.1f} | {time.perf_counter() - at_lower:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of a part, after one that is not counted")
    rounds = parser.parse_args(argv).rounds
    jax.config.update("jax_enable_compilation_cache", False)
    config = tiny()
    flops = flops_per_image(config.model, HEIGHT, WIDTH).parts
    print("| part | trace s | lower s | compile s | run s | GFLOP | GFLOP/s |\n|---|---|---|---|---|---|---|")
    for title, (name, module, inputs, wanted) in _parts(config).items():
        function, arguments = _gradients(module, inputs, wanted)
        program, times = _compiled(jax.jit(function), arguments)
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds.append(time.perf_counter() - start)
        count = config.model.head.blocks if " x " in title else 1
        work, median = 3 * flops[name] / count / 1e9, statistics.median(seconds[1:])
        print(f"| {title} | {times} | {median:.2f} | {work:.0f} | {work / median:.0f} |", flush=True)
    mesh = make_mesh(config.mesh)
    state, batch = abstract_state(config, mesh), made_batch(config, HEIGHT, WIDTH)
    step = make_step(config, mesh, glip_objective(config), state)
    print(f"| whole step | {_compiled(step, (state, batch))[1]} | | | |")


if __name__ == "__main__":
    main()
