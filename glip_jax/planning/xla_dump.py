"""Reads XLA's dumps (`xla_dump_to`): the scheduled program, its buffer assignment, and the live ranges of its buffers.

libtpu writes them before it generates machine code. Code generation is most of the work (it extends the compilation of
GLIP-T's step from minutes to half an hour), and only the size of the program depends on it, so a plan can omit it.
"""

import bisect
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "ScheduledProgram", "activation_bytes", "compile_until_assignment", "dump_options", "read_activations", "read_memory",
]  # fmt: skip

_LAST = "after_optimizations_after_buffer_assignment.txt"
"""The last file that is written before code generation."""
_ALLOCATION = r"allocation \d+: size (\d+), (?:page \d+, )?"
"""The start of a buffer's line; newer compilers name the page (libtpu 0.0.52)."""


class Memory(NamedTuple):
    """Buffer sizes in a chip's memory, in bytes."""

    arguments: float
    temporaries: float
    others: float
    """Constants, and results that do not reuse the memory of an argument."""


class ScheduledProgram(NamedTuple):
    """An optimized and scheduled program before code generation."""

    text: str
    memory: Memory


def dump_options(folder: Path) -> dict[str, Any]:
    """Compiler options with which a compilation writes its dumps into `folder`."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def compile_until_assignment(lowered: Any, folder: Path) -> ScheduledProgram:
    """Compiles `lowered` (jax.stages.Lowered, for TPUs) until its buffers are assigned, and reads the dumps in `folder`.

    The compiler continues in a thread that cannot be stopped, so the process should end soon. Raises what the compiler
    raises if it refuses the program.
    """
    faults: list[BaseException] = []

    def compile() -> None:
        try:
            lowered.compile(compiler_options=dump_options(folder))
        except BaseException as fault:  # re-raised below
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
    return ScheduledProgram(
        _only(folder, "after_optimizations.txt"), read_memory(_only(folder, "buffer-assignment.txt"))
    )


def _only(folder: Path, ending: str) -> str:
    """The text of the largest file with that ending; the compiler may write others for auxiliary programs."""
    files = sorted(folder.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
    if not files:
        raise RuntimeError(
            f"the compiler wrote no *{ending}: this version of libtpu dumps in another order; use --compile=tpu-whole"
        )
    return files[-1].read_text()


def read_memory(text: str) -> Memory:
    """Sums XLA's buffer assignment, without on-chip memory (`color`) and thread-local buffers. RuntimeError for another form of it."""
    arguments = temporaries = others = 0.0
    for size, kind in re.findall(rf"^{_ALLOCATION}(.*)$", text, re.MULTILINE):
        if "color" in kind or kind.startswith("thread-local"):
            continue
        if kind.startswith("parameter"):
            arguments += float(size)
        elif kind.startswith("preallocated-temp"):
            temporaries += float(size)
        else:
            others += float(size)
    if not arguments:
        raise RuntimeError(
            "the compiler's buffer assignment names no parameters: its form is another; use --compile=tpu-whole"
        )
    return Memory(arguments, temporaries, others)


def activation_bytes(folder: Path) -> float | None:
    """`read_activations` of the dumps in `folder`; None if files are missing."""
    endings = ("buffer-assignment.txt", "live-range.txt", "after_optimizations.txt")
    if not all(any(folder.glob(f"*{ending}")) for ending in endings):
        return None
    return read_activations(*(_only(folder, ending) for ending in endings))


def read_activations(assignment: str, ranges: str, text: str) -> float | None:
    """Bytes of temporaries that the forward pass keeps for the backward pass.

    Reads XLA's buffer assignment, live ranges and program. These are the buffers that are live across the point of the
    schedule where the forward pass ends and the backward pass begins; values that the backward pass recomputes are not
    among them. Bytes that several values share count once. Returns None if the program has no backward pass or the files
    have an unknown format.
    """
    order = {name: int(position) for position, name in re.findall(r"^    (\d+):(\S+)$", ranges, re.MULTILINE)}
    origins = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    forward, backward = [], []
    for name, origin in origins:
        if name in order and "jvp(" in origin and not name.startswith("constant"):
            (backward if "transpose(" in origin else forward).append(order[name])
    lives = {
        name: (int(begin), int(end))
        for name, begin, end in re.findall(r"^    (\S+):(\d+)-(\d+)$", ranges, re.MULTILINE)
    }
    temporary = re.search(rf"^{_ALLOCATION}preallocated-temp:\n(?P<values>(?: value:.*\n?)*)", assignment, re.MULTILINE)
    if not (forward and backward and lives and temporary):
        return None
    boundary = _pass_boundary(sorted(forward), sorted(backward))
    kept = []
    for name, index, size, offset in re.findall(
        r"^ value: <\d+ (\S+?)(\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\)", temporary["values"], re.MULTILINE
    ):
        begin, end = lives.get(name + (index or "{}"), (0, 0))
        if begin < boundary <= end:
            kept.append((int(offset), int(offset) + int(size)))
    total = reached = 0
    for begin, end in sorted(kept):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return float(total)


def _pass_boundary(forward: list[int], backward: list[int]) -> int:
    """The position in the schedule that best separates the forward from the backward pass; the compiler moves some operations
    across it.
    """
    misplaced = {position: bisect.bisect_left(backward, position) + len(forward) - bisect.bisect_left(forward, position)
                 for position in backward}  # fmt: skip
    return min(misplaced, key=lambda position: (misplaced[position], position))
