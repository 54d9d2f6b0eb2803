"""A plan as lines of text for people, and as a dictionary for programs."""

import dataclasses
from typing import Any

from glip_jax.config import Config
from glip_jax.distributed.chips import Topology
from glip_jax.planning.roofline import Roofline
from glip_jax.planning.statistics import CompileStatistics

__all__ = ["as_dictionary", "lines"]

_DIFFERS = (
    "compiled for made-up CPU devices: state, batch, products and collectives are the real step's; temporaries and bytes "
    "are those of a CPU's program, which has no tiles, fuses less and works out bfloat16 products in float32"
)
_FORMULA = (
    "nothing compiled: FLOPs and bytes sent are formulas, and activations are not known, so neither is whether all fits "
    "(--compile=fake compiles for made-up CPU devices instead)"
)
_TIMES = {"compute": "computing", "memory": "chip memory", "network": "network", "input": "host input"}


def as_dictionary(
    config: Config,
    chips: Topology,
    canvas: tuple[int, int],
    found: Roofline,
    facts: CompileStatistics | None,
    scaled: Any,
) -> dict[str, Any]:
    """Everything of a plan: seconds, bytes, FLOPs."""
    return {
        "config": config.name,
        "topology": {"name": chips.name, "chips": chips.devices, "hosts": chips.hosts, "shape": list(chips.shape)},
        "mesh": found.mesh,
        "remat": config.model.remat,
        "canvas": list(canvas),
        "images_per_chip": found.images / chips.devices,
        "roofline": dataclasses.asdict(found),
        "scaling": scaled,
        "compiled": dataclasses.asdict(facts) if facts else None,
    }


def lines(
    config: Config,
    chips: Topology,
    canvas: tuple[int, int],
    found: Roofline,
    facts: CompileStatistics | None,
    scaled: Any,
    operations: int = 0,
) -> list[str]:
    """The plan for a person; `operations`: how many of those that touch most memory to list."""
    axes = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1) or "one chip"
    slices = f" in {chips.slices} slices" if chips.slices > 1 else ""
    text = [
        f"{config.name} on {chips.name}: {chips.devices} chips{slices}, {chips.hosts} hosts; mesh: {axes}",
        f"{found.images} images a step ({found.images / chips.devices:g} a chip) of {canvas[0]} x {canvas[1]}, "
        f"{config.model.text.max_tokens} tokens, {config.model.dtype}, remat {config.model.remat}",
        _origin(facts),
        "",
        *_memory(found, facts),
        "",
        *_work(found, facts),
        "",
        *_time(config, chips, found, facts, scaled),
        "",
        *_input(found),
    ]
    if operations and facts and facts.hot:
        text += ["", *_operations(facts, operations)]
    return text


def _origin(facts: CompileStatistics | None) -> str:
    if facts is None:
        return _FORMULA
    took = sum(facts.seconds.values())
    times = f" ({took:.0f} s)" if took else ""
    if facts.how == "fake":
        return f"{_DIFFERS} ({facts.compiler}{times})"
    until = ", until it would write machine code" if facts.how == "tpu" and facts.needed is None else ""
    return f"compiled ahead of time with {facts.compiler}{until}{times}"


def _memory(found: Roofline, facts: CompileStatistics | None) -> list[str]:
    gib = 2**30
    rows = [f"  {kind:28} {size / gib:9.3f}" for kind, size in found.memory.items() if kind != "peak"]
    limit = f"of {found.memory_limit / gib:.2f}"
    match found.fits:
        case True:
            verdict = f"  {'peak':28} {found.memory['peak'] / gib:9.3f}  {limit}: fits"
        case False if "peak" in found.memory:
            verdict = f"  {'peak':28} {found.memory['peak'] / gib:9.3f}  {limit}: does NOT fit"
        case False:
            verdict = f"  {'together':28} {sum(found.memory.values()) / gib:9.3f}  {limit}: does NOT fit"
        case None:
            left = found.memory_limit - sum(found.memory.values())
            verdict = f"  {'left for activations':28} {left / gib:9.3f}  {limit}: not known whether they fit"
    if facts is not None and facts.needed is not None:
        verdict += f" (the compiler refuses it; what follows is by formula)\n  {facts.words[:160]}"
    return ["memory per chip, GiB", *rows, verdict]


def _work(found: Roofline, facts: CompileStatistics | None) -> list[str]:
    rows = [
        f"  {'useful FLOPs':28} {found.useful_flops / 1e12:9.3f} T  (formula; forward {found.forward_flops / 1e12:.3f} T)",
        f"  {'executed':28} {found.hardware_flops / 1e12:9.3f} T  ({_executed(facts)})",
    ]
    if found.bytes is not None and facts is not None:
        share = f", {facts.padding / max(facts.bytes, 1):.0%} of it padding" if facts.how != "fake" else ""
        rows.append(f"  {'chip memory touched':28} {found.bytes / 1e9:9.3f} GB{share}")
    if facts is not None and facts.calls:
        rows.append(f"  {facts.calls} executions of kernels that do not say how many FLOPs they take: not counted")
    for each in found.sent:
        way = "out of the slice or host" if each.outer else "inside the slice or host"
        times = f"{each.executions} x, " if facts is not None and facts.needed is None else "by formula, "
        rows.append(
            f"  {each.kind:28} {each.bytes / 1e9:9.3f} GB over {' and '.join(each.axes) or 'one chip'}: {times}"
            f"{each.sent_bytes / 1e9:.3f} GB sent {way}"
        )
    if facts is not None and not facts.known:
        rows.append(
            "  a loop's trip count is not known to the compiler: what is in it counts once, so all this is too little"
        )
    return ["work per chip and step", *rows]


def _executed(facts: CompileStatistics | None) -> str:
    if facts is None or facts.needed is not None:
        return "formula, with what is computed again"
    return f"compiled products, in bfloat16 passes; {facts.flops / 1e12:.3f} T without passes"


def _time(config: Config, chips: Topology, found: Roofline, facts: CompileStatistics | None, scaled: Any) -> list[str]:
    rows = []
    for name, label in _TIMES.items():
        if name in found.seconds:
            mark = "  <- the bound" if name == found.bound else ""
            rows.append(f"  {label:28} {found.seconds[name]:9.4f}{mark}")
        else:
            rows.append(f"  {label:28} not known")
    rows.append(f"  {'step, nothing overlapped':28} {found.step_seconds:9.4f}")
    if found.compiler_seconds is not None:
        rows.append(f"  {'by the compiler, no network':28} {found.compiler_seconds:9.4f}  (estimated cycles)")
    elif facts is not None and facts.cycles:
        rows.append(f"  the compiler estimates {facts.cycles:.3g} cycles; the clock of {chips.family} is not published")
    elif facts is not None and facts.how == "tpu" and facts.needed is None:
        rows.append(
            "  not in it: vector units (exponentials, norms, dropout), for which no peak is published and which may well be\n"
            "  the bound; --compile=tpu-whole ends with the compiler's own estimate of time"
        )
    rows += [
        f"at most {found.images_per_second:.1f} images/s, {found.images_per_second / chips.devices:.2f} a chip; "
        f"MFU {found.mfu:.1%} (useful FLOPs over peak)",
        f"{config.train.steps:,} steps: {found.hours:.1f} h on this canvas; {found.mean_hours:.1f} h and "
        f"{found.chip_hours:,.0f} chip-hours with all canvases of the config, aspects equally frequent",
    ]
    if scaled:
        rows.append(
            f"from {scaled['chips'][0]} to {scaled['chips'][1]} chips, as many images a chip: "
            f"{scaled['efficiency']:.1%} of the images/s a chip"
        )
    return ["seconds per step, from published peaks", *rows]


def _input(found: Roofline) -> list[str]:
    host = found.host
    rows = [
        f"  {'images/s wanted':28} {host['images/s wanted']:9.1f}",
        f"  {'images/s prepared':28} {host['images/s prepared']:9.1f}  (data.workers or threads, of {host['cores']:.0f} cores)",
        f"  {'MB/s read, JPEG':28} {host['bytes/s read'] / 1e6:9.1f}",
        f"  {'MB/s to the chips':28} {host['bytes/s to chips'] / 1e6:9.1f}",
        f"  {'GB of memory wanted':28} {host['memory wanted'] / 1e9:9.1f}  of {host['memory'] / 1e9:.0f}",
    ]
    if host["memory wanted"] > host["memory"]:
        rows.append("  does NOT fit: lower data.prefetch, or shard the state (mesh.fsdp)")
    if found.bound == "input":
        rows.append("  the hosts are too slow: raise data.workers (processes) up to the cores")
    return ["per host", *rows]


def _operations(facts: CompileStatistics, count: int) -> list[str]:
    rows = [f"the {min(count, len(facts.hot))} kinds of operations that touch most, per chip and step"]
    rows.append("         MB  padding    times  cycles M  operation")
    for each in facts.hot[:count]:
        rows.append(
            f"  {each.bytes / 1e6:9.1f}  {each.padding / max(each.bytes, 1):6.0%}  {each.times:7}  {_cycles(each.cycles)}  "
            f"{each.opcode} {each.type[:60]}  {each.origin[-80:]}"
        )
    return rows


def _cycles(cycles: float) -> str:
    """In millions; a dash where the compiler gave no estimate."""
    return f"{cycles / 1e6:8.2f}" if cycles else f"{'-':>8}"
