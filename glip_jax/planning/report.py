"""Formats a plan: as lines of text, and as a dictionary for JSON."""

import dataclasses
from typing import Any

from glip_jax.config import Config
from glip_jax.planning.roofline import Roofline
from glip_jax.planning.statistics import CompileStatistics
from glip_jax.training.monitoring.chips import Topology

__all__ = ["as_dictionary", "lines"]

_DIFFERS = (
    "compiled for fake CPU devices: state, batch, products and collectives are those of the real step; temporaries and bytes "
    "are those of a CPU program, which has no tiles, fuses less and computes bfloat16 products in float32"
)
_FORMULA = (
    "nothing compiled: FLOPs and bytes sent are computed by formulas, and the size of activations is not known, so neither is "
    "whether the step fits (--compile=fake compiles for fake CPU devices)"
)
_TIMES = {"compute": "compute", "memory": "chip memory", "network": "network", "input": "host input"}


def as_dictionary(
    config: Config,
    chips: Topology,
    canvas: tuple[int, int],
    roofline: Roofline,
    statistics: CompileStatistics | None,
    scaled: Any,
) -> dict[str, Any]:
    """The whole plan as JSON values; seconds, bytes, FLOPs."""
    return {
        "config": config.name,
        "topology": {"name": chips.name, "chips": chips.devices, "hosts": chips.hosts, "shape": list(chips.shape)},
        "mesh": roofline.mesh,
        "remat": config.model.remat,
        "canvas": list(canvas),
        "images_per_chip": roofline.images / chips.devices,
        "roofline": dataclasses.asdict(roofline),
        "scaling": scaled,
        "compiled": dataclasses.asdict(statistics) if statistics else None,
    }


def lines(
    config: Config,
    chips: Topology,
    canvas: tuple[int, int],
    roofline: Roofline,
    statistics: CompileStatistics | None,
    scaled: Any,
    operations: int = 0,
) -> list[str]:
    """The plan as lines of text; `operations`: number of operations with the most memory traffic to list."""
    axes = ", ".join(f"{axis} {size}" for axis, size in roofline.mesh.items() if size > 1) or "one chip"
    slices = f" in {chips.slices} slices" if chips.slices > 1 else ""
    text = [
        f"{config.name} on {chips.name}: {chips.devices} chips{slices}, {chips.hosts} hosts; mesh: {axes}",
        f"{roofline.images} images a step ({roofline.images / chips.devices:g} a chip) of {canvas[0]} x {canvas[1]}, "
        f"{config.model.text.max_tokens} tokens, {config.model.dtype}, remat {config.model.remat}",
        _origin(statistics),
        "",
        *_memory(roofline, statistics),
        "",
        *_work(roofline, statistics),
        "",
        *_time(config, chips, roofline, statistics, scaled),
        "",
        *_input(roofline),
    ]
    if operations and statistics and statistics.top_operations:
        text += ["", *_operations(statistics, operations)]
    return text


def _origin(statistics: CompileStatistics | None) -> str:
    if statistics is None:
        return _FORMULA
    took = sum(statistics.seconds.values())
    times = f" ({took:.0f} s)" if took else ""
    if statistics.mode == "fake":
        return f"{_DIFFERS} ({statistics.compiler}{times})"
    until = ", without code generation" if statistics.mode == "tpu" and statistics.needed is None else ""
    return f"compiled ahead of time with {statistics.compiler}{until}{times}"


def _memory(roofline: Roofline, statistics: CompileStatistics | None) -> list[str]:
    gib = 2**30
    rows = [f"  {kind:28} {size / gib:9.3f}" for kind, size in roofline.memory.items() if kind != "peak"]
    limit = f"of {roofline.memory_limit / gib:.2f}"
    match roofline.fits:
        case True:
            verdict = f"  {'peak':28} {roofline.memory['peak'] / gib:9.3f}  {limit}: fits"
        case False if "peak" in roofline.memory:
            verdict = f"  {'peak':28} {roofline.memory['peak'] / gib:9.3f}  {limit}: does NOT fit"
        case False:
            verdict = f"  {'total':28} {sum(roofline.memory.values()) / gib:9.3f}  {limit}: does NOT fit"
        case None:
            left = roofline.memory_limit - sum(roofline.memory.values())
            verdict = f"  {'left for activations':28} {left / gib:9.3f}  {limit}: whether they fit is not known"
    if statistics is not None and statistics.needed is not None:
        verdict += f" (the compiler refuses it; the rest is computed by formulas)\n  {statistics.message[:160]}"
    return ["memory per chip, GiB", *rows, verdict]


def _work(roofline: Roofline, statistics: CompileStatistics | None) -> list[str]:
    rows = [
        f"  {'useful FLOPs':28} {roofline.useful_flops / 1e12:9.3f} T  (formula; forward {roofline.forward_flops / 1e12:.3f} T)",
        f"  {'executed':28} {roofline.hardware_flops / 1e12:9.3f} T  ({_executed(statistics)})",
    ]
    if roofline.bytes is not None and statistics is not None:
        share = (
            f", {statistics.padding / max(statistics.bytes, 1):.0%} of it padding" if statistics.mode != "fake" else ""
        )
        rows.append(f"  {'memory traffic':28} {roofline.bytes / 1e9:9.3f} GB{share}")
    if statistics is not None and statistics.undeclared_kernels:
        rows.append(
            f"  {statistics.undeclared_kernels} executions of kernels that do not declare their FLOPs: not counted"
        )
    for each in roofline.collectives:
        way = "out of the slice or host" if each.outer else "inside the slice or host"
        times = f"{each.executions} x, " if statistics is not None and statistics.needed is None else "by formula, "
        rows.append(
            f"  {each.kind:28} {each.bytes / 1e9:9.3f} GB over {' and '.join(each.axes) or 'one chip'}: {times}"
            f"{each.sent_bytes / 1e9:.3f} GB sent {way}"
        )
    if statistics is not None and not statistics.trip_counts_known:
        rows.append("  the trip count of a loop is not known: its body counts once, so the numbers above are too low")
    return ["work per chip and step", *rows]


def _executed(statistics: CompileStatistics | None) -> str:
    if statistics is None or statistics.needed is not None:
        return "formula, including recomputation"
    return f"compiled products, in bfloat16 passes; {statistics.flops / 1e12:.3f} T without passes"


def _time(
    config: Config, chips: Topology, roofline: Roofline, statistics: CompileStatistics | None, scaled: Any
) -> list[str]:
    rows = []
    for name, label in _TIMES.items():
        if name in roofline.seconds:
            mark = "  <- the bound" if name == roofline.bound else ""
            rows.append(f"  {label:28} {roofline.seconds[name]:9.4f}{mark}")
        else:
            rows.append(f"  {label:28} not known")
    rows.append(f"  {'step, no overlap':28} {roofline.step_seconds:9.4f}")
    if roofline.compiler_seconds is not None:
        rows.append(f"  {'compiler estimate, no network':28} {roofline.compiler_seconds:9.4f}  (estimated cycles)")
    if roofline.code_seconds is not None and statistics is not None:
        rows.append(
            f"  {'machine code, no network':28} {roofline.code_seconds:9.4f}  (at least, by bundles, products and bytes of each operation)"
        )
        total = sum(statistics.machine_cycles.values())
        rows += [f"    {part:26} {part_cycles / total:9.0%}" for part, part_cycles in statistics.machine_cycles.items()]
    elif statistics is not None and statistics.mode == "tpu" and statistics.needed is None:
        rows.append(
            "  not included: vector units (exponentials, norms, dropout), whose peak is not published and which may be the bound;\n"
            "  --compile=tpu-whole counts them in machine code"
        )
    rows += [
        f"at most {roofline.images_per_second:.1f} images/s, {roofline.images_per_second / chips.devices:.2f} a chip; "
        f"MFU {roofline.mfu:.1%} (useful FLOPs over peak)"
        + (f", {roofline.code_mfu:.1%} by machine code" if roofline.code_mfu is not None else ""),
        f"{config.train.steps:,} steps: {roofline.hours:.1f} h on this canvas; {roofline.mean_hours:.1f} h and "
        f"{roofline.chip_hours:,.0f} chip-hours with all canvases of the config, aspects equally frequent",
    ]
    if scaled:
        rows.append(
            f"scaling from {scaled['chips'][0]} to {scaled['chips'][1]} chips with the same images per chip: "
            f"{scaled['efficiency']:.1%} of the images/s per chip"
        )
    return ["seconds per step, from published peaks", *rows]


def _input(roofline: Roofline) -> list[str]:
    host = roofline.host
    rows = [
        f"  {'images/s required':28} {host['images/s wanted']:9.1f}",
        f"  {'images/s prepared':28} {host['images/s prepared']:9.1f}  (by data.workers or data.threads, on {host['cores']:.0f} cores)",
        f"  {'MB/s read, JPEG':28} {host['bytes/s read'] / 1e6:9.1f}",
        f"  {'MB/s to the chips':28} {host['bytes/s to chips'] / 1e6:9.1f}",
        f"  {'GB of memory required':28} {host['memory wanted'] / 1e9:9.1f}  of {host['memory'] / 1e9:.0f}",
    ]
    if host["memory wanted"] > host["memory"]:
        rows.append("  does NOT fit: lower data.prefetch, or shard the state (mesh.fsdp)")
    if roofline.bound == "input":
        rows.append("  the hosts are too slow: raise data.workers (processes) up to the number of cores")
    return ["per host", *rows]


def _operations(statistics: CompileStatistics, count: int) -> list[str]:
    rows = [
        f"the {min(count, len(statistics.top_operations))} operations with the most memory traffic, per chip and step"
    ]
    rows.append("         MB  padding    times  cycles M  operation")
    for each in statistics.top_operations[:count]:
        rows.append(
            f"  {each.bytes / 1e6:9.1f}  {each.padding / max(each.bytes, 1):6.0%}  {each.times:7}  {_cycles(each.cycles)}  "
            f"{each.opcode} {each.type[:60]}  {each.origin[-80:]}"
        )
    return rows


def _cycles(cycles: float) -> str:
    """Cycles in millions; a dash without an estimate of the compiler."""
    return f"{cycles / 1e6:8.2f}" if cycles else f"{'-':>8}"
