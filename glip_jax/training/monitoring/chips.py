"""Published peaks of accelerators, and topologies by name, such as v5e:8x16 or h100:8.

Looked up in Google's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation: peaks, memory and its
bandwidth, and the links of all but v4; of "TPU7x" too, halved, because jax sees a chip's two halves as devices. Not compared with a source, but written from memory: the links of v4, the cores,
memory and network of hosts (four chips a TPU VM in slices of several hosts), and all numbers of GPUs, as NVIDIA's data sheets of
A100, H100 and H200 (SXM, dense bfloat16) and DGX machines of eight give them. Rates are in one direction; Google's
"bidirectional" figures are halved.
"""

import math
import re
from typing import NamedTuple

from glip_jax import UserError

__all__ = ["CHIPS", "Chip", "Topology", "TopologyError", "chip_of", "topology"]


class TopologyError(UserError, ValueError):
    """A name that is no topology."""


class Chip(NamedTuple):
    """One accelerator, as jax sees it, and its share of the machine around it. Bytes, bytes/s, FLOP/s."""

    kinds: tuple[str, ...]
    """Prefixes of its `device_kind` in jax."""
    flops: float
    """Peak of dense bfloat16 matrix products."""
    memory: float
    """High-bandwidth memory."""
    bandwidth: float
    """Of the high-bandwidth memory."""
    link: float
    """Sent by a chip to its neighbors over all of its links (ICI, NVLink)."""
    network: float
    """Sent by a host to other hosts (DCN, InfiniBand)."""
    chips: int
    """Per host."""
    host_memory: float
    host_cores: int
    """Virtual CPUs of a host."""
    dimensions: int
    """Dimensions of the torus of chips; 1: a switch within the host."""
    clock: float = 0.0
    """Cycles a second of a TPU, derived from the peak and the sizes of the matrix units; 0 where it is not known, as of GPUs."""
    parts: int = 1
    """Devices of jax that one chip is; all numbers above, and the word chip elsewhere, are of one of them."""


CHIPS: dict[str, Chip] = {
    "v4": Chip(("TPU v4",), 275e12, 32.0 * 2**30, 1200e9, 300e9, 12.5e9, 4, 407e9, 240, 3, 1.05e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16.0 * 2**30, 819e9, 200e9, 12.5e9, 4, 192e9, 112, 2, 1.5e9),
    "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95.0 * 2**30, 2765e9, 600e9, 25e9, 4, 448e9, 208, 3, 1.75e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32.0 * 2**30, 1638e9, 400e9, 50e9, 4, 720e9, 180, 2, 1.75e9),
    "tpu7x": Chip(("TPU7x", "TPU 7x"), 1153.5e12, 96.0 * 2**30, 3690e9, 300e9, 12.5e9, 8, 960e9, 224, 3, parts=2),
    "a100": Chip(("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 200e9, 8, 2e12, 256, 1),
    "h100": Chip(("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 400e9, 8, 2e12, 224, 1),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 400e9, 8, 2e12, 224, 1),
}
"""Chips by the prefix of a topology's name. Host cores and host memory of GPUs are those of DGX machines."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of jax's `device_kind`; None for one without published peaks, such as a CPU."""
    # The longest prefix decides: "TPU v5 lite" is no "TPU v5".
    known = [(kind, chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(known, key=lambda pair: len(pair[0]))[1] if known else None


class Topology(NamedTuple):
    """Chips and their interconnect."""

    name: str
    """The given name."""
    family: str
    """Key of `CHIPS`."""
    shape: tuple[int, ...]
    """Chips along each dimension of one slice, of tpu7x whole ones; (n,) of GPUs."""
    slices: int
    """Number of slices, connected by the network of the data center only."""

    @property
    def chip(self) -> Chip:
        """The peaks of a chip."""
        return CHIPS[self.family]

    @property
    def devices(self) -> int:
        """Devices of all slices."""
        return self.slices * self._slice

    @property
    def _slice(self) -> int:
        return math.prod(self.shape) * self.chip.parts

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.slices * math.ceil(self._slice / self.chip.chips)

    @property
    def tpu(self) -> bool:
        """Whether it is a TPU topology, which libtpu compiles for."""
        return self.chip.dimensions > 1

    @property
    def compiler_name(self) -> str:
        """The name of one slice in jax.experimental.topologies; TPUs only."""
        return f"{self.family}:{'x'.join(map(str, self.shape))}"

    @property
    def link(self) -> float:
        """Bytes/s that a chip sends inside a slice. Dimensions without a wraparound link count half.

        In 2D a dimension of 16 chips wraps around; in 3D all do if every side is a multiple of 4.
        """
        if not self.tpu:
            return self.chip.link
        sides = [side for side in self.shape if side > 1]
        if self.chip.dimensions == 3:
            wraps = [all(side % 4 == 0 for side in self.shape)] * len(sides)
        else:
            wraps = [side == 16 for side in sides]
        return self.chip.link / self.chip.dimensions * sum(1.0 if wrap else 0.5 for wrap in wraps)

    @property
    def outer_link(self) -> float:
        """Bytes/s that a chip sends out of its slice, or a GPU out of its host: its share of the host's network."""
        return self.chip.network / min(self.chip.chips, self._slice)


_EXAMPLES = "v4:2x2x4, v5e:8x8, v5e:16x16, v5p:2x2x4, v6e:8x8, tpu7x:4x4x4, v5e:16x16*2 (two slices), h100:8, a100:16"
_ACCELERATOR = re.compile(r"(v4|v5p|v5e|v5litepod|v6e|tpu7x)-(\d+)")


def topology(name: str) -> Topology:
    """The topology called `name`: FAMILY:AxB[xC][*SLICES], GPU:COUNT, or a Cloud TPU type such as v5litepod-64.

    Types of v4, v5p and tpu7x count two cores a chip. Raises TopologyError with the known names.
    """
    text = name.strip().lower()
    if found := _ACCELERATOR.fullmatch(text):
        family = "v5e" if found[1] == "v5litepod" else found[1]
        chips = int(found[2]) // (2 if family in ("v4", "v5p", "tpu7x") else 1)
        return Topology(name, family, _default_shape(name, family, chips), 1)
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
    if not found or found[1] not in CHIPS:
        raise TopologyError(f"topology {name!r}: expected one of {', '.join(CHIPS)} with a shape, such as {_EXAMPLES}")
    family, shape, slices = found[1], tuple(map(int, found[2].split("x"))), int(found[3] or 1)
    dimensions = CHIPS[family].dimensions
    if len(shape) != dimensions or min(shape) < 1 or slices < 1:
        raise TopologyError(
            f"topology {name!r} has the shape {shape}, {slices} times: {family} has {dimensions} "
            f"dimension{'s' if dimensions > 1 else ''} of at least 1; for example {_EXAMPLES}"
        )
    return Topology(name, family, shape, slices)


def _default_shape(name: str, family: str, chips: int) -> tuple[int, ...]:
    """The default shape of a Cloud TPU type: as square as powers of two allow, short sides first."""
    dimensions = CHIPS[family].dimensions
    power = chips.bit_length() - 1
    min_power = 2 if dimensions == 3 else 0
    if chips != 2**power or power < min_power or (dimensions == 2 and chips > 256):
        raise TopologyError(
            f"topology {name!r}: no slice of {family} has {chips} chips by default; give its shape, such as {_EXAMPLES}"
        )
    shape = [1] * dimensions
    for _ in range(power):
        shape[shape.index(min(shape))] *= 2
    return tuple(sorted(shape, key=lambda side: (side == 1, side)))
