"""Prints the table of plans in docs/results/plans.md: GLIP-T and GLIP-L on five pods, at the largest canvas (800 x 1344).

    python -m benchmarks.plans              the table from cached compilations; missing cells by formula
    python -m benchmarks.plans --compile    compiles missing cells first, one after another (libtpu; no TPU)

A cell takes about four minutes of one idle core. Cells are cached in --cache under a key of settings, code and versions, so the same
command resumes an interrupted run; after a change of the network all cells are missing again.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

from configs import glip_large, glip_tiny
from glip_jax.config import Config
from glip_jax.planning.compile import abstract_batch, abstract_mesh, cached, compile_step, state_bytes
from glip_jax.planning.roofline import Roofline, roofline, scaling
from glip_jax.planning.search import with_images_per_chip
from glip_jax.planning.statistics import CompileStatistics
from glip_jax.training.monitoring.chips import topology
from glip_jax.training.state import abstract_state

CANVAS = (800, 1344)
CONFIGS = {"GLIP-T": glip_tiny.get_config, "GLIP-L": glip_large.get_config}


class Cell(NamedTuple):
    """A row of the table."""

    network: str
    pod: str
    images: int
    """Images per chip."""
    fsdp: int
    bound: int = 4
    """`model.head.offset_bound`; 0, as required by released weights, is no bound."""

    @property
    def name(self) -> str:
        """Name for --only, and for the file of the compiled program."""
        return f"{self.network}@{self.pod}" + ("" if self.bound else "-unbounded")


CELLS = (
    Cell("GLIP-T", "v5e-64", 4, 1),
    Cell("GLIP-T", "v5e-64", 4, 1, bound=0),
    Cell("GLIP-T", "v5e-256", 4, 1),
    Cell("GLIP-T", "v4-32", 8, 1),
    Cell("GLIP-T", "v5p-32", 16, 1),
    Cell("GLIP-T", "v6e-64", 8, 1),
    Cell("GLIP-L", "v5e-64", 4, 16),
    Cell("GLIP-L", "v5e-64", 4, 16, bound=0),
    Cell("GLIP-L", "v5e-256", 4, 16),
    Cell("GLIP-L", "v4-32", 4, 1),
    Cell("GLIP-L", "v5p-32", 8, 1),
    Cell("GLIP-L", "v6e-64", 4, 1),
)


def settings(cell: Cell) -> Config:
    """The network's config for a cell: its batch, its mesh, one worker process per host core."""
    base, chips = CONFIGS[cell.network](), topology(cell.pod)
    head = dataclasses.replace(base.model.head, offset_bound=cell.bound)
    return dataclasses.replace(
        with_images_per_chip(base, cell.images, chips),
        model=dataclasses.replace(base.model, head=head),
        data=dataclasses.replace(base.data, workers=chips.chip.host_cores),
        mesh=dataclasses.replace(base.mesh, fsdp=cell.fsdp),
    )


def planned(cell: Cell, statistics: CompileStatistics | None) -> Roofline:
    """The roofline of a cell, from the compiled step or by formula."""
    config, chips = settings(cell), topology(cell.pod)
    mesh = abstract_mesh(config, chips)
    state = state_bytes(abstract_state(config, mesh), abstract_batch(config, CANVAS, mesh))
    return roofline(config, chips, CANVAS, state, statistics, dict(mesh.shape))


def row(cell: Cell, statistics: CompileStatistics | None) -> str:
    """A row of the Markdown table."""
    found, chips = planned(cell, statistics), topology(cell.pod)
    if statistics is None:
        memory = f"not run (state {(sum(found.memory.values())) / 2**30:.1f}) of {found.memory_limit / 2**30:.0f}"
    else:
        memory = f"{found.memory['peak'] / 2**30:.2f} of {found.memory_limit / 2**30:.2f}: {'fits' if found.fits else 'does **not** fit'}"
    scaled = scaling(chips, found)
    cells = [
        cell.network,
        cell.pod,
        f"{chips.devices}",
        f"{cell.images}",
        f"{cell.fsdp}",
        f"{cell.bound or 'none'}",
        memory,
        f"{found.useful_flops / 1e12:.1f}, {found.hardware_flops / 1e12:.1f}",
        "not run" if found.bytes is None else f"{found.bytes / 1e9:.0f}",
        f"{sum(each.sent_bytes for each in found.collectives) / 1e9:.2f}",
        found.bound,
        f"{found.images_per_second:,.0f}",
        f"{found.mfu:.0%}",
        f"{found.mean_hours:.1f}",
        f"{found.chip_hours:,.0f}",
        f"{scaled['efficiency']:.1%}" if scaled else "",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| network | pod | chips | images a chip | fsdp | offsets' bound | peak GiB | TFLOP a chip and step: useful, executed | GB touched | GB sent | "
    "bound | images/s at most | MFU | hours | chip-hours | 16 to 256 chips |"
)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--compile", action="store_true", help="compile the cells that are missing")
    parser.add_argument("--only", nargs="*", default=[], help=f"cells such as {CELLS[0].name}")
    parser.add_argument("--cache", type=Path, default=Path("runs/plans"))
    parser.add_argument("--text", type=Path, help="folder to write the compiled programs into")
    arguments = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    unknown = set(arguments.only) - {cell.name for cell in CELLS}
    if unknown:
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; there are {', '.join(cell.name for cell in CELLS)}")
    rows = []
    for cell in CELLS:
        config, chips = settings(cell), topology(cell.pod)
        statistics = cached(config, chips, CANVAS, "tpu", arguments.cache)
        if statistics is None and arguments.compile and (not arguments.only or cell.name in arguments.only):
            print(f"{cell.name}: {time.strftime('%H:%M')}", flush=True)
            text = arguments.text / f"{cell.name}.hlo" if arguments.text else None
            statistics = compile_step(
                config, chips, CANVAS, "tpu", arguments.cache, lambda line: print(f"  {line}"), text
            )
        rows.append(row(cell, statistics))
    print("\n".join([HEAD, "|---" * (HEAD.count("|") - 1) + "|", *rows]))


if __name__ == "__main__":
    main()
