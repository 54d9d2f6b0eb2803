"""From what a step computes, touches and sends to seconds, images and hours: arithmetic on published peaks.

A roofline without overlap: a step takes the longer of computing and memory, and after that the network; the hosts prepare
the next batch meanwhile, and if that takes longer it is what counts. Real steps are slower than any roofline, so the
images per second here are what cannot be passed, and the largest of the four times says what to work on.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from glip_jax.config import Config
from glip_jax.distributed.chips import Topology
from glip_jax.models.flops import Flops, flops_per_image
from glip_jax.planning.statistics import CollectiveTraffic, CompileStatistics
from glip_jax.structures.canvas import canvas_size

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
"""From JPEG to batch at 800 x 1333 (benchmarks/RESULTS.md: 280 a second on one core, 468 on two)."""
JPEG_BYTES = 163e3
"""Of a picture of COCO, mean."""
_PROGRAM = 0.5 * 2**30
"""Kept free for a program that was not written; GLIP-T's step has 0.39 GiB (benchmarks/RESULTS.md)."""
_SYSTEM = 0.25 * 2**30
"""What a TPU's system keeps of a chip's memory: libtpu offers programs 15.75 of a v5e's 16 GiB; of the others it is assumed."""
_PROCESS_BYTES = 4e9
"""A training process on a host: Python, jax, the compiler's working memory."""


@dataclass(frozen=True)
class Roofline:
    """Of steps on one canvas. Seconds are of one step, bytes and FLOPs of one chip unless said otherwise."""

    mesh: dict[str, int]
    """Sizes of its axes."""
    images: int
    """Of a step, over all chips."""
    fits: bool | None
    """None: not known, because nothing was compiled."""
    memory: dict[str, float]
    """Bytes by kind: parameters, optimizer, averages, batch, then padding, activations, temporaries, program, peak where compiled."""
    memory_limit: float
    useful_flops: float
    """By formula, forward and backward, nothing computed twice."""
    forward_flops: float
    hardware_flops: float
    """What is executed, in passes of bfloat16: the compiler's products, or the formula with what is computed again."""
    bytes: float | None
    sent: tuple[CollectiveTraffic, ...]
    seconds: dict[str, float]
    """compute, memory (absent if not known), network, input."""
    bound: str
    """The longest of these."""
    step_seconds: float
    images_per_second: float
    mfu: float
    """Useful FLOPs over what the chips could do in that time."""
    compiler_seconds: float | None
    """The compiler's own estimate of a step without network, where it gives one and the clock is known."""
    hours: float
    """For the whole schedule, if every step had this canvas."""
    mean_hours: float
    """With the time of the other canvases in proportion to their FLOPs, aspects equally frequent."""
    chip_hours: float
    """`mean_hours` of all chips."""
    host: dict[str, float]
    """Per host: images/s wanted and prepared, bytes/s read (JPEG) and sent to the chips, bytes of memory."""


def roofline(
    config: Config,
    chips: Topology,
    canvas: tuple[int, int],
    state: dict[str, float],
    facts: CompileStatistics | None,
    mesh: dict[str, int],
    images_per_core: float = IMAGES_PER_CORE,
) -> Roofline:
    """The roofline of `config` on `chips`; `state`: bytes per chip by kind; `facts` None: formulas alone; `mesh`: axis sizes."""
    chip, devices = chips.chip, chips.devices
    images = config.train.batch_size
    own = images / devices
    flops = flops_per_image(config.model, *canvas)
    compiled = facts is not None and facts.needed is None
    passes = facts.passes if facts and compiled else hardware_flops(config, flops) * own
    sent = facts.sent if facts and compiled else formula_sent(state, mesh, chips)
    seconds = {"compute": passes / chip.flops}
    if facts and compiled:
        seconds["memory"] = facts.bytes / chip.bandwidth
    seconds["network"] = _network(sent, chips)
    host = _host(config, chips, canvas, state, images_per_core)
    seconds["input"] = host.pop("images") / host["images/s prepared"]
    device = max(seconds["compute"], seconds.get("memory", 0.0)) + seconds["network"]
    step = max(device, seconds["input"])
    host = {"images/s wanted": images / chips.hosts / device, **host}
    host["bytes/s read"] = images / chips.hosts / step * JPEG_BYTES
    host["bytes/s to chips"] = images / chips.hosts / step * math.prod(canvas) * 3
    limit = facts.available if facts and facts.available else chip.memory - (_SYSTEM if chips.tpu else 0.0)
    memory, fits = _memory(state, facts, limit)
    hours = config.train.steps * step / 3600
    mean = hours * mean_share(config, canvas)
    return Roofline(
        mesh=mesh,
        images=images,
        fits=fits,
        memory=memory,
        memory_limit=limit,
        useful_flops=flops.training * own,
        forward_flops=flops.forward * own,
        hardware_flops=passes,
        bytes=facts.bytes if facts and compiled else None,
        sent=sent,
        seconds=seconds,
        bound=max(seconds, key=lambda name: seconds[name]),
        step_seconds=step,
        images_per_second=images / step,
        mfu=flops.training * own / (step * chip.flops),
        compiler_seconds=facts.cycles / chip.clock if facts and facts.cycles and chip.clock else None,
        hours=hours,
        mean_hours=mean,
        chip_hours=mean * devices,
        host=host,
    )


def hardware_flops(config: Config, flops: Flops) -> float:
    """Operations of one image that are executed, by formula: training, and what the backward pass computes again.

    The fusion's attention is computed again always; with model.remat=blocks the blocks of all parts are, once more.
    """
    again = flops.parts["fusion"]
    if config.model.remat == "blocks":
        blocks = ("text", "fusion", "head_text", "dynamic")
        again += sum(flops.parts[part] for part in blocks)
        again += flops.parts["backbone"] if config.model.backbone.kind == "swin" else 0.0
    return flops.training + again


def formula_sent(state: dict[str, float], mesh: dict[str, int], chips: Topology) -> tuple[CollectiveTraffic, ...]:
    """What the step sends at least (`glip_jax.distributed.mesh`): gradients summed over `data`; over `fsdp` parameters gathered once,
    gradients summed and scattered.

    Gradients and parameters are float32. Trained parameters are half of Adam's moments.
    """
    data, fsdp = mesh["data"], mesh["fsdp"]
    shard, trained = state["parameters"], state["optimizer"] / 2
    within = chips.devices // chips.slices if chips.tpu else chips.chip.chips
    sent = []
    # A sum over slices (GPUs: hosts) goes in three steps: scattered inside, each chip's share summed between them, gathered.
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
    """FLOPs of an image over the mean of all canvases of the config, relative to one on `canvas`."""
    data = config.data
    multiple = config.model.input.extent_multiple
    sizes = [
        canvas_size(side, aspect, data.long_side, multiple) for side in data.short_sides for aspect in data.aspects
    ]
    each = [flops_per_image(config.model, *size).training for size in sizes]
    return sum(each) / len(each) / flops_per_image(config.model, *canvas).training


def scaling(chips: Topology, found: Roofline, sizes: tuple[int, int] = (16, 256)) -> dict[str, Any] | None:
    """Images per second and chip on sizes[1] over those on sizes[0] chips, the batch per chip as it is, one slice each.

    What `found` sends over `data` alone is scaled by (n-1)/n, what spans other axes stays, over the links of `chips`. None
    where that makes no sense: no TPUs, several slices, no data axis, sizes that the other axes do
    not divide.
    """
    now = found.mesh["data"]
    others = chips.devices // now
    if not chips.tpu or chips.slices > 1 or now < 2 or any(size % others for size in sizes):
        return None
    steps = []
    for size in sizes:
        then = size // others
        factor = ((then - 1) / then) / ((now - 1) / now)
        scaled = [
            dataclasses.replace(each, sent_bytes=each.sent_bytes * (factor if each.axes == ("data",) else 1.0))
            for each in found.sent
        ]
        device = max(found.seconds["compute"], found.seconds.get("memory", 0.0)) + _network(tuple(scaled), chips)
        steps.append(max(device, found.seconds["input"]))
    return {"chips": list(sizes), "step_seconds": steps, "efficiency": steps[0] / steps[1]}


def _network(sent: tuple[CollectiveTraffic, ...], chips: Topology) -> float:
    """Seconds that a chip sends, inside a slice (or host) and then out of it."""
    inner = sum(each.sent_bytes for each in sent if not each.outer)
    outer = sum(each.sent_bytes for each in sent if each.outer)
    return (inner / chips.link if inner else 0.0) + (outer / chips.outer_link if outer else 0.0)


def _memory(
    state: dict[str, float], facts: CompileStatistics | None, limit: float
) -> tuple[dict[str, float], bool | None]:
    """Bytes per chip by kind, and whether they fit."""
    memory = dict(state)
    if facts is None:
        return memory, None if sum(state.values()) <= limit else False
    if facts.needed is None:
        if facts.activations is None:
            kept = {"activations and temporaries": facts.temporaries}
        else:
            kept = {"activations": facts.activations, "temporaries": facts.temporaries - facts.activations}
        memory |= {
            "padding of these": max(0.0, facts.arguments - sum(state.values())),
            **kept,
            "program" if facts.code is not None else "program, allowed for": _PROGRAM
            if facts.code is None
            else facts.code,
        }
        # Results that take no argument's place: the step's numbers.
        memory["outputs"] = facts.outputs - facts.aliased
    memory["peak"] = facts.peak + (_PROGRAM if facts.needed is None and facts.code is None else 0.0)
    return memory, facts.needed is None and memory["peak"] <= limit


def _host(
    config: Config, chips: Topology, canvas: tuple[int, int], state: dict[str, float], images_per_core: float
) -> dict[str, float]:
    """What a host prepares and holds; `images`: of a step."""
    data, chip = config.data, chips.chip
    images = config.train.batch_size / chips.hosts
    cores = min(chip.host_cores, data.workers or data.threads)
    picture = math.prod(canvas) * 3
    here = min(chip.chips, chips.devices)
    # While a checkpoint is written, a copy of the state of all of a host's chips lies in its memory.
    copy = here * (state["parameters"] + state["optimizer"] + state["averages"])
    return {
        "images": images,
        "images/s prepared": cores * images_per_core,
        "memory wanted": (data.prefetch + 2) * images * picture + copy + _PROCESS_BYTES,
        "memory": chip.host_memory,
        "cores": float(chip.host_cores),
    }
