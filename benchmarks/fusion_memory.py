"""Peak temporary memory of a stack of fusion layers, forward and backward, from the compiled program; nothing is run.

GLIP-T's six layers over the 22,400 anchors of an 800 x 1344 image and 256 tokens, float32:

    python -m benchmarks.fusion_memory
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from benchmarks.sample import tiny
from glip_jax.config import ModelConfig
from glip_jax.models.fusion import Fusion

__all__ = ["compiled_bytes"]


class _Layers(nn.Module):
    """Consecutive fusion layers, scanned as in the head."""

    config: ModelConfig
    layers: int
    remat: bool
    train: bool = True

    @nn.compact
    def __call__(
        self,
        visual: Float[Array, "B A C"],
        text: Float[Array, "B T D"],
        valid: Bool[Array, "B A"],
        mask: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B A C"], Float[Array, "B T D"]]:
        config, train = self.config.fusion, self.train

        class Layer(nn.Module):
            @nn.compact
            def __call__(
                self,
                state: tuple[Float[Array, "B A C"], Float[Array, "B T D"]],
                valid: Bool[Array, "B A"],
                mask: Bool[Array, "B T"],
            ) -> tuple:
                visual, text = state
                return Fusion(config, train, jnp.float32)(visual, text, valid, mask), None

        body = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.layers,
        )
        return scan()((visual, text), valid, mask)[0]


def compiled_bytes(config: ModelConfig, layers: int, anchors: int, remat: bool = False) -> tuple[int, int]:
    """(temporary, argument) bytes of forward + backward of `layers` fusion layers over `anchors` cells, one image."""
    model = _Layers(config, layers, remat)
    shape = jax.ShapeDtypeStruct
    inputs = (
        shape((1, anchors, config.pyramid.channels), jnp.float32),
        shape((1, config.text.max_tokens, config.text.width), jnp.float32),
        shape((1, anchors), jnp.bool_),
        shape((1, config.text.max_tokens), jnp.bool_),
    )
    key = jax.random.key(0)
    params = jax.eval_shape(lambda *i: model.init({"params": key, "dropout": key}, *i), *inputs)

    def loss(params: dict, *inputs: Array) -> Array:
        outputs = model.apply(params, *inputs, rngs={"dropout": key})
        return sum((jnp.square(output).sum() for output in jax.tree.leaves(outputs)), start=jnp.zeros(()))

    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(params, *inputs).compile().memory_analysis()
    if memory is None:
        raise SystemExit("this backend offers no memory analysis")
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--anchors", type=int, default=22_400)
    arguments = parser.parse_args()
    print("| layers | anchors | remat | temporaries GiB | arguments GiB |\n|---|---|---|---|---|")
    for remat in (False, True):
        temporary, argument = compiled_bytes(tiny().model, arguments.layers, arguments.anchors, remat)
        name = "blocks" if remat else "none"
        print(
            f"| {arguments.layers} | {arguments.anchors} | {name} | {temporary / 2**30:.2f} | {argument / 2**30:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
