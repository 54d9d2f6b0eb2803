"""Roofline model of a training step: times from its FLOPs, memory traffic and collectives and from published peaks.

The model assumes no overlap on the device: a step takes the longer of compute and memory time, plus the network time. The
hosts prepare the next batch in the meantime; if that takes longer, it bounds the step. Real steps are slower than any
roofline, so images per second are an upper bound, and the largest of the four times is what to optimize.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from glip_jax.config import Config
from glip_jax.planning.statistics import CollectiveTraffic, CompileStatistics
from glip_jax.structures.canvas import canvas_size
from glip_jax.training.monitoring.chips import Topology
from glip_jax.training.monitoring.flops import Flops, flops_per_image

__all__ = [
    "IMAGES_PER_CORE",
    "JPEG_BYTES",
    "Roofline",
    "formula_sent",
    "hardware_flops",
    "mean_share",
    "roofline",
    "scaling",
]

IMAGES_PER_CORE = 200.0
"""Images per second that a core prepares, JPEG to batch at 800 x 1333 (benchmarks/RESULTS.md: 280 on one core, 468 on two)."""
JPEG_BYTES = 163e3
"""Mean size of a COCO image."""
_PROGRAM = 0.5 * 2**30
"""Memory reserved for the program if no code was generated; that of GLIP-T's step has 0.39 GiB (benchmarks/RESULTS.md)."""
_SYSTEM = 0.25 * 2**30
"""Memory of a chip that the TPU runtime reserves: 15.75 of 16 GiB are available on a v5e; assumed for other chips."""
_PROCESS_BYTES = 4e9
"""Host memory of a training process: Python, JAX, the compiler."""


@dataclass(frozen=True)
class Roofline:
    """A plan for one canvas size. Seconds are per step, bytes and FLOPs per chip and step unless stated otherwise."""

    mesh: dict[str, int]
    """Sizes of the mesh axes."""
    images: int
    """Images per step, over all chips."""
    fits: bool | None
    """Whether the step fits into memory; None: not known, because nothing was compiled."""
    memory: dict[str, float]
    """Bytes by kind: parameters, optimizer, averages (EMA), batch; if compiled also padding, activations, temporaries, program, peak."""
    memory_limit: float
    useful_flops: float
    """By formula: forward and backward pass without recomputation."""
    forward_flops: float
    hardware_flops: float
    """Executed FLOPs in bfloat16 passes: those of the compiled program, or the formula including recomputation."""
    bytes: float | None
    collectives: tuple[CollectiveTraffic, ...]
    seconds: dict[str, float]
    """By resource: compute, memory (missing if not known), network, input."""
    bound: str
    """The resource with the longest time."""
    step_seconds: float
    images_per_second: float
    mfu: float
    """Model FLOPs utilization: useful FLOPs divided by the peak FLOPs of the step's time."""
    compiler_seconds: float | None
    """The compiler's estimate of the step without network; None without an estimate or a published clock."""
    code_seconds: float | None
    """What the machine code of the step takes at least, without network (`machine_code.cycles_by_part`); None without machine code."""
    code_mfu: float | None
    """Useful FLOPs divided by the peak FLOPs of that time and the network's."""
    hours: float
    """Hours of the whole schedule, if every step had this canvas size."""
    mean_hours: float
    """Hours of the whole schedule over all canvas sizes, with times proportional to FLOPs and equally frequent aspects."""
    chip_hours: float
    """`mean_hours` times the number of chips."""
    host: dict[str, float]
    """Per host: images/s required ("wanted") and prepared, bytes/s read (JPEG) and sent to the chips, bytes of memory."""


def roofline(
    config: Config,
    chips: Topology,
    canvas: tuple[int, int],
    state: dict[str, float],
    statistics: CompileStatistics | None,
    mesh: dict[str, int],
    images_per_core: float = IMAGES_PER_CORE,
) -> Roofline:
    """Computes the roofline of `config` on `chips`.

    `state`: bytes per chip by kind; `statistics`: of the compiled step, None to use formulas only; `mesh`: axis sizes;
    `images_per_core`: images per second that a core of a host prepares.
    """
    chip, devices = chips.chip, chips.devices
    images = config.train.batch_size
    images_per_chip = images / devices
    flops = flops_per_image(config.model, *canvas)
    compiled = statistics is not None and statistics.needed is None
    passes = statistics.passes if statistics and compiled else hardware_flops(config, flops) * images_per_chip
    traffic = statistics.collectives if statistics and compiled else formula_sent(state, mesh, chips)
    seconds = {"compute": passes / chip.flops}
    if statistics and compiled:
        seconds["memory"] = statistics.bytes / chip.bandwidth
    seconds["network"] = _network(traffic, chips)
    host = _host(config, chips, canvas, state, images_per_core)
    seconds["input"] = host.pop("images") / host["images/s prepared"]
    device = max(seconds["compute"], seconds.get("memory", 0.0)) + seconds["network"]
    step = max(device, seconds["input"])
    cycles = sum(statistics.machine_cycles.values()) if statistics and compiled else 0.0
    code = cycles / chip.clock if cycles else None
    host = {"images/s wanted": images / chips.hosts / device, **host}
    host["bytes/s read"] = images / chips.hosts / step * JPEG_BYTES
    host["bytes/s to chips"] = images / chips.hosts / step * math.prod(canvas) * 3
    limit = (
        statistics.available if statistics and statistics.available else chip.memory - (_SYSTEM if chips.tpu else 0.0)
    )
    memory, fits = _memory(state, statistics, limit)
    hours = config.train.steps * step / 3600
    mean = hours * mean_share(config, canvas)
    return Roofline(
        mesh=mesh,
        images=images,
        fits=fits,
        memory=memory,
        memory_limit=limit,
        useful_flops=flops.training * images_per_chip,
        forward_flops=flops.forward * images_per_chip,
        hardware_flops=passes,
        bytes=statistics.bytes if statistics and compiled else None,
        collectives=traffic,
        seconds=seconds,
        bound=max(seconds, key=lambda name: seconds[name]),
        step_seconds=step,
        images_per_second=images / step,
        mfu=flops.training * images_per_chip / (step * chip.flops),
        compiler_seconds=statistics.cycles / chip.clock if statistics and statistics.cycles and chip.clock else None,
        code_seconds=code,
        code_mfu=flops.training * images_per_chip / ((code + seconds["network"]) * chip.flops) if code else None,
        hours=hours,
        mean_hours=mean,
        chip_hours=mean * devices,
        host=host,
    )


def hardware_flops(config: Config, flops: Flops) -> float:
    """Executed FLOPs of one image by formula: training plus recomputation in the backward pass.

    The attention of the fusion is always recomputed; with model.remat=blocks, the blocks of all parts are recomputed too, with kernels
    without fusion and deformable convolutions.
    """
    recomputed = flops.parts["fusion"]
    blocks = {"blocks": ("text", "fusion", "head_text", "dynamic"), "kernels": ("text", "head_text")}
    if config.model.remat in blocks:
        recomputed += sum(flops.parts[part] for part in blocks[config.model.remat])
        recomputed += flops.parts["backbone"] if config.model.backbone.kind == "swin" else 0.0
    return flops.training + recomputed


def formula_sent(state: dict[str, float], mesh: dict[str, int], chips: Topology) -> tuple[CollectiveTraffic, ...]:
    """The minimum collective traffic of a step: gradients are all-reduced over `data`; over `fsdp`, parameters are
    all-gathered once and gradients reduce-scattered (`glip_jax.distributed.mesh`).

    Gradients and parameters are float32. The trained parameters are as large as their averages; where no averages are kept, all
    parameters are taken to be trained.
    """
    data, fsdp = mesh["data"], mesh["fsdp"]
    shard, trained = state["parameters"], state["averages"] or state["parameters"]
    within = chips.devices // chips.slices if chips.tpu else chips.chip.chips
    sent = []
    # An all-reduce over slices (GPUs: hosts) has three steps: reduce-scatter inside, all-reduce of each chip's share between
    # them, all-gather inside.
    outside = min(data, max(1, chips.devices // within))
    inside = data // outside
    if inside > 1:
        sent.append(CollectiveTraffic("all-reduce", ("data",), 1, trained, 2 * (inside - 1) / inside * trained, False))
    if outside > 1:
        share = trained / inside
        sent.append(CollectiveTraffic("all-reduce", ("data",), 1, share, 2 * (outside - 1) / outside * share, True))
    if fsdp > 1:
        outer = fsdp * mesh["tensor"] > within
        share = (fsdp - 1) / fsdp
        sent.append(CollectiveTraffic("all-gather", ("fsdp",), 1, shard * fsdp, share * shard * fsdp, outer))
        sent.append(CollectiveTraffic("reduce-scatter", ("fsdp",), 1, trained * fsdp, share * trained * fsdp, outer))
    return tuple(sent)


def mean_share(config: Config, canvas: tuple[int, int]) -> float:
    """Mean FLOPs of an image over all canvas sizes of the config, relative to one on `canvas`."""
    data = config.data
    multiple = config.model.input.extent_multiple
    sizes = [
        canvas_size(side, aspect, data.long_side, multiple) for side in data.short_sides for aspect in data.aspects
    ]
    each = [flops_per_image(config.model, *size).training for size in sizes]
    return sum(each) / len(each) / flops_per_image(config.model, *canvas).training


def scaling(chips: Topology, plan: Roofline, sizes: tuple[int, int] = (16, 256)) -> dict[str, Any] | None:
    """Weak scaling: images per second and chip on sizes[1] chips relative to sizes[0] chips, each a single slice.

    Traffic of `plan` over `data` alone is scaled by (n-1)/n, other traffic is unchanged; link speeds are those of `chips`.
    Returns None where this does not apply: no TPUs, several slices, no data axis, or sizes that the other axes do not
    divide.
    """
    data_size = plan.mesh["data"]
    others = chips.devices // data_size
    if not chips.tpu or chips.slices > 1 or data_size < 2 or any(size % others for size in sizes):
        return None
    steps = []
    for size in sizes:
        scaled_size = size // others
        factor = ((scaled_size - 1) / scaled_size) / ((data_size - 1) / data_size)
        scaled = [
            dataclasses.replace(each, sent_bytes=each.sent_bytes * (factor if each.axes == ("data",) else 1.0))
            for each in plan.collectives
        ]
        device = max(plan.seconds["compute"], plan.seconds.get("memory", 0.0)) + _network(tuple(scaled), chips)
        steps.append(max(device, plan.seconds["input"]))
    return {"chips": list(sizes), "step_seconds": steps, "efficiency": steps[0] / steps[1]}


def _network(sent: tuple[CollectiveTraffic, ...], chips: Topology) -> float:
    """Seconds that a chip sends, first inside a slice (or host), then between slices (or hosts)."""
    inner = sum(each.sent_bytes for each in sent if not each.outer)
    outer = sum(each.sent_bytes for each in sent if each.outer)
    return (inner / chips.link if inner else 0.0) + (outer / chips.outer_link if outer else 0.0)


def _memory(
    state: dict[str, float], statistics: CompileStatistics | None, limit: float
) -> tuple[dict[str, float], bool | None]:
    """Bytes per chip by kind, and whether they fit into `limit`."""
    memory = dict(state)
    if statistics is None:
        return memory, None if sum(state.values()) <= limit else False
    if statistics.needed is None:
        if statistics.activations is None:
            kept = {"activations and temporaries": statistics.temporaries}
        else:
            kept = {
                "activations": statistics.activations,
                "temporaries": statistics.temporaries - statistics.activations,
            }
        memory |= {
            "padding of these": max(0.0, statistics.arguments - sum(state.values())),
            **kept,
            "program" if statistics.code is not None else "program, allowed for": _PROGRAM
            if statistics.code is None
            else statistics.code,
        }
        # Results that do not reuse the memory of arguments: the step's metrics.
        memory["outputs"] = statistics.outputs - statistics.aliased
    memory["peak"] = statistics.peak + (_PROGRAM if statistics.needed is None and statistics.code is None else 0.0)
    return memory, statistics.needed is None and memory["peak"] <= limit


def _host(
    config: Config, chips: Topology, canvas: tuple[int, int], state: dict[str, float], images_per_core: float
) -> dict[str, float]:
    """Rates and memory of a host; `images`: per step."""
    data, chip = config.data, chips.chip
    images = config.train.batch_size / chips.hosts
    cores = min(chip.host_cores, data.workers or data.threads)
    image_bytes = math.prod(canvas) * 3
    host_chips = min(chip.chips, chips.devices)
    # While a checkpoint is written, host memory holds a copy of the state of all its chips.
    copy = host_chips * (state["parameters"] + state["optimizer"] + state["averages"])
    return {
        "images": images,
        "images/s prepared": cores * images_per_core,
        "memory wanted": (data.prefetch + 2) * images * image_bytes + copy + _PROCESS_BYTES,
        "memory": chip.host_memory,
        "cores": float(chip.host_cores),
    }
