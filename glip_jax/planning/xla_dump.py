"""What XLA writes down of what it decides (`xla_dump_to`): the scheduled program, its memory, and what lies there when.

libtpu decides all of it before it begins to write machine code. That is most of its work (of GLIP-T's step minutes become
half an hour), and nothing that a plan says depends on it but its own size: so it can be left at that.
"""

import bisect
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Decided", "activation_bytes", "decided", "options", "read_activations", "read_memory"]

_LAST = "after_optimizations_after_buffer_assignment.txt"
"""The file that is written last before machine code."""


class Memory(NamedTuple):
    """Bytes in a chip's memory."""

    arguments: float
    temporaries: float
    others: float
    """Results that take no argument's place, and constants."""


class Decided(NamedTuple):
    """A program before its machine code."""

    text: str
    memory: Memory


def options(folder: Path) -> dict[str, Any]:
    """Of a compilation that writes into `folder` what it decides."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def decided(lowered: Any, folder: Path) -> Decided:
    """Has `lowered` (jax.stages.Lowered, for TPUs) compiled until its memory is assigned, and reads what was written into `folder`.

    The compiler goes on in a thread that cannot be stopped: the process is to end soon. Raises what the compiler raises
    where it refuses the program.
    """
    faults: list[BaseException] = []

    def compile() -> None:
        try:
            lowered.compile(compiler_options=options(folder))
        except BaseException as fault:  # handed on below
            faults.append(fault)

    thread = threading.Thread(target=compile, daemon=True)
    thread.start()
    size = -1
    while thread.is_alive():
        thread.join(1.0)
        last = next(folder.glob(f"*{_LAST}"), None)
        before, size = size, last.stat().st_size if last else -1
        if size > 0 and size == before:
            break
    if faults:
        raise faults[0]
    return Decided(_only(folder, "after_optimizations.txt"), read_memory(_only(folder, "buffer-assignment.txt")))


def _only(folder: Path, ending: str) -> str:
    """The text of the largest file of that kind; the compiler may have written some for small parts."""
    files = sorted(folder.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
    if not files:
        raise RuntimeError(
            f"the compiler wrote no *{ending}: this libtpu decides in another order; use --compile=tpu-whole"
        )
    return files[-1].read_text()


def read_memory(text: str) -> Memory:
    """Sums XLA's buffer assignment, without what lies on the chip itself (`color`) or belongs to one operation."""
    arguments = temporaries = others = 0.0
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*)$", text, re.MULTILINE):
        if "color" in kind or kind.startswith("thread-local"):
            continue
        if kind.startswith("parameter"):
            arguments += float(size)
        elif kind.startswith("preallocated-temp"):
            temporaries += float(size)
        else:
            others += float(size)
    return Memory(arguments, temporaries, others)


def activation_bytes(folder: Path) -> float | None:
    """`read_activations` of what a compilation wrote into `folder`; None where it wrote too little."""
    endings = ("buffer-assignment.txt", "live-range.txt", "after_optimizations.txt")
    if not all(any(folder.glob(f"*{ending}")) for ending in endings):
        return None
    return read_activations(*(_only(folder, ending) for ending in endings))


def read_activations(assignment: str, ranges: str, text: str) -> float | None:
    """Bytes of temporaries that the forward pass leaves for the backward pass, from XLA's buffer assignment, live ranges
    and program; None where the program has no backward pass, or the files are of a form not known here.

    That is what lies in memory where in the order of execution the one pass ends and the other begins, and is needed
    before and after. What the backward pass computes again is its own. Bytes that several values share count once.
    """
    order = {name: int(place) for place, name in re.findall(r"^    (\d+):(\S+)$", ranges, re.MULTILINE)}
    origins = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    forward, backward = [], []
    for name, origin in origins:
        if name in order and "jvp(" in origin and not name.startswith("constant"):
            (backward if "transpose(" in origin else forward).append(order[name])
    lives = {
        name: (int(begin), int(end))
        for name, begin, end in re.findall(r"^    (\S+):(\d+)-(\d+)$", ranges, re.MULTILINE)
    }
    temporary = re.search(
        r"^allocation \d+: size \d+, preallocated-temp:\n((?: value:.*\n?)*)", assignment, re.MULTILINE
    )
    if not (forward and backward and lives and temporary):
        return None
    turn = _turn(sorted(forward), sorted(backward))
    held = []
    for name, index, size, offset in re.findall(
        r"^ value: <\d+ (\S+?)(\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\)", temporary[1], re.MULTILINE
    ):
        begin, end = lives.get(name + (index or "{}"), (0, 0))
        if begin < turn <= end:
            held.append((int(offset), int(offset) + int(size)))
    total = reached = 0
    for begin, end in sorted(held):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return float(total)


def _turn(forward: list[int], backward: list[int]) -> int:
    """The place in the order before which most operations are of the forward pass, and from which most are of the other:
    the compiler moves a few across.
    """
    wrong = {place: bisect.bisect_left(backward, place) + len(forward) - bisect.bisect_left(forward, place)
             for place in backward}  # fmt: skip
    return min(wrong, key=lambda place: (wrong[place], place))
