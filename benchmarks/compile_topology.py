"""Compiles GLIP-T's forward + loss + backward for a TPU that is not there, and says what it would touch and hold.

`libtpu` from PyPI compiles ahead of time on a CPU. One chip, bfloat16, one or more images of 800 x 1344 pixels:

    python -m benchmarks.compile_topology --topology v5e:2x2 --images 1

A topology is at least a whole host (v5e:2x2); the program is compiled for its first chip alone.
"""

import argparse
import os
import re
import time
from collections import Counter
from typing import get_args

from glip_jax.config import Remat

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_SHAPE = re.compile(r"\b(pred|s8|u8|s16|u16|bf16|f16|s32|u32|f32|s64|u64|f64)\[([\d,]*)\]")
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")


def result_bytes(text: str) -> int:
    """Bytes of all arrays in an HLO type."""
    total = 0
    for kind, sides in _SHAPE.findall(text):
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count * _WIDTH.get(kind, 8)
    return total


def largest(hlo: str, count: int) -> list[tuple[int, str, str, str]]:
    """(bytes, operation, type, origin) of the operations with the largest results."""
    found = []
    for line in hlo.splitlines():
        match = _OPERATION.match(line)
        if match and match[3] not in ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional"):
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append((result_bytes(match[2]), match[3], match[2][:60], origin[1][-90:] if origin else ""))
    return sorted(found, reverse=True)[:count]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--remat", choices=get_args(Remat), default="blocks")
    parser.add_argument("--blocks", type=int, default=6, help="head blocks; GLIP-T has 6")
    parser.add_argument("--operations", type=int, default=15, help="how many of the largest to list")
    arguments = parser.parse_args()
    # Before jax is imported: libtpu reads them once.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from benchmarks.sample import abstract_params, made_batch, tiny, with_head_blocks
    from glip_jax.parallel import batch_sharding, shardings
    from glip_jax.training.step import first_gradients, glip_objective

    config = with_head_blocks(tiny("bfloat16", arguments.remat), arguments.blocks)
    topology = topologies.get_topology_desc(arguments.topology, "tpu")
    mesh = Mesh([[[topology.devices[0]]]], ("data", "fsdp", "tensor"))
    _, shapes = abstract_params(config)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings(shapes, mesh)
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
        made_batch(config, arguments.height, arguments.width, arguments.images),
    )
    objective = glip_objective(config)
    start = time.perf_counter()
    lowered = jax.jit(lambda p, b: first_gradients(p, b, config, mesh, objective)).lower(params, batch)
    middle = time.perf_counter()
    compiled = lowered.compile()
    print(f"traced and lowered in {middle - start:.0f} s, compiled in {time.perf_counter() - middle:.0f} s")
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    for name in ("argument", "output", "temp", "alias", "generated_code"):
        print(f"{name}: {getattr(memory, f'{name}_size_in_bytes') / 2**30:.2f} GiB")
    print(f"bytes accessed: {cost.get('bytes accessed', float('nan')) / 1e9:.1f} GB")
    print(f"floating point operations: {cost.get('flops', float('nan')) / 1e12:.2f} T (loop bodies count once)")
    hlo = compiled.as_text() or ""
    kinds = Counter(match[3] for line in hlo.splitlines() if (match := _OPERATION.match(line)))
    print("operations:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(12)))
    for size, operation, kind, origin in largest(hlo, arguments.operations):
        print(f"{size / 2**20:9.1f} MiB  {operation:24} {kind:60} {origin}")


if __name__ == "__main__":
    main()
