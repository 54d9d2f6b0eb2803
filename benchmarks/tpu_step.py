"""Cycles of the training step on a TPU that is not there, counted in machine code, whole and by part of the network.

libtpu from PyPI compiles the step of one chip to the end, on a CPU (ten to twenty minutes on one core); `--kernels` compiles only the kernels
of a block of the head for one image, in seconds:

    PYTHONPATH=.cache/libtpu python -m benchmarks.tpu_step --chip=v5e --network=GLIP-T --images=1 --bound=4
    PYTHONPATH=.cache/libtpu python -m benchmarks.tpu_step --chip=v6e --kernels

Counted is, for each operation and kernel, the longest of its bundles, its products at the peak and its bytes at the bandwidth
(`glip_jax.planning.machine_code` says what that leaves out). Results are cached in --cache under a key of settings, code and versions.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from configs import glip_large, glip_tiny
from glip_jax.config import Config
from glip_jax.planning import cost, machine_code
from glip_jax.planning.compile import compile_step, environment
from glip_jax.planning.search import with_images_per_chip
from glip_jax.planning.statistics import CompileStatistics
from glip_jax.training.monitoring.chips import Topology, topology
from glip_jax.training.monitoring.flops import flops_per_image

CANVAS = (800, 1344)
NETWORKS = {"GLIP-T": glip_tiny.get_config, "GLIP-L": glip_large.get_config}


def settings(arguments: argparse.Namespace, chips: Topology) -> Config:
    """The network's config with the asked images a chip, bound and rematerialization."""
    base = NETWORKS[arguments.network]()
    head = dataclasses.replace(base.model.head, offset_bound=arguments.bound)
    model = dataclasses.replace(base.model, head=head, remat=arguments.remat or base.model.remat)
    return dataclasses.replace(with_images_per_chip(base, arguments.images, chips), model=model)


def table(config: Config, chips: Topology, statistics: CompileStatistics, top: int) -> str:
    """Cycles an image by part, what share of the peak the useful FLOPs are, and the `top` operations with the most cycles."""
    images, parts = config.train.batch_size, statistics.machine_cycles
    total, moved = sum(parts.values()), statistics.bytes / (chips.chip.bandwidth / chips.chip.clock)
    rows = [f"{'M cycles an image':26} {total / images / 1e6:9.2f}   {total / images / chips.chip.clock * 1e3:.1f} ms"]
    rows += [f"  {name:24} {cycles / images / 1e6:9.2f}   {cycles / total:4.0%}" for name, cycles in parts.items()]
    rows.append(f"{'all bytes at the bandwidth':26} {moved / images / 1e6:9.2f}")
    total = max(total, moved)
    useful = flops_per_image(config.model, *CANVAS).training * images
    rows.append(f"MFU at most, by machine code {useful / chips.chip.flops / (total / chips.chip.clock):8.1%}")
    rows.append(
        f"peak memory {statistics.peak / 2**30:.2f} GiB; {statistics.bytes / images / 1e9:.1f} GB touched an image"
    )
    rows.append(
        f"the compiler's own estimate, without kernels: {statistics.cycles / images / 1e6:.1f} M cycles an image"
    )
    slowest = sorted(statistics.top_operations, key=lambda each: -each.machine_cycles)[:top]
    rows += [
        f"  {each.machine_cycles / images / 1e6:7.3f}  {each.times:4} x {each.opcode} {each.type[:70]}  {each.origin[-80:]}"
        for each in slowest
    ]
    return "\n".join(rows)


def kernels(chips: Topology, canvas: tuple[int, int], bounds: Sequence[int], only: str) -> Iterator[str]:
    """Cycles of the kernels of one block of the head for one image, forward and backward; of those whose names match `only`."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    from glip_jax.models.kernels.attention import Read, attention_backward, attention_forward
    from glip_jax.models.kernels.blocks import LANES
    from glip_jax.models.kernels.deformable import window_backward, window_forward
    from glip_jax.models.kernels.windows import grouping, window_attention_backward, window_attention_forward

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    family = f"{chips.family}:{'2x2' if chips.chip.dimensions == 2 else '2x2x1'}"
    device = topologies.get_topology_desc(family, "tpu").devices[0]
    place = SingleDeviceSharding(device)
    model = glip_tiny.get_config().model
    heads, tokens, channels = model.fusion.heads, model.text.max_tokens, model.pyramid.channels
    maps = [(-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in model.pyramid.strides]
    locations = sum(height * width for height, width in maps)

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def images(shapes: Sequence[tuple[int, int]], *last: int, dtype: Any = jnp.float32) -> list[Any]:
        return [array(1, *shape, *last, dtype=dtype) for shape in shapes]

    wide, row = (heads, 1, tokens, channels), (heads, 1, tokens)
    given = (
        array(1, locations, channels, dtype=jnp.bfloat16), array(*wide, dtype=jnp.bfloat16), array(*row),
        array(*wide, dtype=jnp.bfloat16), array(1, locations, dtype=bool), array(1, tokens, dtype=bool),
        array(heads, 1, 2, dtype=jnp.uint32),
    )  # fmt: skip
    read, gradients = Read(array(*wide), array(*row), array(*row)), (given[0], array(*wide), array(*row))
    backward: Any = attention_backward
    programs: dict[str, tuple[Any, Any]] = {
        "fusion, forward": (partial(attention_forward, rate=0.1), given),
        "fusion, backward": (
            lambda read, g, *given: backward(*given, 0.1, read, g),
            (read, gradients, *given),
        ),
    }
    for bound, stride in itertools.product(bounds, (1, 2)):
        sources = maps if stride == 1 else maps[:-1]
        results = [(-(-height // stride), -(-width // stride)) for height, width in sources]
        kernel = array(3, 3, channels, channels)
        taps = (images(sources, channels, dtype=jnp.bfloat16), images(results, 9, 2), images(results, 9), kernel)
        name = f"deformable, stride {stride}, bound {bound}"
        programs[f"{name}, forward"] = (partial(window_forward, stride=stride, bound=bound), taps)
        programs[f"{name}, backward"] = (
            partial(window_backward, stride=stride, bound=bound), (*taps, images(results, channels, dtype=jnp.bfloat16)),
        )  # fmt: skip
    backbone = model.backbone
    for stage, stage_heads in enumerate(backbone.heads):
        sides = [-(-side // (4 * 2**stage)) for side in canvas]
        shape = (1, *(-(-side // backbone.window) * backbone.window for side in sides))
        layout = grouping(stage_heads, backbone.width * 2**stage // stage_heads, backbone.window)
        assert layout is not None
        cells = backbone.window**2
        taps = (
            array(*shape, 3 * LANES * layout.groups, dtype=jnp.bfloat16), array(stage_heads, cells, cells),
            array(*shape, LANES * layout.groups, dtype=jnp.bfloat16),
        )  # fmt: skip
        settings: Any = {"layout": layout, "window": backbone.window}
        name = f"Swin's windows, stage {stage + 1}"
        programs[f"{name}, forward"] = (partial(window_attention_forward, **settings), taps[:2])
        programs[f"{name}, backward"] = (partial(window_attention_backward, **settings), taps)
    folder = Path(os.environ["GLIP_JAX_CODE"])
    chosen = {name: program for name, program in programs.items() if re.search(only, name)}
    if not chosen:
        raise SystemExit(f"no kernel matches --only={only}; there are: {'; '.join(programs)}")
    for name, (function, arrays) in chosen.items():
        with jax.set_mesh(Mesh([device], ("data",))):
            text = jax.jit(function).lower(*arrays).compile().as_text() or ""
        flops, size = (peak / chips.chip.clock for peak in (chips.chip.flops, chips.chip.bandwidth))
        files = machine_code.bundle_files(folder)
        found = {
            each: machine_code.operation_cycles(each, files, flops, size) for each in cost.program_cost(text).operations
        }
        (kernel,) = [cycles for each, cycles in found.items() if each.opcode == "custom-call" and each.flops]
        others = sum(each.times * cycles.least for each, cycles in found.items()) - kernel.least
        yield (
            f"{name:38} {kernel.least / 1e6:8.3f} M cycles (products alone {kernel.products / 1e6:.3f}), around it {others / 1e6:.3f}"
        )
        for path in files.values():
            path.unlink()


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--chip", default="v5e", choices=("v4", "v5e", "v5p", "v6e"))
    parser.add_argument("--network", default="GLIP-T", choices=tuple(NETWORKS))
    parser.add_argument("--images", type=int, default=1, help="images of a chip and step")
    parser.add_argument("--bound", type=int, default=4, help="model.head.offset_bound")
    parser.add_argument("--remat", default="", help="model.remat, if not the config's")
    parser.add_argument("--cache", type=Path, default=Path("runs/tpu_step"))
    parser.add_argument("--text", type=Path, help="file to write the compiled program into")
    parser.add_argument("--kernels", action="store_true", help="the kernels of a block of the head alone")
    parser.add_argument("--top", type=int, default=20, help="operations with the most cycles to list")
    parser.add_argument("--only", default="", metavar="PATTERN", help="kernels whose names match, with --kernels")
    parser.add_argument("--height", type=int, default=CANVAS[0], help="of the image, with --kernels")
    parser.add_argument("--width", type=int, default=CANVAS[1], help="of the image, with --kernels")
    arguments = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.error(
            "libtpu is not installed: pip install -r requirements-benchmarks.txt, or PYTHONPATH=.cache/libtpu after scripts/test.sh --tpu"
        )
    chips = topology(f"{arguments.chip}:{'1x1' if arguments.chip in ('v5e', 'v6e') else '1x1x1'}")
    if arguments.kernels:
        with tempfile.TemporaryDirectory(prefix="glip_jax_code") as folder:
            # Before JAX initialises its devices: libtpu reads its arguments once.
            os.environ.update(environment(chips, "tpu"))
            os.environ["LIBTPU_INIT_ARGS"] += " " + " ".join(machine_code.dump_arguments(Path(folder)))
            os.environ["GLIP_JAX_CODE"] = folder
            print(
                f"{arguments.chip}, one image of {arguments.height} x {arguments.width}, 256 tokens, bfloat16, dropout 0.1"
            )
            for line in kernels(chips, (arguments.height, arguments.width), (arguments.bound, 3), arguments.only):
                print(line, flush=True)
        return
    config = settings(arguments, chips)
    print(
        f"{arguments.network}, {arguments.chip}, {arguments.images} images of {CANVAS[0]} x {CANVAS[1]} a chip, offsets' bound {arguments.bound}, "
        f"remat {config.model.remat}",
        flush=True,
    )
    statistics = compile_step(
        config, chips, CANVAS, "tpu-whole", arguments.cache, lambda line: print(f"  {line}", flush=True), arguments.text
    )
    if statistics.needed is not None:
        raise SystemExit(
            f"does not fit: {statistics.needed / 2**30:.2f} GiB of {(statistics.available or 0) / 2**30:.2f}"
        )
    print(table(config, chips, statistics, arguments.top))


if __name__ == "__main__":
    main()
