"""Cycles of a TPU program counted in its machine code: libtpu's dumps of scheduled bundles, one file for each operation.

A bundle is what a core issues in a cycle. Counted are the bundles of a file, those of a loop as often as it turns. Stalls of the matrix
unit and waits for copies are not in the bundles, so an operation takes at least the longest of its bundles, its products at the peak of
the matrix unit and its bytes at the bandwidth of the memory. Waits between operations, for collectives and for copies that run beside other operations are
not counted either: the sum is less than what a chip takes, but counts the vector units, which a roofline leaves out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from glip_jax.planning.cost import Operation

__all__ = [
    "OTHERS", "Cycles", "bundle_files", "count_bundles", "cycles_by_part", "cycles_of", "dump_arguments", "operation_cycles", "part_of",
]  # fmt: skip

_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:\s*((?:>\s*)*)\{\s*(\}?)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_FILLING = 2
"""The outermost loop, over the windows of an operation or the grid of a kernel, has up to so many more turns, which only fill and empty the
pipeline of its copies."""


class _Loop:
    """A loop, or the whole program."""

    def __init__(self, outer: "_Loop | None") -> None:
        self.outer, self.bundles, self.turns = outer, 0, 1


def count_bundles(text: str, windows: int = 0) -> float:
    """Executed bundles of a dump (`*-final_bundles.txt`). A loop whose number of turns is not in the code counts once.

    `windows`: number of windows of the operation (`Operation.windows`), 0 if not known, as for a kernel.
    """
    program = _Loop(None)
    # The schedule mixes bundles of a loop with those around it: a bundle is of the latest loop of its depth.
    latest, loops, current = [program], [program], program
    for line in text.splitlines():
        found = _BUNDLE.match(line)
        if not found:
            continue
        depth = found[2].count(">")
        if found[1] == "LB":
            latest = [*latest[:depth], _Loop(latest[depth - 1])]
            loops.append(latest[depth])
        if not found[3]:  # an empty bundle waits for the one before
            current = latest[min(depth, len(latest) - 1)]
        current.bundles += 1
        if turns := _EXIT.search(line):
            current.turns = max(1, int(turns[1]))

    def executed(loop: _Loop) -> float:
        if loop.outer is None:
            return 1.0
        turns = loop.turns
        if loop.outer is program:
            least = windows or turns - _FILLING
            turns = least if 0 < least < turns <= least + _FILLING else turns
        return turns * executed(loop.outer)

    return sum(loop.bundles * executed(loop) for loop in loops)


def dump_arguments(folder: Path) -> list[str]:
    """Arguments of libtpu (LIBTPU_INIT_ARGS) with which it writes the final bundles of each operation into `folder`."""
    return [
        f"--xla_jf_dump_to={folder}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=final",
    ]  # fmt: skip


def bundle_files(folder: Path) -> dict[str, Path]:
    """The dump in `folder` of each operation, by its name."""
    found = ((_FILE.fullmatch(path.name), path) for path in sorted(folder.glob("*-final_bundles.txt")))
    return {match[1]: path for match, path in found if match and "schedule" not in path.name}


class Cycles(NamedTuple):
    """Lower bounds of an operation's cycles per execution."""

    bundles: float
    products: float
    bytes: float

    @property
    def least(self) -> float:
        """The longest of them."""
        return max(self)


_PARTS = (
    ("fusion", r"tower.*/fusion\b"), ("head's BERT layers", r"tower.*/text\b"), ("head's convolutions", r"tower.*/convolution\b"),
    ("backbone", r"/backbone\b"), ("pyramid", r"/pyramid\b"), ("text encoder", r"/text\b"), ("head, outputs", r"/head\b"),
)  # fmt: skip
"""(part, pattern of the JAX name stack); the first that matches counts."""
OTHERS = "losses, optimizer, the rest"
_BESIDE = "copy-start"
"""A copy between HBM and on-chip memory that the compiler runs beside other operations. Its bytes count in the bound by bandwidth of the whole."""


def part_of(origin: str) -> str:
    """The part of the network that an operation belongs to, by its JAX name stack."""
    return next((part for part, pattern in _PARTS if re.search(pattern, origin)), OTHERS)


def cycles_of(
    operations: Sequence[Operation], folder: Path, flops_per_cycle: float, bytes_per_cycle: float
) -> list[float]:
    """Cycles of each operation in one run of a program, at least; 0 for copies beside others. `folder`: the dumps."""
    files = bundle_files(folder)
    return [
        0.0
        if each.opcode == _BESIDE
        else each.times * operation_cycles(each, files, flops_per_cycle, bytes_per_cycle).least
        for each in operations
    ]


def cycles_by_part(operations: Sequence[Operation], cycles: Sequence[float]) -> dict[str, float]:
    """The sum of the operations' `cycles_of`, one after the other, by part of the network."""
    sums = dict.fromkeys([*(part for part, _ in _PARTS), OTHERS], 0.0)
    for each, own in zip(operations, cycles, strict=True):
        sums[part_of(each.origin)] += own
    return sums


def operation_cycles(
    operation: Operation, files: Mapping[str, Path], flops_per_cycle: float, bytes_per_cycle: float
) -> Cycles:
    """The cycles of an operation; `files` as found by `bundle_files`. Declared FLOPs of a kernel count as products."""
    path = files.get(operation.name)
    bundles = count_bundles(path.read_text(), operation.windows) if path else 0.0
    return Cycles(bundles, operation.flops / flops_per_cycle, operation.bytes / bytes_per_cycle)
