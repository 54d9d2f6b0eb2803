"""The job `plan`: the training step compiled for absent chips: memory, bounds and time."""

import dataclasses
import errno
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
from tqdm import tqdm

from glip_jax.cli.command_line import Arguments, CommandLineError, parse, value_of
from glip_jax.config import Config, PathStr, Remat
from glip_jax.config.ranges import Count, Limit, Range
from glip_jax.distributed import exit_codes
from glip_jax.planning import report
from glip_jax.planning.compile import PlanError, abstract_batch, abstract_mesh, compile_step, state_bytes
from glip_jax.planning.precompile import canvases
from glip_jax.planning.roofline import IMAGES_PER_CORE, Roofline, roofline, scaling
from glip_jax.planning.search import candidates, search, table, with_images_per_chip
from glip_jax.planning.statistics import CompileMode, CompileStatistics
from glip_jax.training.monitoring.chips import Topology, topology
from glip_jax.training.state import abstract_state
from glip_jax.weights.readers import open_checkpoint_or_export

__all__ = ["PlanArguments", "main", "plan"]

logger = logging.getLogger(__name__)

_NO_LIBTPU = (
    "libtpu is not installed, so the TPU's own compiler is missing: pip install -r requirements-tpu.txt (any CPU will do). "
    "Going on with a compile for fake CPU devices"
)


@dataclass(frozen=True)
class PlanArguments(Arguments):
    """Compile the training step for absent chips: whether it fits, what bounds it, how long training takes.

    Runs on any CPU. A full network takes minutes to compile; what was compiled once is kept.
    """

    checkpoint: PathStr = ""
    """Plan the run of this checkpoint: its settings stand where there is no --config=FILE.py. WORKDIR, WORKDIR/checkpoints/STEP, a
    folder that `export` wrote, or a delta; local or gs://."""
    topology: str = ""
    """v5e:8x16, v5litepod-64, v4-32, v5e:16x16*2 (two slices), h100:8, ..."""
    canvas: tuple[str, ...] = ()
    """Height x width of the images, such as 800x1344, or several with commas; default: the config's largest."""
    images_per_chip: Limit = 0
    """Sets train.batch_size to so many for every chip (and micro-batch), and train.steps so that as many images are seen. With
    mesh.tensor, chips that share an image's work have theirs together. Default: the config's batch, or 1 where that does not split."""
    compile: Literal["auto", "tpu", "tpu-whole", "fake", "local", "none"] = "auto"
    """tpu: libtpu, until it would write machine code; tpu-whole: to the end, several times as long, which adds the program's
    size and the compiler's own estimate of time; fake: fake CPU devices; local: the GPUs of this machine; none: formulas. auto: for TPUs tpu, or fake
    where libtpu is not installed; for GPUs none."""
    out: PathStr = ""
    """JSON file to write."""
    operations: Limit = 0
    """List so many kinds of operations that touch most memory."""
    search: bool = False
    """Try images per chip, remat, fsdp and tensor, and rank what fits. The same command again goes on where it stopped."""
    search_images: tuple[Count, ...] = (1, 2, 4, 8)
    search_remat: tuple[str, ...] = ("none", "elementwise", "kernels", "blocks")
    search_fsdp: tuple[Count, ...] = (1, 16)
    search_tensor: tuple[Count, ...] = ()
    """Default: the config's own."""
    images_per_core: Annotated[float, Range(0, 1e9, "images a second", above=True)] = IMAGES_PER_CORE
    """What a core of a host prepares in a second, JPEG to batch; `python -m benchmarks.data` measures it."""
    cache: PathStr = ""
    """Folder of what was compiled; default: ~/.cache/glip_jax/plans."""


def main(argv: Sequence[str]) -> int:
    """Runs the job. Raises CommandLineError, CheckpointError, ConfigError, MeshError, TopologyError, PlanError or CollectiveError."""
    # With libtpu installed and no TPU here, jax would look for one.
    jax.config.update("jax_platforms", "cpu")
    example = "--config=configs/glip_tiny.py --topology=v5e:8x16 --images-per-chip=4"
    arguments = parse(argv, PlanArguments, "plan", example, settings=_settings(argv))
    if not arguments.topology:
        raise CommandLineError("no chips: expected --topology=v5e:8x16 (or v5litepod-64, v4-32, h100:8, ...)")
    chips = topology(arguments.topology)
    sizes = [_canvas(text, arguments.config) for text in arguments.canvas] or canvases(arguments.config)[:1]
    _check_search(arguments)
    how = _how(arguments.compile, chips)
    out = _checked(arguments.out)
    plans = _search(arguments, chips, sizes[0], how) if arguments.search else _plans(arguments, chips, sizes, how)
    if out is not None:
        out.write_text(json.dumps(plans, indent=1) + "\n")
        logger.info(f"written: {out}")
    return exit_codes.DONE


def _settings(argv: Sequence[str]) -> Config | None:
    """The settings of the checkpoint that --checkpoint names; None without it."""
    checkpoint = value_of("--checkpoint", argv)
    return open_checkpoint_or_export(checkpoint, verify=()).config if checkpoint else None


def _check_search(arguments: PlanArguments) -> None:
    """CommandLineError for a search that is none."""
    if arguments.search and len(arguments.canvas) > 1:
        raise CommandLineError(f"--search takes one --canvas, found {len(arguments.canvas)}: search for each by itself")


def plan(
    config: Config,
    chips: Topology,
    canvas: tuple[int, int],
    how: CompileMode | None,
    cache: Path | None,
    say: Callable[[str], object] = logger.info,
    images_per_core: float = IMAGES_PER_CORE,
) -> tuple[Roofline, CompileStatistics | None]:
    """The roofline of one config on one canvas, and what was compiled for it (`how` None: nothing)."""
    mesh = abstract_mesh(config, chips)
    if how is None and mesh.shape["tensor"] > 1:
        raise PlanError(
            f"mesh.tensor is {mesh.shape['tensor']}: formulas do not know what it shares out; give --compile=fake, or "
            "--config.mesh.tensor=1"
        )
    state = state_bytes(abstract_state(config, mesh), abstract_batch(config, canvas, mesh))
    statistics = compile_step(config, chips, canvas, how, cache, say) if how else None
    return roofline(config, chips, canvas, state, statistics, dict(mesh.shape), images_per_core), statistics


def _plans(
    arguments: PlanArguments, chips: Topology, sizes: list[tuple[int, int]], how: CompileMode | None
) -> list[dict[str, Any]]:
    config = arguments.config
    if arguments.images_per_chip or not _splits(config, chips):
        config = with_images_per_chip(config, arguments.images_per_chip or 1, chips)
    plans = []
    for canvas in sizes:
        found, statistics = plan(config, chips, canvas, how, _cache(arguments), _progress, arguments.images_per_core)
        scaled = scaling(chips, found)
        logger.info("\n".join(report.lines(config, chips, canvas, found, statistics, scaled, arguments.operations)))
        plans.append(report.as_dictionary(config, chips, canvas, found, statistics, scaled))
    return plans


def _splits(config: Config, chips: Topology) -> bool:
    """Whether the config's batch is one for so many chips; says so if not."""
    multiple = config.optimizer.accumulate * max(1, chips.devices // max(1, config.mesh.tensor))
    if config.train.batch_size % multiple == 0:
        return True
    logger.warning(
        f"plan: train.batch_size {config.train.batch_size} does not split over {chips.devices} chips (a multiple of "
        f"{multiple} does), and `train` would refuse it: planned with --images-per-chip=1"
    )
    return False


def _search(
    arguments: PlanArguments, chips: Topology, canvas: tuple[int, int], how: CompileMode | None
) -> list[dict[str, Any]]:
    if how is None:
        raise CommandLineError(
            f"--search wants a compiler, and none is used for {chips.name}: whether a candidate fits is known only from a "
            "compiled step; give --compile=fake, or a TPU topology"
        )
    unknown = [remat for remat in arguments.search_remat if remat not in get_args(Remat)]
    tensor = arguments.search_tensor or (arguments.config.mesh.tensor,)
    if unknown or not (arguments.search_remat and arguments.search_images and arguments.search_fsdp):
        raise CommandLineError(
            f"--search-remat={','.join(arguments.search_remat)} --search-images={arguments.search_images} "
            f"--search-fsdp={arguments.search_fsdp}: expected {', '.join(get_args(Remat))}, and numbers"
        )
    remats: Any = arguments.search_remat
    meshes = (arguments.search_fsdp, tensor)
    every = list(candidates(arguments.config, chips, arguments.search_images, remats, *meshes))
    tried = search(
        every,
        lambda config: plan(config, chips, canvas, how, _cache(arguments), _progress, arguments.images_per_core),
        logger.info,
    )
    logger.info("\n".join(["", f"{chips.name}, canvas {canvas[0]} x {canvas[1]}", *table(tried)]))
    return [dataclasses.asdict(each) for each in tried]


def _progress(line: str) -> None:
    # Progress, which a pipe of the results leaves out.
    tqdm.write(f"  {line}", file=sys.stderr)


def _cache(arguments: PlanArguments) -> Path:
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(arguments.cache) if arguments.cache else user / "glip_jax" / "plans"


def _checked(out: str) -> Path | None:
    """The file to write, whose folder is made: before minutes of compiling, not after."""
    if not out:
        return None
    if "://" in out:
        raise CommandLineError(f"--out={out}: expected the name of a local file")
    path = Path(out)
    reason = "it is a folder" if path.is_dir() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = reason or ("" if os.access(path.parent, os.W_OK) else os.strerror(errno.EACCES))
    except OSError as error:
        reason = error.strerror
    if reason:
        raise CommandLineError(f"--out={out} cannot be written ({reason}): expected the name of a file")
    return path


def _canvas(text: str, config: Config) -> tuple[int, int]:
    multiple = config.model.input.extent_multiple
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(sides) < 1 or any(side % multiple for side in sides):
        raise CommandLineError(
            f"--canvas={text}: expected HEIGHTxWIDTH in multiples of {multiple} pixels, such as 800x1344"
        )
    return sides


def _how(wanted: str, chips: Topology) -> CompileMode | None:
    """Which compiler; None for formulas alone. Says so where it is not the best one."""
    has_libtpu = _has_libtpu()
    match wanted:
        case "none":
            return None
        case "tpu" | "tpu-whole" if not chips.tpu:
            raise PlanError(f"--compile={wanted}: {chips.name} is no TPU")
        case "tpu" | "tpu-whole" if not has_libtpu:
            raise PlanError(f"--compile={wanted}: libtpu is not installed: pip install -r requirements-tpu.txt")
        case "tpu" | "tpu-whole":
            return wanted
        case "fake":
            return "fake"
        case "local":
            return "local"
    if not chips.tpu:
        return None
    if not has_libtpu:
        logger.warning(f"plan: {_NO_LIBTPU}")
    return "tpu" if has_libtpu else "fake"


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None
