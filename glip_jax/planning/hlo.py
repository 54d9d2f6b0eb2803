"""Finds the collectives of a compiled program: kind, bytes, groups and mesh axes.

Reads the text of the optimized program (`jax.stages.Compiled.as_text`, HLO) of the CPU, GPU and TPU compilers:

* executions in loops are multiplied by the trip count: the compiler's (`known_trip_count`) or, where it gives none (TPU),
  that of a loop from one constant to another with increment 1, as in all loops of JAX;
* an asynchronous collective (start, done) counts once, also where the TPU compiler distributes its parts over fusions;
* the TPU's fusion of an all-reduce and a slice counts as a reduce-scatter;
* every branch of a conditional counts, so sums are upper bounds there.

Bytes are those of the arrays, without padding to TPU tiles.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from glip_jax import UserError

__all__ = [
    "Collective", "CollectiveError", "Computation", "Kind", "Program", "bits_of", "collectives", "opcode_and_rest", "operands",
]  # fmt: skip

Kind = Literal[
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast", "send", "recv",
]  # fmt: skip

Groups = tuple[tuple[int, ...], ...]

_COLLECTIVE = re.compile(rf"(?<![\w-])({'|'.join(sorted(get_args(Kind), key=len, reverse=True))})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")


class CollectiveError(UserError, ValueError):
    """The text is no program, or has replica groups in an unknown format."""


@dataclass(frozen=True)
class Collective:
    """A collective instruction of a program."""

    kind: Kind
    name: str
    """Name of the instruction in the program."""
    dtypes: tuple[str, ...]
    """HLO names of the arrays' types (f32, bf16, s32, pred)."""
    operand_bytes: int
    """Size of a device's operand, per execution."""
    result_bytes: int
    """Size of a device's result, per execution."""
    groups: Groups
    """Groups of communicating devices, as indices into mesh.devices.flat; for collective-permute, send and recv
    (source, target) pairs."""
    times: int
    """Executions per run of the program: the product of the trip counts of the enclosing loops."""
    times_known: bool
    """False if the trip count of an enclosing loop is not known; it counts as 1."""
    op_name: str
    """JAX name stack; several that the compiler combined are in parentheses."""
    source: str
    """file:line of the user's code, "" if the program has none; of the first compilation if the program comes from the
    persistent cache."""
    across_slices: bool = False
    """Whether this is an exchange between TPU slices, which the host performs (XLA's megascale). Then `groups` is empty, the
    bytes are those that a chip transfers to its host, and `kind` is the collective that the hosts perform."""

    def sent_across(self, slices: int) -> float:
        """Bytes that the host sends per chip and execution among `slices` slices, with ring algorithms."""
        factor = 2 * (slices - 1) / slices if self.kind == "all-reduce" else slices - 1
        return float(factor * self.operand_bytes)

    @property
    def bytes(self) -> int:
        """The larger of operand and result: the result of an all-gather, the operand of a reduce-scatter."""
        return max(self.operand_bytes, self.result_bytes)

    @property
    def devices(self) -> int:
        """Devices of a group; 2 for a permutation (1 if every device sends to itself)."""
        return max((len(set(group)) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends per execution with bandwidth-optimal ring algorithms (arXiv 1909.09756, 2.2).

        For n devices: 2 (n-1)/n of `bytes` for all-reduce, (n-1)/n for all-gather, reduce-scatter and all-to-all.
        """
        share = (self.devices - 1) / self.devices
        match self.kind:
            case "all-reduce":
                return 2 * share * self.bytes
            case "collective-permute" | "send" | "collective-broadcast":
                return float(self.bytes) if self.devices > 1 else 0.0
            case "recv":
                return 0.0
        return share * self.bytes

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the members of a group differ; `mesh`: sizes by name, in order (`Mesh.shape`).

        Raises CollectiveError if the groups name devices that the mesh does not have.
        """
        sizes, members = tuple(mesh.values()), sorted(set(itertools.chain.from_iterable(self.groups)))
        if members and members[-1] >= math.prod(sizes):
            raise CollectiveError(f"{self.name} is among {members[-1] + 1} devices, the mesh is {dict(mesh)}")
        varies = np.zeros(len(sizes), bool)
        for group in self.groups:
            coordinates = np.stack(np.unravel_index(np.array(group), sizes))
            varies |= (coordinates != coordinates[:, :1]).any(1)
        return tuple(axis for axis, differs in zip(mesh, varies) if differs)


def collectives(program: Any) -> list[Collective]:
    """All collectives that `program` executes, in the order of its text.

    `program`: a `jax.stages.Compiled`, or its text. Transfers between host and device are omitted, except those that
    exchange data between TPU slices. Raises CollectiveError for a text without an entry computation, or with replica groups
    in an unknown format.
    """
    text = program if isinstance(program, str) else program.as_text()
    if not isinstance(text, str):
        raise CollectiveError(f"the program is a {type(program).__name__} without text: expected a compiled one")
    return Program(text).read()


class Computation(NamedTuple):
    """A computation of a program's text."""

    name: str
    entry: bool
    lines: dict[str, str]
    """Instruction name to what follows its " = "."""
    root: str
    """Name of the instruction whose result is that of the computation."""


class _Called(NamedTuple):
    """A computation that an instruction calls: executions per call, and whether that number is known."""

    computation: str
    times: int
    known: bool


class Program:
    """The text of a program, split into computations."""

    def __init__(self, text: str) -> None:
        header = text[: text.find("\n")]
        counts = dict(re.findall(r"\b(num_partitions|replica_count)=(\d+)", header))
        self.devices = math.prod(int(count) for count in counts.values())
        self.sources = _sources(text)
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.callers: dict[str, str] = {}
        """Computation to an instruction that calls it."""
        name, lines, root = "", {}, ""
        for line in text.splitlines():
            if line[:1] not in (" ", "}", "") and line.endswith("{"):
                head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
                assert head is not None
                name, lines, root = head[2], {}, ""
                self.computations[name] = Computation(name, bool(head[1]), lines, "")
                self.entry = name if head[1] else self.entry
            elif name and line.startswith("}"):
                self.computations[name] = self.computations[name]._replace(root=root)
                name = ""
            elif name and (match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
                lines[match[2]] = line[match.end() :]
                root = match[2] if match[1] else root
        if not self.entry:
            raise CollectiveError("the text has no ENTRY computation: expected HLO as Compiled.as_text gives it")

    def read(self) -> list[Collective]:
        """See `collectives`."""
        found = []
        for name, (times, known) in self.executions().items():
            computation = self.computations[name]
            for instruction, rest in computation.lines.items():
                if not _COLLECTIVE.search(rest) or _is_continuation(rest, computation):
                    continue
                if "is_host_transfer=true" in rest:
                    found += self._across_slices(instruction, computation, times, known)
                    continue
                # Metadata may contain these words too; only the opcode counts.
                if match := _COLLECTIVE.match(opcode_and_rest(rest)):
                    found.append(self._collective(match[1], instruction, computation, times, known))
        return found

    def _across_slices(self, name: str, computation: Computation, times: int, known: bool) -> list[Collective]:
        """The transfer to the host for other slices; empty for other transfers and for the received data."""
        rest = computation.lines[name]
        kind: Any = (re.search(r'_xla_megascale_transfer_type="(\w+)"', rest) or ["", ""])[1].lower().replace("_", "-")
        if not opcode_and_rest(rest).startswith("send(") or kind not in get_args(Kind):
            return []
        (dtype, size), *_ = _arrays(rest)
        return [Collective(kind, name, (dtype,), size, size, (), times, known, "", self._source(rest), True)]

    def executions(self) -> dict[str, tuple[int, bool]]:
        """The computations that run, in the order of the text, with (executions, whether that number is known)."""
        times: dict[str, tuple[int, bool]] = {self.entry: (1, True)}
        # A callee precedes its callers in the text, so in reverse order the count of a caller is complete when it is read.
        for name in reversed(self.computations):
            if name not in times:
                continue
            count, times_known = times[name]
            for called, factor, known in self._calls(self.computations[name]):
                before, all_known = times.get(called, (0, True))
                times[called] = (before + count * factor, all_known and times_known and known)
        return {name: times[name] for name in self.computations if name in times}

    def _calls(self, computation: Computation) -> Iterator[_Called]:
        for rest in computation.lines.values():
            if "calls=" not in rest and "to_apply=" not in rest and "body=" not in rest and "_computation" not in rest:
                continue
            factor, known = (1, True) if " while(" not in rest else self._trips(rest, computation)
            names = _CALLED.findall(rest)
            for branches in _BRANCHES.findall(rest):
                names += [name.strip().lstrip("%") for name in branches.split(",")]
            for name in names:
                if name in self.computations:
                    self.callers[name] = rest
                    yield _Called(name, factor, known)

    def _trips(self, rest: str, computation: Computation) -> tuple[int, bool]:
        """Trip count of a while instruction (1 if not known), and whether it is known."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
            return int(match[1]), True
        named = re.search(r"\bcondition=%?([\w.\-]+)", rest)
        condition = self.computations.get(named[1]) if named else None
        if condition is None:
            return 1, False
        # ROOT compare(element i of the loop's tuple, constant), direction=LT
        root = condition.lines.get(condition.root, "")
        compared = operands(root)
        if not opcode_and_rest(root).startswith("compare(") or "direction=LT" not in root or len(compared) != 2:
            return 1, False
        element = re.search(r"get-tuple-element\(.*index=(\d+)", condition.lines.get(compared[0], ""))
        end = _constant(condition, compared[1])
        start = None
        if element:
            initial = operands(computation.lines.get((operands(rest) or [""])[0], ""))
            index = int(element[1])
            start = _constant(computation, initial[index]) if index < len(initial) else None
        return (1, False) if start is None or end is None else (max(end - start, 0), True)

    def _collective(self, kind: Any, name: str, computation: Computation, times: int, known: bool) -> Collective:
        rest = computation.lines[name]
        carried = [_arrays(computation.lines.get(operand, "")) for operand in operands(rest)]
        arrays = [array for each in carried for array in each]
        groups = self._groups(rest, kind)
        operand = sum(size for _, size in arrays)
        members = max((len(group) for group in groups), default=1)
        result = {"all-gather": operand * members, "reduce-scatter": operand // members}.get(kind, operand)
        if kind in ("send", "recv"):
            arrays = _arrays(rest)[:1]  # (array, context, token)
            operand, result = (arrays[0][1], 0) if kind == "send" else (0, arrays[0][1])
        slices = _kept_slices(name, computation) if kind == "all-reduce" else []
        if slices:
            kind = "reduce-scatter"
            result = sum(size for each in slices for _, size in _arrays(computation.lines[each]))
        # A collective inside a fusion has its metadata on the fusion.
        annotated = rest if "op_name=" in rest else self.callers.get(computation.name, rest)
        op_name = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', annotated)
        return Collective(
            kind, name, tuple(sorted({dtype for dtype, _ in arrays})), operand, result, groups, times, known,
            op_name[1] if op_name else "", self._source(annotated),
        )  # fmt: skip

    def _groups(self, rest: str, kind: str) -> Groups:
        pairs = re.search(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
        if pairs:
            return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1]))
        found = re.search(r"\breplica_groups=", rest)
        if not found:
            if kind in ("send", "recv", "collective-permute"):
                return ()
            return (tuple(range(self.devices)),)
        return _groups(rest[found.end() :], self.devices)

    def _source(self, rest: str) -> str:
        if match := re.search(r'\bsource_file="([^"]*)"(?: source_line=(\d+))?', rest):
            return f"{match[1]}:{match[2]}" if match[2] else match[1]
        match = re.search(r"\bstack_frame_id=(\d+)", rest)
        return self.sources.get(int(match[1]), "") if match else ""


def _groups(text: str, devices: int) -> Groups:
    """Parses the replica groups at the start of `text`: lists, an iota, or axes of a mesh of the compiler."""
    if text.startswith("{"):
        listed = re.findall(r"\{([\d,]*)\}", text[: text.find("}}") + 1]) if text.startswith("{{") else []
        return tuple(tuple(map(int, group.split(","))) for group in listed) or (tuple(range(devices)),)
    if match := re.match(r"\[(\d+),(\d+)\]<=(\S+?)(?:,\s|$)", text):
        return _rows(_iota(match[3]).reshape(int(match[1]), int(match[2])))
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^()]*\))?)\))? \{([^}]*)\}", text):
        names = re.findall(r"'([^']+)'=(\d+)", match[1])
        sizes = [int(size) for _, size in names]
        order = _iota(match[2]) if match[2] else np.arange(math.prod(sizes))
        # Axes are split into parts, because a reference may select one: 'axis':(product of the parts before it)size.
        shape, chosen, position = [], [], 0
        references = {
            name: (int(before or 1), int(size or 0))
            for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
        }
        for name, whole in names:
            before, size = references.get(name, (int(whole), 1))
            size = size or int(whole)
            shape += [before, size, int(whole) // (before * size)]
            chosen += [position + 1] if name in references else []
            position += 3
        grid = order.reshape(shape)
        grid = np.moveaxis(grid, chosen, range(-len(chosen), 0))
        return _rows(grid.reshape(-1, math.prod(grid.shape[len(shape) - len(chosen) :])))
    raise CollectiveError(f"replica_groups={text[:80]}: an unknown format; expected lists, an iota or mesh axes")


def _iota(text: str) -> np.ndarray:
    """Evaluates `[4,2]T(1,0)`: an iota of that shape, transposed and flattened."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        raise CollectiveError(f"device list {text[:80]!r}: expected [sizes] or [sizes]T(order)")
    sizes = [int(size) for size in match[1].split(",")]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    return (grid.transpose([int(axis) for axis in match[2].split(",")]) if match[2] else grid).reshape(-1)


def _rows(table: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in table)


def opcode_and_rest(rest: str) -> str:
    """The text after the type of an instruction: its opcode, operands and attributes."""
    if not rest.startswith("("):
        return rest.partition(" ")[2]
    return rest[_closing(rest, 0) + 1 :].lstrip()


def _closing(text: str, at: int) -> int:
    """Index of the parenthesis that closes the one at `at`."""
    depth = 0
    for index in range(at, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise CollectiveError(f"unbalanced parentheses in: {text[:80]}")


def operands(rest: str) -> list[str]:
    """Names of an instruction's operands."""
    after = opcode_and_rest(rest)
    begin = after.find("(")
    if begin < 0:
        return []
    inner = re.sub(r"/\*.*?\*/", "", after[begin + 1 : _closing(after, begin)])
    # Operands may be preceded by their types, whose layouts contain commas too.
    return re.findall(r"%([\w.\-]+)", inner) or [word.split()[-1] for word in inner.split(",") if word.strip()]


def _arrays(rest: str) -> list[tuple[str, int]]:
    """(dtype, bytes) of the arrays of an instruction's type."""
    kind = rest[: len(rest) - len(opcode_and_rest(rest))]
    return [(dtype, _bytes(dtype, sizes)) for dtype, sizes in _ARRAY.findall(kind) if dtype not in ("token", "opaque")]


def bits_of(dtype: str) -> int:
    """Bits of an element of HLO type `dtype` (f32, bf16, pred)."""
    return 8 if dtype == "pred" else int((re.match(r"[a-z]+(\d+)", dtype) or ["", "8"])[1])


def _bytes(dtype: str, sizes: str) -> int:
    number = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    return -(-number * bits_of(dtype) // 8)


def _constant(computation: Computation, name: str) -> int | None:
    """The integer value of an instruction, looking through copies and conversions; None if it is not constant."""
    for _ in range(8):
        rest = computation.lines.get(name, "")
        after = opcode_and_rest(rest)
        if match := re.match(r"constant\((-?\d+)\)", after):
            return int(match[1])
        if not re.match(r"(copy|bitcast|convert|copy-start|copy-done)\(", after):
            return None
        name = operands(rest)[0]
    return None


def _is_continuation(rest: str, computation: Computation) -> bool:
    """Whether an instruction continues a collective that the TPU compiler distributes over fusions: only the start counts."""
    if '"async_collective_fusion_config"' not in rest:
        return False
    return not any('custom_call_target="AsyncCollectiveStart"' in line for line in computation.lines.values())


def _kept_slices(name: str, computation: Computation) -> list[str]:
    """The slices of an all-reduce in a fusion that keeps only each device's own slice; empty if the whole result is used."""
    if computation.entry:
        return []
    slices, names = [], {name}
    for each, rest in computation.lines.items():
        if each in names or not names & set(operands(rest)):
            continue
        after = opcode_and_rest(rest)
        if after.startswith("dynamic-slice("):
            slices.append(each)
        elif re.match(r"(get-tuple-element|bitcast|reshape)\(", after):
            names.add(each)
        elif not set(operands(rest)) <= {*slices, *names} or not after.startswith("tuple("):
            return []
    return slices


def _sources(text: str) -> dict[int, str]:
    """file:line of each stack frame in the tables at the head of a program: the innermost frame outside installed packages."""

    def section(title: str) -> Sequence[str]:
        match = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        return match[1].splitlines() if match else []

    files = {int(n): name for n, name in (re.match(r'(\d+) "(.*)"', line).groups() for line in section("FileNames"))}  # pyright: ignore[reportOptionalMemberAccess]
    fields = r"(\d+) \{file_name_id=(\d+).*? line=(\d+)"
    locations = {
        int(n): (files[int(f)], line) for n, f, line in re.findall(fields, "\n".join(section("FileLocations")))
    }
    fields = r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
    frames = {int(n): (int(p), int(up or 1) - 1) for n, p, up in re.findall(fields, "\n".join(section("StackFrames")))}

    def source(frame: int) -> str:
        chain = [frame]
        while (up := frames[chain[-1]][1]) in frames and up not in chain:
            chain.append(up)
        found = [locations[frames[each][0]] for each in chain]
        return ":".join(next((location for location in found if "site-packages" not in location[0]), found[0]))

    return {frame: source(frame) for frame in frames}
