"""Compiles one 3 x 3 deformable convolution over P3-P7 for an absent TPU: gathers and windowed products.

`libtpu` from PyPI compiles ahead of time on a CPU. Forward and backward pass, 256 channels, bfloat16:

    python -m benchmarks.deformable_window --topology v5e:2x2 --bound 4

Bytes and operations are the compiler's cost analysis. It does not see inside a
Pallas kernel, but uses the kernel's declaration: every copy of a block between HBM and VMEM, counted from its grid, with padding.
"""

import argparse
import os
import time
from typing import Any

_STRIDES = (8, 16, 32, 64, 128)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--implementations", nargs="+", choices=("gather", "window"), default=("gather", "window"))
    parser.add_argument("--bound", type=int, default=4, help="largest offset in cells, of the windowed implementation")
    parser.add_argument("--stride", type=int, choices=(1, 2), default=1)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--channels", type=int, default=256)
    arguments = parser.parse_args()
    # Set before JAX initialises its devices: libtpu reads them once.
    from glip_jax.planning.compile import environment
    from glip_jax.training.monitoring.chips import topology

    for name, value in environment(topology(arguments.topology), "tpu").items():
        os.environ.setdefault(name, value)

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from glip_jax.models import deformable
    from glip_jax.models.deformable import Taps, deformable_convolution, rows_of

    deformable._MAX_GATHERED = 1 << 30  # the analysis counts the body of a loop once, so no loop is used
    chip = topologies.get_topology_desc(arguments.topology, "tpu").devices[0]
    mesh = Mesh(np.array([[[chip]]]), ("data", "fsdp", "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    images, channels, stride = arguments.images, arguments.channels, arguments.stride
    maps = [(-(-arguments.height // s), -(-arguments.width // s)) for s in _STRIDES]
    outputs = [(-(-h // stride), -(-w // stride)) for h, w in maps]
    given = (
        [array(images, *shape, channels, dtype=jnp.bfloat16) for shape in maps],
        [array(images, *shape, 9, 2) for shape in outputs],
        [array(images, *shape, 9) for shape in outputs],
        array(3, 3, channels, channels),
        array(channels),
    )
    gradients = [array(images, *shape, channels, dtype=jnp.bfloat16) for shape in outputs]

    print(f"{chip.device_kind}, {images} x {arguments.height} x {arguments.width}, stride {stride}, maps {maps}")
    print("implementation    pass                 GB accessed   TFLOP   temporaries MiB   lower + compile s")
    for implementation in arguments.implementations:

        def forward(
            maps: Any, offsets: Any, masks: Any, kernel: Any, bias: Any, implementation: Any = implementation
        ) -> Any:
            taps = [Taps(level, stride, o, m) for level, (o, m) in enumerate(zip(offsets, masks))]
            bound = arguments.bound if implementation == "window" else 0
            return deformable_convolution(rows_of(maps), taps, kernel, bias, implementation, bound)

        def both(given: Any, gradients: Any, forward: Any = forward) -> Any:
            out, backward = jax.vjp(forward, *given)
            return out, backward(gradients)

        for name, function, inputs in (("forward", forward, given), ("forward + backward", both, (given, gradients))):
            begin = time.perf_counter()
            # Pallas kernels are lowered for the chip of the current mesh.
            with jax.set_mesh(mesh):
                compiled = jax.jit(function).lower(*inputs).compile()
            seconds, cost = time.perf_counter() - begin, compiled.cost_analysis() or {}
            memory: Any = compiled.memory_analysis()
            print(
                f"{implementation:7} {name:20} {cost.get('bytes accessed', float('nan')) / 1e9:11.2f} "
                f"{cost.get('flops', float('nan')) / 1e12:7.3f} {memory.temp_size_in_bytes / 2**20:17.1f} {seconds:19.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
