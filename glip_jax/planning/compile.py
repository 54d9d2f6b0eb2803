"""Compiles the real training step ahead of time for chips that are not present, and collects statistics of the program.

Four modes: `tpu` compiles with libtpu, which needs no TPU, without code generation; `tpu-whole` includes it; `fake` compiles
for as many fake CPU devices as the topology has chips; `local` for the GPUs of this machine, if there are as many. The
compiler runs in a process of its own, because it reads its settings from the environment once, may abort the process, and
uses gigabytes of memory. Results are cached in a folder under a key of everything that they depend on.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import glip_jax
from glip_jax import UserError
from glip_jax.config import Config, flatten
from glip_jax.distributed.mesh import MeshError, batch_sharding, check_fits, make_mesh
from glip_jax.distributed.runtime import libtpu_arguments
from glip_jax.io.processes import end_with_parent
from glip_jax.planning import cost, machine_code
from glip_jax.planning.hlo import collectives
from glip_jax.planning.statistics import CollectiveTraffic, CompileMode, CompileStatistics, TopOperation
from glip_jax.planning.xla_dump import activation_bytes, compile_until_assignment, dump_options
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.structures.canvas import PATCH
from glip_jax.structures.descriptions import DescriptionTable
from glip_jax.training.monitoring.chips import Topology
from glip_jax.training.state import State, abstract_state
from glip_jax.training.step import glip_objective, make_step

__all__ = [
    "PlanError",
    "abstract_batch",
    "abstract_mesh",
    "cached",
    "compile_step",
    "devices_of",
    "environment",
    "state_bytes",
]


class PlanError(UserError, ValueError):
    """The step cannot be planned; the message is one line with the reason and what to do."""


def abstract_batch(config: Config, canvas: tuple[int, int], mesh: Mesh) -> Batch:
    """Shapes and shardings of a global batch of `config.train.batch_size` images on a canvas (height, width)."""
    tokens, slots = config.model.text.max_tokens, config.data.max_boxes
    image = (canvas[0] // PATCH, canvas[1] // PATCH, 3 * PATCH**2) if config.model.patches else (*canvas, 3)
    integer, real, flag = jnp.int32, jnp.float32, jnp.bool_
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": (image, jnp.uint8), "size": ((2,), integer), "extent": ((2,), integer),
        "tokens": ((tokens,), integer), "token_mask": ((tokens,), flag), "boxes": ((slots, 4), real),
        "box_mask": ((slots,), flag), "box_weight": ((slots,), real), "positive_map": ((slots, tokens), flag),
        "token_loss_mask": ((tokens,), flag), "valid": ((), flag), "source": ((), integer), "record": ((), integer),
        "dropped": ((len(DROPS),), integer),
    }  # fmt: skip
    kinds |= {"described": ((tokens,), integer)} if config.reads_descriptions else {}
    size, sharding = config.train.batch_size, batch_sharding(mesh)
    return Batch(
        **{n: jax.ShapeDtypeStruct((size, *shape), kind, sharding=sharding) for n, (shape, kind) in kinds.items()}
    )


@dataclass(frozen=True)
class _StandInDevice:
    """Stand-in for a device of which only id and process are used."""

    id: int
    process_index: int
    slice_index: int = 0


def abstract_mesh(config: Config, topology: Topology) -> Mesh:
    """The mesh over stand-ins for the topology's chips. Raises MeshError if chips, axes and batch do not match."""
    within = topology.devices // topology.slices
    devices = [_StandInDevice(i, i // topology.chip.chips, i // within) for i in range(topology.devices)]
    mesh = make_mesh(config.mesh, devices)
    check_fits(config, mesh)
    return mesh


def state_bytes(state: State, batch: Batch) -> dict[str, float]:
    """Bytes per chip of parameters, optimizer state, averages (EMA) and batch, unpadded, by their shardings."""

    def total(tree: Any) -> float:
        leaves = jax.tree.leaves(tree)
        return float(sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))

    return {
        "parameters": total(state.params),
        "optimizer": total(state.optimizer),
        "averages": total(state.ema),
        "batch": total(batch),
    }


def compile_step(
    config: Config,
    topology: Topology,
    canvas: tuple[int, int],
    mode: CompileMode,
    cache: Path | None,
    progress: Callable[[str], object] = print,
    program_path: Path | None = None,
) -> CompileStatistics:
    """Compiles the step of `config` for all chips of `topology` and returns its statistics, from `cache` if they are there.

    `progress` receives a line at least twice a minute. `program_path`: file for the text of the compiled program. Raises
    PlanError if the compiler is not installed, or fails for another reason than lack of memory.
    """
    path = cache / f"{_key(config, topology, canvas, mode)}.json" if cache else None
    if cache and program_path is None and (hit := cached(config, topology, canvas, mode, cache)):
        return hit
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # Owned by the parent, which outlives a killed child; a compiler may write 100 MB into it.
    with tempfile.TemporaryDirectory(prefix="glip_jax_plan", ignore_cleanup_errors=True) as scratch:
        before = dict(os.environ)
        os.environ.update(environment(topology, mode))
        if mode == "tpu-whole":
            dumps = machine_code.dump_arguments(Path(scratch) / "code")
            os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ["LIBTPU_INIT_ARGS"], *dumps])
        try:
            child = context.Process(
                target=_run_child, args=(sender, config, topology, canvas, mode, str(program_path or ""), scratch)
            )
            child.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        sender.close()
        try:
            result = _wait_for_result(receiver, progress)
        finally:
            child.kill()
            child.join()
        if result is None:
            log = (Path(scratch) / "log").read_bytes() if (Path(scratch) / "log").exists() else b""
            output = [line for line in log.decode(errors="replace").splitlines() if line.strip()]
            raise PlanError(
                f"the compiler of {topology.name} ended without a result (exit code {child.exitcode}); its last line of output: "
                f"{output[-1][:300] if output else 'none'}"
            )
    kind, value = result
    if kind == "failed":
        raise PlanError(value)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(value), indent=1))
        partial.replace(path)
    return value


def cached(
    config: Config, topology: Topology, canvas: tuple[int, int], mode: CompileMode, cache: Path
) -> CompileStatistics | None:
    """Statistics that `compile_step` has cached with this code and these versions; None if there are none."""
    # A result with code generation has everything that one without has.
    modes: tuple[CompileMode, ...] = ("tpu-whole", "tpu") if mode == "tpu" else (mode,)
    paths = [cache / f"{_key(config, topology, canvas, each)}.json" for each in modes]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    raw = json.loads(path.read_text())
    raw["collectives"] = tuple(
        CollectiveTraffic(**{**each, "axes": tuple(each["axes"])}) for each in raw["collectives"]
    )
    raw["top_operations"] = tuple(TopOperation(**each) for each in raw["top_operations"])
    return CompileStatistics(**raw)


def _wait_for_result(receiver: Connection, progress: Callable[[str], object]) -> tuple[str, Any] | None:
    """The child's result; None if the child ended without one."""
    begin, stage = time.monotonic(), "starting"
    while True:
        try:
            if receiver.poll(30):
                kind, value = receiver.recv()
                if kind != "stage":
                    return kind, value
                stage = value
        except (EOFError, ConnectionError):
            return None
        minutes, seconds = divmod(int(time.monotonic() - begin), 60)
        progress(f"{stage}, {minutes} min {seconds:02d} s")


def _key(config: Config, topology: Topology, canvas: tuple[int, int], mode: CompileMode) -> str:
    """Hash of everything that the statistics depend on: settings of the step, topology, canvas, code, versions."""
    parts = {name: getattr(config, name) for name in ("model", "loss", "optimizer", "mesh")}
    settings = [[section, *pair] for section, part in parts.items() for pair in flatten(part)]
    code = hashlib.sha256()
    root = Path(glip_jax.__file__).parent
    packages = ("models/**/*.py", "structures/*.py", "training/*.py", "distributed/mesh.py")
    planning = (
        "planning/compile.py",
        "planning/cost.py",
        "planning/hlo.py",
        "planning/machine_code.py",
        "planning/statistics.py",
        "planning/xla_dump.py",
    )
    for file in sorted(path for pattern in (*packages, *planning) for path in root.glob(pattern)):
        code.update(file.read_bytes())
    extent = [config.train.batch_size, config.data.max_boxes, sorted(config.data.sources)]
    whole = [
        settings,
        extent,
        topology.family,
        topology.shape,
        topology.slices,
        canvas,
        mode,
        _compiler(mode),
        code.hexdigest(),
    ]
    return hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()[:32]


def _compiler(mode: CompileMode) -> str:
    name = "libtpu" if mode in ("tpu", "tpu-whole") else "jaxlib"
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def environment(topology: Topology, mode: CompileMode) -> dict[str, str]:
    """Environment variables of a compiler: with them libtpu does not look for a TPU, and several processes can compile."""
    if mode == "local":
        return {}
    values = {"JAX_PLATFORMS": "cpu"}
    if mode in ("tpu", "tpu-whole"):
        values |= {
            "LIBTPU_INIT_ARGS": libtpu_arguments(os.environ.get("LIBTPU_INIT_ARGS", "")),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": f"{topology.family}-{topology.devices}".replace("v5e", "v5litepod"),
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        return values
    kept = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    # The machine code is never run, so it is not optimized.
    unoptimized = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    values["XLA_FLAGS"] = f"{kept} {unoptimized} --xla_force_host_platform_device_count={topology.devices}".strip()
    return values


# --- in the process of the compiler -------------------------------------------------------------------------------------


def _run_child(
    pipe: Connection,
    config: Config,
    topology: Topology,
    canvas: tuple[int, int],
    mode: CompileMode,
    keep: str,
    scratch: str,
) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # File descriptors, so that output of C++ libraries is redirected too.
    with (Path(scratch) / "log").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        pipe.send(("done", _statistics(pipe, config, topology, canvas, mode, keep, Path(scratch))))
    except (PlanError, MeshError) as fault:
        pipe.send(("failed", str(fault)))
    except Exception as fault:
        traceback.print_exc()
        pipe.send(("failed", f"{topology.name}: {type(fault).__name__}: {str(fault).strip().splitlines()[0][:300]}"))


def devices_of(topology: Topology, mode: CompileMode) -> list[Any]:
    """The devices to compile for; PlanError where this machine or this compiler has none such."""
    if mode not in ("tpu", "tpu-whole"):
        devices = jax.devices()
        if mode == "local" and devices[0].platform != "gpu":
            raise PlanError(
                f"{topology.name}: --compile=local is for a machine with such GPUs, found {devices[0].platform}s: "
                "leave it out for a plan by formulas"
            )
        if len(devices) < topology.devices:
            raise PlanError(f"{topology.name}: found {len(devices)} devices, expected {topology.devices}")
        return devices[: topology.devices]
    from jax.experimental import topologies

    # The smallest slice is a host of four chips; for fewer chips its first ones are used.
    name = topology.compiler_name
    if topology.devices < 4 * topology.chip.parts:
        name = f"{topology.family}:{'2x2' if topology.chip.dimensions == 2 else '2x2x1'}"
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.family == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip form one device, as in JAX on a v4
    try:
        description = topologies.get_topology_desc(name, "tpu", **options)
    except Exception as fault:
        raise PlanError(
            f"{topology.name}: {_compiler(mode)} has no such slice: {str(fault).strip().splitlines()[0][:200]}"
        ) from None
    return list(description.devices)[: topology.devices]


def _statistics(
    pipe: Connection,
    config: Config,
    topology: Topology,
    canvas: tuple[int, int],
    mode: CompileMode,
    keep: str,
    scratch: Path,
) -> CompileStatistics:
    # A program from the persistent cache is not compiled, so no dumps would be written.
    jax.config.update("jax_enable_compilation_cache", False)
    if mode != "local":
        jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(config.mesh, devices_of(topology, mode))
    check_fits(config, mesh)
    state, batch = abstract_state(config, mesh), abstract_batch(config, canvas, mesh)
    # The file is where the run will be; the number of its names changes little.
    table = DescriptionTable(np.zeros((2, config.model.text.width), np.float32), np.zeros(2, np.float32))
    step: Any = make_step(
        config, mesh, glip_objective(config, descriptions=table), state, tuple(sorted(config.data.sources))
    )
    pipe.send(("stage", f"tracing the step for {topology.devices} chips"))
    begin = time.monotonic()
    with jax.set_mesh(mesh):  # Pallas kernels for TPUs look up the chip
        lowered = step.lower(state, batch)
    middle = time.monotonic()
    pipe.send(("stage", f"compiling the step with {_compiler(mode)}"))
    try:
        if mode == "tpu":
            text, memory = compile_until_assignment(lowered, scratch / "dump")
        else:
            compiled = lowered.compile(compiler_options=dump_options(scratch / "dump"))
            text, analysis = compiled.as_text() or "", compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as fault:
        needed, available = _memory_shortage(str(fault))
        if needed is None:
            raise
        return CompileStatistics(mode, _compiler(mode), needed, available, " ".join(str(fault).split())[:400])
    seconds = {"trace": middle - begin, "compile": time.monotonic() - middle}
    pipe.send(("stage", "reading the compiled program"))
    if keep:
        Path(keep).write_text(text)
    if mode == "tpu":
        sizes: dict[str, Any] = {
            "arguments": memory.arguments,
            "outputs": memory.others,
            "temporaries": memory.temporaries,
        }
    else:
        sizes = {
            "arguments": float(analysis.argument_size_in_bytes),
            "outputs": float(analysis.output_size_in_bytes),
            "aliased": float(analysis.alias_size_in_bytes),
            "temporaries": float(analysis.temp_size_in_bytes),
            "code": float(analysis.generated_code_size_in_bytes),
        }
    sizes["activations"] = activation_bytes(scratch / "dump")
    program = cost.program_cost(text)
    parts: dict[str, float] = {}
    counted = [0.0] * len(program.operations)
    if mode == "tpu-whole" and topology.chip.clock:
        pipe.send(("stage", "counting cycles in machine code"))
        counted = machine_code.cycles_of(
            program.operations, scratch / "code", topology.chip.flops / topology.chip.clock,
            topology.chip.bandwidth / topology.chip.clock,
        )  # fmt: skip
        parts = machine_code.cycles_by_part(program.operations, counted)
    return CompileStatistics(
        mode,
        _compiler(mode),
        **sizes,
        flops=program.flops,
        passes=program.passes,
        bytes=program.bytes,
        padding=program.padding,
        # Most operations have no estimate before code generation.
        cycles=0.0 if mode == "tpu" else program.cycles,
        machine_cycles=parts,
        trip_counts_known=program.trip_counts_known,
        undeclared_kernels=program.undeclared_kernels,
        collectives=_collective_traffic(text, mesh, topology),
        top_operations=_top_operations(program, counted),
        seconds=seconds,
    )


def _memory_shortage(message: str) -> tuple[float | None, float | None]:
    """(bytes needed, bytes available) from a compiler's out-of-memory message; None for other messages."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    size = r"([\d.]+)\s*([KMGT]?)"
    for pattern in (
        rf"Used {size}i?B? of {size}i?B? hbm",
        rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)",
    ):
        if found := re.search(pattern, message):
            return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
    return None, None


def _collective_traffic(text: str, mesh: Mesh, topology: Topology) -> tuple[CollectiveTraffic, ...]:
    """The program's collectives, summed by kind, axes and whether they span slices (GPUs: hosts)."""
    within = topology.devices // topology.slices if topology.tpu else topology.chip.chips
    sums: dict[tuple[str, tuple[str, ...], bool], list[float]] = {}
    for each in collectives(text):
        outer = each.across_slices or any(len({device // within for device in group}) > 1 for group in each.groups)
        # Slices are arranged along `data`, the first axis of the mesh.
        axes = ("data",) if each.across_slices else each.axes(mesh.shape)
        sent = each.sent_across(topology.slices) if each.across_slices else each.sent_bytes
        total = sums.setdefault((each.kind, axes, outer), [0, 0.0, 0.0])
        for index, value in enumerate((1, each.bytes, sent)):
            total[index] += each.times * value
    ordered = sorted(sums.items(), key=lambda item: -item[1][2])
    return tuple(
        CollectiveTraffic(kind, axes, int(n), float(size), float(sent), outer)
        for (kind, axes, outer), (n, size, sent) in ordered
    )


def _top_operations(program: cost.ProgramCost, counted: Sequence[float], count: int = 40) -> tuple[TopOperation, ...]:
    """The operations with the most memory traffic, the largest results and the most cycles by machine code (`counted`); equal ones are summed."""
    groups: dict[tuple[str, str, str], list[cost.Operation]] = {}
    machine: Counter[tuple[str, str, str]] = Counter()
    for each, cycles in zip(program.operations, counted, strict=True):
        key = (each.opcode, each.type[:200], each.origin)
        groups.setdefault(key, []).append(each)
        machine[key] += cycles  # pyright: ignore[reportArgumentType]
    operations = [
        TopOperation(
            opcode,
            kind,
            origin,
            max(each.result_bytes for each in group),
            sum(each.bytes * each.times for each in group),
            sum(each.padding * each.times for each in group),
            sum(each.flops * each.times for each in group),
            float(sum(each.cycles * each.times for each in group)),
            sum(each.times for each in group),
            machine[opcode, kind, origin],
        )
        for (opcode, kind, origin), group in groups.items()
    ]
    by_bytes = sorted(operations, key=lambda each: -each.bytes)[:count]
    largest = sorted(operations, key=lambda each: -each.result_bytes)[: count // 2]
    slowest = sorted((each for each in operations if each.machine_cycles), key=lambda each: -each.machine_cycles)[
        :count
    ]
    return tuple(dict.fromkeys([*by_bytes, *largest, *slowest]))
