"""What lies in a chip's memory at the moment when it is fullest, from the scheduled text of a compiled program.

A compiler that refuses a program lists its largest arrays; one that accepts it says one number, and not what it is made
of. The text is in the order of execution, so arrays live from the line that makes them to the last that reads them.
Left out are the program's arguments, and what takes their place. Where the compiler lets a result take the place of an
operand that is read for the last time, this does not know it, unless it is a slice written into a larger array or what a
loop carries; so the sum is an estimate, which `glip_jax.planning.compiled` sets beside the compiler's number.
"""

import re
from typing import NamedTuple

from glip_jax.collectives import Computation, Program, opcode_on, operands
from glip_jax.planning.program import opcode_of, result_bytes

__all__ = ["Alive", "fullest"]

_ALIASES = {"bitcast", "get-tuple-element", "tuple", "while", "opt-barrier", "add-dependency", "after-all", "parameter"}
"""Opcodes whose results are arrays that are there already."""


class Alive(NamedTuple):
    """An array that is alive when memory is fullest, per chip."""

    bytes: float
    type: str
    origin: str
    """Path of JAX names that it was made for."""
    inside: str
    """The loop in which it lives, "" for the program's own."""


def fullest(text: str) -> list[Alive]:
    """The arrays beside the arguments that are alive at the fullest moment, largest first.

    `text`: an optimised, scheduled program. Raises CollectiveError for what is no program.
    """
    program = Program(text)
    found = _Memory(program).peak(program.entry)
    return sorted((_alive(program, each, program.entry) for each in found), key=lambda each: -each.bytes)


class _Memory:
    """Walks the computations; keeps what each one's peak holds."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def peak(self, name: str) -> list[str]:
        """Instructions (as `computation instruction`) whose arrays are alive when the computation is fullest."""
        computation = self.program.computations[name]
        lines = list(computation.lines)
        made, parts = self._arrays(computation)
        last: dict[str, int] = {}
        for place, instruction in enumerate(lines):
            for operand in operands(computation.lines[instruction]):
                for array in parts.get(operand, frozenset()):
                    last[array] = place
        returned = parts.get(computation.root, frozenset())
        for array in returned:
            last[array] = len(lines)
        # What is returned to the caller takes the place of an argument or of what the loop carries.
        own = {array: size for array, size in made.items() if size and array not in returned}
        begins = {array: place for place, array in enumerate(lines)}
        changes: list[list[tuple[str, bool]]] = [[] for _ in range(len(lines) + 2)]
        for array in own:
            changes[begins[array]].append((array, True))
            changes[last.get(array, begins[array]) + 1].append((array, False))
        alive: dict[str, float] = {}
        total, best, kept, inner = 0.0, -1.0, [], []
        for place, instruction in enumerate(lines):
            for array, comes in changes[place]:
                total += own[array] if comes else -own[array]
                if comes:
                    alive[array] = own[array]
                else:
                    alive.pop(array)
            below = self._below(computation.lines[instruction])
            extra = sum(self._size(each) for each in below)
            if total + extra > best:
                best, kept, inner = total + extra, list(alive), below
        return [f"{name} {array}" for array in kept] + inner

    def _below(self, rest: str) -> list[str]:
        """The peak of what an instruction runs step by step: a loop's body, the larger of several branches."""
        if not re.match(r"(while|conditional|call)\(", opcode_on(rest)):
            return []
        names = re.findall(r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", rest)
        for listed in re.findall(r"\bbranch_computations=\{([^}]*)\}", rest):
            names += [name.strip().lstrip("%") for name in listed.split(",")]
        found = [self.peak(name) for name in names if name in self.program.computations]
        return max(found, key=lambda each: sum(map(self._size, each)), default=[])

    def _size(self, each: str) -> float:
        name, instruction = each.split(" ")
        return result_bytes(self.program.computations[name].lines[instruction])

    def _arrays(self, computation: Computation) -> tuple[dict[str, float], dict[str, frozenset[str]]]:
        """(bytes of the arrays that instructions make, the arrays that each instruction's result consists of)."""
        made: dict[str, float] = {}
        parts: dict[str, frozenset[str]] = {}
        elements: dict[str, list[frozenset[str]]] = {}
        for name, rest in computation.lines.items():
            opcode, read = opcode_of(rest), operands(rest)
            if opcode == "parameter":
                parts[name] = frozenset()
            elif opcode == "tuple":
                elements[name] = [parts.get(operand, frozenset()) for operand in read]
                parts[name] = frozenset().union(*elements[name])
            elif opcode == "get-tuple-element":
                index = re.search(r"index=(\d+)", rest)
                of = elements.get(read[0])
                parts[name] = of[int(index[1])] if of and index else parts.get(read[0], frozenset())
            elif opcode in _ALIASES:
                parts[name] = frozenset().union(*(parts.get(operand, frozenset()) for operand in read))
                if read and read[0] in elements:
                    elements[name] = elements[read[0]]
            elif opcode.endswith("-done"):
                parts[name] = parts.get(read[0], frozenset())
            elif self._in_place(rest, opcode):
                parts[name] = parts.get(read[self._in_place(rest, opcode) - 1], frozenset())
            else:
                made[name] = result_bytes(rest)
                parts[name] = frozenset([name])
        return made, parts

    def _in_place(self, rest: str, opcode: str) -> int:
        """1 + the index of the operand into which an instruction writes a part; 0 if its result is an array of its own."""
        if opcode == "dynamic-update-slice":
            return 1
        called = re.search(r"\bcalls=%?([\w.\-]+)", rest) if opcode == "fusion" else None
        inner = self.program.computations.get(called[1]) if called else None
        if inner is None:
            return 0
        line = inner.lines.get(inner.root, "")
        if opcode_of(line) != "dynamic-update-slice":
            return 0
        target = operands(line)[0]
        while opcode_of(inner.lines.get(target, "")) == "bitcast":
            target = operands(inner.lines[target])[0]
        number = re.match(r"parameter\((\d+)\)", opcode_on(inner.lines.get(target, "")))
        return 1 + int(number[1]) if number else 0


def _alive(program: Program, each: str, entry: str) -> Alive:
    name, instruction = each.split(" ")
    rest = program.computations[name].lines[instruction]
    kind = rest[: len(rest) - len(opcode_on(rest))].strip()
    origin = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', rest)
    return Alive(result_bytes(rest), kind, origin[1] if origin else "", "" if name == entry else name)
