"""What libtpu's compiler has decided when it begins to write machine code: the scheduled program and its memory.

Machine code is most of its work (of GLIP-T's step minutes become half an hour), and nothing that a plan says depends on
it but its own size. So the compiler is told to write down what it decides (XLA's `xla_dump_to`), and is not waited for.
"""

import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Decided", "decided", "read_memory"]

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


def decided(lowered: Any, folder: Path) -> Decided:
    """Has `lowered` (jax.stages.Lowered, for TPUs) compiled until its memory is assigned, and reads what was written into `folder`.

    The compiler goes on in a thread that cannot be stopped: the process is to end soon. Raises what the compiler raises
    where it refuses the program.
    """
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    faults: list[BaseException] = []

    def compile() -> None:
        try:
            lowered.compile(compiler_options=options)
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
