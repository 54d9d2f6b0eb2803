"""Counts FLOPs, memory traffic and estimated cycles of a compiled program from its text (HLO), including loop trip counts.

XLA's cost analysis counts the body of a loop once, but GLIP's layers are loops. Counted here:

* FLOPs of matrix products and convolutions, two per multiply-add, without taps on padding; and the same in passes of the
  TPU's matrix unit: a float32 product takes six bfloat16 passes with precision `highest`, three with `high`;
* bytes between chip memory and compute: operands and results of every operation outside fusions, padded to the tiles of the
  layout (T(8,128): a last dimension of 3 takes 128), without arrays in on-chip memory (S(1), ...). Of arrays that a fusion
  reads or updates in slices, only the slices count;
* the cycles that the TPU compiler estimates, where it does.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from glip_jax.planning.hlo import Computation, Program, bits_of, opcode_and_rest, operands

__all__ = ["Operation", "ProgramCost", "program_cost"]

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "async-start", "add-dependency", "rng-get-and-update-state",
}  # fmt: skip
"""Opcodes without memory traffic of their own; the computations that they call are counted separately."""
_NO_CYCLES = 2**63 - 1
"""Value that libtpu writes where it has no estimate."""
_PASSES = {"highest": 6, "high": 3}


class Operation(NamedTuple):
    """An operation outside fusions."""

    name: str
    opcode: str
    type: str
    result_bytes: int
    """Size of its result in chip memory, padded."""
    bytes: float
    """Bytes read and written per execution, padded."""
    padding: float
    """The part of `bytes` that is padding."""
    flops: float
    """FLOPs per execution."""
    cycles: int
    """The TPU compiler's estimate per execution; 0 if it gives none."""
    times: int
    """Executions per run of the program."""
    origin: str
    """JAX name stack of the operation."""
    windows: int
    """Windows in which a TPU works on its result, per execution; 0 if the program does not say."""


class ProgramCost(NamedTuple):
    """Sums over one run of the program on one device."""

    flops: float
    passes: float
    """FLOPs, multiplied by the passes of each product's precision."""
    bytes: float
    padding: float
    cycles: float
    trip_counts_known: bool
    """False if the trip count of a loop is not known; its body counts once."""
    undeclared_kernels: int
    """Executions of Pallas kernels that do not declare their FLOPs."""
    operations: list[Operation]


def program_cost(text: str) -> ProgramCost:
    """Reads the optimized program `text` (`jax.stages.Compiled.as_text`). Raises CollectiveError if it is not a program."""
    return _CostReader(Program(text)).read()


class _Size(NamedTuple):
    bytes: float
    padding: float

    def __add__(self, other: "_Size") -> "_Size":  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Size(self.bytes + other.bytes, self.padding + other.padding)


_ZERO = _Size(0, 0)


class _CostReader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.fused: set[str] = set()
        pending = [
            name
            for computation in program.computations.values()
            for rest in computation.lines.values()
            if not _runs_callee_unfused(rest)
            for name in re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", rest)
        ]
        while pending:
            name = pending.pop()
            if name in self.fused or name not in program.computations:
                continue
            self.fused.add(name)
            for rest in program.computations[name].lines.values():
                pending += re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", rest)

    def read(self) -> ProgramCost:
        operations: list[Operation] = []
        passes, trip_counts_known, undeclared_kernels = 0.0, True, 0
        fused_flops: dict[str, float] = {}
        """FLOPs of each computation, including those that it calls."""
        executions = self.program.executions()
        for name, (times, times_known) in executions.items():
            computation = self.program.computations[name]
            trip_counts_known &= times_known
            fused_flops[name] = 0.0
            for instruction, rest in computation.lines.items():
                opcode = _opcode(rest)
                kernel = opcode == "custom-call" and "tpu_custom_call" in rest
                declared = _declared_flops(rest) if kernel else None
                flops = _product(rest, computation) if opcode in ("dot", "convolution") else declared or 0.0
                passes += times * flops * _passes(rest)
                called = (
                    re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", rest) if not _runs_callee_unfused(rest) else []
                )
                flops += sum(fused_flops.get(inner, 0.0) for inner in called)
                fused_flops[name] += flops
                if name in self.fused or opcode in _NO_TRAFFIC or opcode.endswith("-done"):
                    continue
                undeclared_kernels += times * (kernel and declared is None)
                operations.append(self._operation(instruction, rest, opcode, computation, flops, times))
        flops = sum(each.flops * each.times for each in operations)
        moved = [(each.bytes * each.times, each.padding * each.times) for each in operations]
        return ProgramCost(
            flops,
            passes,
            sum(size for size, _ in moved),
            sum(padding for _, padding in moved),
            float(sum(each.cycles * each.times for each in operations)),
            trip_counts_known,
            undeclared_kernels,
            operations,
        )

    def _operation(
        self, name: str, rest: str, opcode: str, computation: Computation, flops: float, times: int
    ) -> Operation:
        kind = rest[: len(rest) - len(opcode_and_rest(rest))].strip()
        result = self._written_size(rest, opcode, computation)
        moved = result
        for index, operand in enumerate(operands(rest)):
            if operand in computation.lines:
                moved += self._read_size(rest, opcode, index, _sizes(computation.lines[operand]))
        if opcode == "custom-call" and "AllocateBuffer" in rest:
            moved = _ZERO
        cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
        windows = re.search(r'"iteration_bounds":\[([^\]]*)\]', rest)
        origin = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', rest)
        whole = sum((size for size in _sizes(rest)), start=_ZERO)
        return Operation(
            name,
            opcode,
            kind,
            int(whole.bytes),
            moved.bytes,
            moved.padding,
            flops,
            int(cycles[1]) if cycles and int(cycles[1]) != _NO_CYCLES else 0,
            times,
            origin[1] if origin else "",
            math.prod(int(n) for n in re.findall(r"\d+", windows[1])) if windows else 0,
        )

    def _written_size(self, rest: str, opcode: str, computation: Computation) -> _Size:
        """Bytes that an operation writes into chip memory; for an in-place update only the updated part."""
        sizes = _sizes(rest)
        if opcode.endswith("-start"):
            # (result, operand, context), or ((operands), result, context)
            return sizes[opcode == "slice-start"] if sizes else _ZERO
        if opcode in ("dynamic-update-slice", "scatter"):
            return self._update_size(rest, opcode, computation)
        if opcode != "fusion":
            return sum(sizes, start=_ZERO)
        inner = self._called(rest)
        if inner is None:
            return sum(sizes, start=_ZERO)
        roots = self._roots(inner)
        if len(roots) != len(sizes):
            return sum(sizes, start=_ZERO)
        total = _ZERO
        for root, size in zip(roots, sizes):
            line = inner.lines.get(root, "")
            changed = _opcode(line) in ("dynamic-update-slice", "scatter") and size.bytes
            total += self._update_size(line, _opcode(line), inner) if changed else size
        return total

    def _roots(self, computation: Computation) -> list[str]:
        """The instructions that produce the elements of a computation's result, looking through bitcasts."""
        line = computation.lines.get(computation.root, "")
        names = operands(line) if _opcode(line) == "tuple" else [computation.root]
        return [self._origin(name, computation) for name in names]

    def _origin(self, name: str, computation: Computation) -> str:
        while _opcode(computation.lines.get(name, "")) in ("bitcast", "copy", "reshape"):
            name = operands(computation.lines[name])[0]
        return name

    def _update_size(self, rest: str, opcode: str, computation: Computation) -> _Size:
        """Size of the update of a dynamic-update-slice; twice that of a scatter, which also reads the updated elements."""
        update = operands(rest)[1 if opcode == "dynamic-update-slice" else 2 : None]
        size = sum(_sizes(computation.lines.get(update[0], "")) if update else [], start=_ZERO)
        return size if opcode == "dynamic-update-slice" else size + size

    def _read_size(self, rest: str, opcode: str, index: int, sizes: list[_Size]) -> _Size:
        """Bytes that an operation reads of its operand `index`, whose arrays have `sizes`."""
        whole = sum(sizes, start=_ZERO)
        if not whole.bytes:
            return _ZERO
        if opcode in ("dynamic-slice", "slice", "gather") and index == 0:
            return sum(_sizes(rest, anywhere=True), start=_ZERO)
        if opcode in ("dynamic-update-slice", "scatter") and index == 0:
            return _ZERO
        if opcode == "slice-start":
            return _sizes(rest, anywhere=True)[1]
        if opcode == "fusion" and (inner := self._called(rest)) is not None:
            part = self._parameter_read_size(inner.name, index)
            return whole if part is None else part
        return whole

    @functools.cache  # noqa: B019 (a reader is used once)
    def _parameter_read_size(self, name: str, index: int) -> _Size | None:
        """Bytes that a fused computation reads of its parameter; None: all of it."""
        computation = self.program.computations[name]
        marker = f"parameter({index})"
        parameter = next((n for n, rest in computation.lines.items() if opcode_and_rest(rest).startswith(marker)), None)
        if parameter is None:
            return None
        total, names = _ZERO, {parameter}
        for each, rest in computation.lines.items():
            for position, operand in enumerate(operands(rest)) if names & set(operands(rest)) else ():
                if operand not in names:
                    continue
                opcode = _opcode(rest)
                if opcode == "bitcast":
                    names.add(each)
                elif opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                    total += sum(_sizes(rest, anywhere=True), start=_ZERO)
                elif opcode in ("dynamic-update-slice", "scatter") and position == 0:
                    continue
                elif opcode == "fusion" and (inner := self._called(rest)) is not None:
                    part = self._parameter_read_size(inner.name, position)
                    if part is None:
                        return None
                    total += part
                else:
                    return None
        return total

    def _called(self, rest: str) -> Computation | None:
        found = re.search(r"\bcalls=%?([\w.\-]+)", rest)
        return self.program.computations.get(found[1]) if found else None


def _runs_callee_unfused(rest: str) -> bool:
    """Whether an instruction runs the operations of its callee one by one, as a loop does, instead of fused."""
    return bool(re.match(r"(while|conditional|call|async-start)\(", opcode_and_rest(rest)))


def _opcode(rest: str) -> str:
    return opcode_and_rest(rest).partition("(")[0]


def _declared_flops(rest: str) -> float | None:
    """FLOPs that a Pallas kernel declares (`cost_estimate` of `pallas_call`); None if it does not."""
    found = re.search(r'"cost_estimate":\{"flops":"?(\d+)', rest)
    return float(found[1]) if found else None


def _passes(rest: str) -> int:
    found = re.search(r"operand_precision=\{(\w+)", rest)
    return _PASSES.get(found[1], 1) if found else 1


def _sizes(rest: str, anywhere: bool = False) -> list[_Size]:
    """Bytes of the arrays of an instruction's type; zero for arrays outside chip memory unless `anywhere`."""
    kind = rest[: len(rest) - len(opcode_and_rest(rest))]
    sizes = []
    for dtype, shape, order, layout in _ARRAY.findall(kind):
        if dtype in ("token", "opaque"):
            continue
        sides = [int(side.lstrip("<=")) for side in shape.split(",") if side]
        bits = bits_of(dtype)
        plain = math.prod(sides) * bits / 8
        space = re.search(r"S\((\d+)\)", layout)
        if space and space[1] != "0" and not anywhere:
            sizes.append(_ZERO)
            continue
        padded = _padded(sides, [int(axis) for axis in order.split(",") if axis], layout) * bits / 8
        sizes.append(_Size(padded, padded - plain))
    return sizes


def _padded(sides: list[int], minor_to_major: list[int], layout: str) -> int:
    """Number of elements of an array with its minor dimensions padded to whole tiles."""
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if not tile or not sides:
        return math.prod(sides)
    filled = list(sides)
    order = minor_to_major or list(reversed(range(len(sides))))
    for axis, unit in zip(order, reversed([int(part) for part in tile[1].split(",")])):
        filled[axis] = -(-filled[axis] // unit) * unit
    return math.prod(filled)


def _shape(name: str, computation: Computation) -> list[int]:
    found = _ARRAY.search(computation.lines.get(name, ""))
    return [int(side.lstrip("<=")) for side in found[2].split(",") if side] if found else []


def _product(rest: str, computation: Computation) -> float:
    """FLOPs of a dot or convolution."""
    out = _ARRAY.search(rest)
    assert out is not None
    result = [int(side.lstrip("<=")) for side in out[2].split(",") if side]
    left, right = (_shape(name, computation) for name in operands(rest)[:2])
    if contracted := re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", rest):
        return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)
    labels = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", rest)
    if not labels or not right:
        return 2.0 * math.prod(result) * (left[-1] if left else 1)
    inputs, kernel, outputs = labels[1], labels[2], labels[3]
    total = 2.0 * result[outputs.index("b")] * result[outputs.index("f")] * right[kernel.index("i")]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"\bwindow=\{([^}]*)\}", rest) or ["", ""])[1]))
    for axis in range(len(inputs) - 2):
        letter = str(axis)

        def of(key: str, default: str = "1", axis: int = axis) -> str:
            return window[key].split("x")[axis] if key in window else default

        total *= _count_taps(
            left[inputs.index(letter)],
            right[kernel.index(letter)],
            result[outputs.index(letter)],
            int(of("stride")),
            int(of("pad", "0_0").split("_")[0]),
            int(of("lhs_dilate")),
            int(of("rhs_dilate")),
        )
    return total


@functools.cache
def _count_taps(length: int, kernel: int, outputs: int, stride: int, pad: int, dilate: int, dilation: int) -> int:
    """Number of (output, tap) pairs along one dimension that read an input element instead of padding or a dilation gap."""
    if kernel * outputs > 10**8:
        return outputs * kernel
    count = 0
    places = np.arange(outputs, dtype=np.int64) * stride - pad
    for tap in range(kernel):
        at = places + tap * dilation
        count += int(np.count_nonzero((at >= 0) & (at < (length - 1) * dilate + 1) & (at % dilate == 0)))
    return count
