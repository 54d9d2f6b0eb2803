"""Cycles of one fusion block, forward and backward, estimated by the TPU compiler for different sources of dropout's random bits.

`libtpu` from PyPI compiles ahead of time on a CPU, here including code generation, which gives the estimates. One image of
800 x 1344 (22,400 locations), 256 tokens, bfloat16, GLIP-T's heads and rate; three to four minutes per row:

    python -m benchmarks.fusion_cycles --topology v5e:2x2
"""

import argparse
import os
import time
from typing import Any

_LOCATIONS, _TOKENS = 22400, 256
SOURCES = ("threefry", "hash", "none")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="none: without dropout")
    arguments = parser.parse_args()
    # Set before JAX initialises its devices: libtpu reads them once.
    from glip_jax.planning.compile import environment
    from glip_jax.training.monitoring.chips import topology

    chips = topology(arguments.topology)
    os.environ.update(environment(chips, "tpu"))

    import dataclasses

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from configs.glip_tiny import get_config
    from glip_jax.models import fusion
    from glip_jax.planning import cost

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    chip = topologies.get_topology_desc(arguments.topology, "tpu").devices[0]
    place, model, hashed = SingleDeviceSharding(chip), get_config().model, fusion.hashed_bits

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    width = model.pyramid.channels
    inputs = there(
        (
            jax.ShapeDtypeStruct((1, _LOCATIONS, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((1, _TOKENS, model.text.width), jnp.bfloat16),
            jax.ShapeDtypeStruct((1, _LOCATIONS), jnp.bool_),
            jax.ShapeDtypeStruct((1, _TOKENS), jnp.bool_),
        )
    )
    key = there(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))))
    print(f"{chip.device_kind}, one image, {_LOCATIONS} locations, {_TOKENS} tokens, forward + backward")
    print("random bits   million cycles    ms    GB accessed   compile s")
    for source in arguments.sources:
        fusion.hashed_bits = hashed if source == "hash" else lambda key, shape: jax.random.bits(key, shape, jnp.uint32)
        config = dataclasses.replace(model.fusion, **({"dropout": 0.0} if source == "none" else {}))
        block = fusion.Fusion(config, train=True, dtype=jnp.bfloat16)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        params = there(jax.eval_shape(lambda *given: block.init(keys, *given), *inputs)["params"])  # noqa: B023

        def both(params: Any, key: Any, visual: Any, text: Any, inside: Any, mask: Any, block: Any = block) -> Any:
            def forward(params: Any, visual: Any, text: Any) -> Any:
                random = {"dropout": jax.random.wrap_key_data(key)}
                return block.apply({"params": params}, visual, text, inside, mask, rngs=random)

            out, backward = jax.vjp(forward, params, visual, text)
            return out, backward(out)

        begin = time.perf_counter()
        result = cost.program_cost(jax.jit(both).lower(params, key, *inputs).compile().as_text() or "")
        seconds = time.perf_counter() - begin
        took = f"{result.cycles / chips.chip.clock * 1e3:5.1f}" if chips.chip.clock else "    -"
        print(f"{source:11} {result.cycles / 1e6:16.1f} {took} {result.bytes / 1e9:13.2f} {seconds:11.0f}", flush=True)


if __name__ == "__main__":
    main()
