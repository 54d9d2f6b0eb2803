"""The job `precompile`: the training step compiled for every canvas ahead of the run, into the cache that the run reads."""

import importlib.util
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from glip_jax.cli.command_line import Arguments, CommandLineError, parse
from glip_jax.cli.processes import ProcessArguments, fingerprints, run_joined
from glip_jax.config import Config, ConfigError
from glip_jax.config.ranges import Limit
from glip_jax.distributed import exit_codes
from glip_jax.distributed.mesh import check_fits, make_mesh
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.planning.compile import PlanError, abstract_mesh
from glip_jax.planning.precompile import canvases, precompile
from glip_jax.training.monitoring.chips import Topology, topology

__all__ = ["PrecompileArguments", "main"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecompileArguments(ProcessArguments, Arguments):
    """Compile the training step for every canvas ahead, into the compilation cache that `train` with this --workdir reads.

    Give it the flags of the run. It needs no data. Programs that are there already are not compiled again, so the same command goes on.
    """

    topology: str = ""
    """TPU chips that are not here, such as v5e:8x16: libtpu compiles for them on any CPU. Default: the devices of this machine, with
    --distributed of all hosts."""
    workers: Limit = 0
    """Programs compiled at once, each in gigabytes of memory; 0: one for every four cores, at most eight."""


def main(argv: Sequence[str]) -> int:
    """Runs the job. Raises CommandLineError, ConfigError, MeshError, TopologyError or PlanError."""
    example = "--config=configs/glip_tiny.py --workdir=gs://BUCKET/runs/one --topology=v5e:8x16"
    arguments = parse(argv, PrecompileArguments, "precompile", example)
    if not arguments.workdir:
        raise CommandLineError("no working folder: expected --workdir=DIR, as of the run")
    if arguments.config.reads_descriptions:
        raise ConfigError(
            "data.captions.descriptions: their vectors are part of the program, and only the run makes them: it compiles by itself"
        )
    if arguments.topology:
        chips = _absent_chips(arguments.topology)
        # With libtpu installed and no TPU here, jax would look for one.
        jax.config.update("jax_platforms", "cpu")
        abstract_mesh(arguments.config, chips)  # raises where the batch does not split
        return _compile(arguments, chips, f"{chips.name}, which is not here")
    return run_joined("precompile", arguments, lambda: fingerprints(arguments.config), lambda _: _here(arguments))


def _absent_chips(name: str) -> Topology:
    chips = topology(name)
    if not chips.tpu:
        raise PlanError(
            f"--topology={name}: programs of GPUs are compiled where the GPUs are: give the same command there, without --topology"
        )
    if chips.devices == 1:
        raise PlanError(
            f"--topology={name}: the program of one chip has another key there: give the same command on the chip, without --topology"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(f"--topology={name}: libtpu is not installed: pip install -r requirements-tpu.txt")
    return chips


def _here(arguments: PrecompileArguments) -> int:
    check_fits(arguments.config, make_mesh(arguments.config.mesh))
    devices = jax.devices()
    return _compile(arguments, None, f"{len(devices)} x {devices[0].device_kind} of this machine")


def _compile(arguments: PrecompileArguments, chips: Topology | None, what: str) -> int:
    config: Config = arguments.config
    log = logger.info if chips is not None or jax.process_index() == 0 else lambda _: None
    folder, number, begin = enable_compilation_cache(arguments.workdir), len(canvases(config)), time.perf_counter()
    log(f"compiling {number} canvases for {what}, into {folder}")
    cached = 0
    for count, done in enumerate(precompile(config, chips, arguments.workdir, arguments.workers), start=1):
        cached += done.cached
        height, width = done.canvas
        log(
            f"canvas {count} of {number} ({height}x{width}): {'was in the cache' if done.cached else 'compiled'}, {done.seconds:.1f} s"
        )
    log(f"{number - cached} canvases compiled, {cached} found in {folder}, {time.perf_counter() - begin:.1f} s")
    if chips is not None:
        log(
            "note: the run finds these programs only with the same jax, jaxlib, libtpu, LIBTPU_INIT_ARGS, XLA_FLAGS, settings and chips; else it "
            "compiles by itself. `train` says how many it read"
        )
    return exit_codes.DONE
