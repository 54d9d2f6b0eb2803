"""What a compiled program sends between devices: kind, bytes, groups and mesh axes of every collective.

Read from the optimised program's text (`jax.stages.Compiled.as_text`, HLO), as CPU, GPU and TPU compilers write it:

* loops multiply: the trip count is the compiler's own (`known_trip_count`) or, where it gives none (TPU), that of a
  loop from one constant below another, counted by ones as all loops of JAX are;
* a collective in flight (start, done) counts once, also where a TPU spreads its parts over the fusions it overlaps;
* the TPU's fused all-reduce and slice counts as the reduce-scatter that it is;
* of a conditional every branch counts, so the sums are upper bounds there.

Bytes are those of the arrays; a TPU's tiles may pad them.
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
    "Collective", "CollectiveError", "Computation", "Kind", "Program", "bits_of", "collectives", "opcode_on", "operands",
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
    """A program text, or a form of replica groups in it, that this module does not know."""


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program."""

    kind: Kind
    name: str
    """The instruction's name in the program."""
    dtypes: tuple[str, ...]
    """Of the arrays that it carries, in HLO's names (f32, bf16, s32, pred)."""
    operand_bytes: int
    """What each device puts in, once."""
    result_bytes: int
    """What each device gets out, once."""
    groups: Groups
    """Places in the program's order of devices (mesh.devices.flat) that communicate among themselves; for
    collective-permute, send and recv (source, target) pairs."""
    times: int
    """How often one run of the program executes it: the product of the trip counts of the loops around it."""
    times_known: bool
    """False where a loop around it has an unknown trip count, which then counts as 1."""
    op_name: str
    """Path of JAX names that it was made for; several joined by the compiler in parentheses."""
    source: str
    """file:line of the user's code, "" if the program does not say; as it was when the program was first compiled, if it
    comes from the persistent cache."""
    across_slices: bool = False
    """A TPU's exchange with the other slices, which its host carries out (XLA's megascale): `groups` is empty then, the
    bytes are what a chip hands over, `kind` what becomes of them."""

    def sent_across(self, slices: int) -> float:
        """What a chip's host sends for it to `slices` slices at one execution, by the same rings."""
        factor = 2 * (slices - 1) / slices if self.kind == "all-reduce" else slices - 1
        return float(factor * self.operand_bytes)

    @property
    def bytes(self) -> int:
        """The larger of operand and result: of an all-gather what is gathered, of a reduce-scatter what is reduced."""
        return max(self.operand_bytes, self.result_bytes)

    @property
    def devices(self) -> int:
        """Devices of a group; of a permutation 2 (1 where nobody sends to another)."""
        return max((len(set(group)) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> float:
        """What a device sends at one execution by the ring algorithms that are optimal in bytes (arXiv 1909.09756, 2.2).

        n devices: all-reduce 2 (n-1)/n, all-gather, reduce-scatter and all-to-all (n-1)/n of `bytes`.
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
        """The mesh axes along which members of a group differ; `mesh`: sizes by name, in order (`Mesh.shape`).

        Raises CollectiveError if the groups name devices that the mesh does not have.
        """
        sizes, members = tuple(mesh.values()), sorted(set(itertools.chain.from_iterable(self.groups)))
        if members and members[-1] >= math.prod(sizes):
            raise CollectiveError(f"{self.name} is among {members[-1] + 1} devices, the mesh is {dict(mesh)}")
        varies = np.zeros(len(sizes), bool)
        for group in self.groups:
            places = np.stack(np.unravel_index(np.array(group), sizes))
            varies |= (places != places[:, :1]).any(1)
        return tuple(axis for axis, differs in zip(mesh, varies) if differs)


def collectives(program: Any) -> list[Collective]:
    """Every collective that `program` executes, in the order of its text.

    `program`: a `jax.stages.Compiled`, or its text. Transfers between host and device are no collectives and left out, but
    those by which a TPU's slices exchange.
    Raises CollectiveError for a text without an entry or with groups written in an unknown way.
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
    """Name of the instruction whose result is the computation's."""


class _Called(NamedTuple):
    """A computation that an instruction calls, how often, and whether that is known."""

    computation: str
    times: int
    known: bool


class Program:
    """A program's text, cut into computations."""

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
                if not _COLLECTIVE.search(rest) or _continues(rest, computation):
                    continue
                if "is_host_transfer=true" in rest:
                    found += self._across_slices(instruction, computation, times, known)
                    continue
                # Metadata may hold the words too; only the opcode counts.
                if match := _COLLECTIVE.match(opcode_on(rest)):
                    found.append(self._collective(match[1], instruction, computation, times, known))
        return found

    def _across_slices(self, name: str, computation: Computation, times: int, known: bool) -> list[Collective]:
        """What is handed to the host for other slices; nothing for a transfer of another sort, and for what comes back."""
        rest = computation.lines[name]
        kind: Any = (re.search(r'_xla_megascale_transfer_type="(\w+)"', rest) or ["", ""])[1].lower().replace("_", "-")
        if not opcode_on(rest).startswith("send(") or kind not in get_args(Kind):
            return []
        (dtype, size), *_ = _arrays(rest)
        return [Collective(kind, name, (dtype,), size, size, (), times, known, "", self._source(rest), True)]

    def executions(self) -> dict[str, tuple[int, bool]]:
        """Computations that run, in the order of the text: how often, and whether that is known."""
        times: dict[str, tuple[int, bool]] = {self.entry: (1, True)}
        # Whoever is called stands before who calls, so a caller's own count is complete when its turn comes.
        for name in reversed(self.computations):
            if name not in times:
                continue
            own, sure = times[name]
            for called, factor, known in self._calls(self.computations[name]):
                before, all_known = times.get(called, (0, True))
                times[called] = (before + own * factor, all_known and sure and known)
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
        """Trip count of a while instruction, and whether it is known (1 if not)."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
            return int(match[1]), True
        named = re.search(r"\bcondition=%?([\w.\-]+)", rest)
        condition = self.computations.get(named[1]) if named else None
        if condition is None:
            return 1, False
        # ROOT compare(element i of the loop's tuple, constant), direction=LT
        root = condition.lines.get(condition.root, "")
        compared = operands(root)
        if not opcode_on(root).startswith("compare(") or "direction=LT" not in root or len(compared) != 2:
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
        slices = _scattered(name, computation) if kind == "all-reduce" else []
        if slices:
            kind = "reduce-scatter"
            result = sum(size for each in slices for _, size in _arrays(computation.lines[each]))
        # What the compiler wrapped into a fusion bears its names outside.
        told = rest if "op_name=" in rest else self.callers.get(computation.name, rest)
        op_name = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', told)
        return Collective(
            kind, name, tuple(sorted({dtype for dtype, _ in arrays})), operand, result, groups, times, known,
            op_name[1] if op_name else "", self._source(told),
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
    """Replica groups at the beginning of `text`: listed, as an iota, or by axes of a mesh of the compiler's own."""
    if text.startswith("{"):
        listed = re.findall(r"\{([\d,]*)\}", text[: text.find("}}") + 1]) if text.startswith("{{") else []
        return tuple(tuple(map(int, group.split(","))) for group in listed) or (tuple(range(devices)),)
    if match := re.match(r"\[(\d+),(\d+)\]<=(\S+?)(?:,\s|$)", text):
        return _rows(_iota(match[3]).reshape(int(match[1]), int(match[2])))
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^()]*\))?)\))? \{([^}]*)\}", text):
        names = re.findall(r"'([^']+)'=(\d+)", match[1])
        sizes = [int(size) for _, size in names]
        order = _iota(match[2]) if match[2] else np.arange(math.prod(sizes))
        # Each axis in parts, so that a reference may mean a part of one: 'axis':(factors before it)size.
        shape, chosen, place = [], [], 0
        references = {
            name: (int(before or 1), int(size or 0))
            for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
        }
        for name, whole in names:
            before, size = references.get(name, (int(whole), 1))
            size = size or int(whole)
            shape += [before, size, int(whole) // (before * size)]
            chosen += [place + 1] if name in references else []
            place += 3
        grid = order.reshape(shape)
        grid = np.moveaxis(grid, chosen, range(-len(chosen), 0))
        return _rows(grid.reshape(-1, math.prod(grid.shape[len(shape) - len(chosen) :])))
    raise CollectiveError(f"replica_groups={text[:80]}: a form that is not known; expected lists, an iota, axes")


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 in that shape, transposed, in their new order."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        raise CollectiveError(f"device list {text[:80]!r}: expected [sizes] or [sizes]T(order)")
    sizes = [int(size) for size in match[1].split(",")]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    return (grid.transpose([int(axis) for axis in match[2].split(",")]) if match[2] else grid).reshape(-1)


def _rows(table: np.ndarray) -> Groups:
    return tuple(tuple(int(place) for place in row) for row in table)


def opcode_on(rest: str) -> str:
    """What follows the type of an instruction."""
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
    after = opcode_on(rest)
    begin = after.find("(")
    if begin < 0:
        return []
    inner = re.sub(r"/\*.*?\*/", "", after[begin + 1 : _closing(after, begin)])
    # Operands may be written with their types before them, whose layouts hold commas too.
    return re.findall(r"%([\w.\-]+)", inner) or [word.split()[-1] for word in inner.split(",") if word.strip()]


def _arrays(rest: str) -> list[tuple[str, int]]:
    """(dtype, bytes) of the arrays of an instruction's type."""
    kind = rest[: len(rest) - len(opcode_on(rest))]
    return [(dtype, _bytes(dtype, sizes)) for dtype, sizes in _ARRAY.findall(kind) if dtype not in ("token", "opaque")]


def bits_of(dtype: str) -> int:
    """Of an element of an array of HLO's type `dtype` (f32, bf16, pred)."""
    return 8 if dtype == "pred" else int((re.match(r"[a-z]+(\d+)", dtype) or ["", "8"])[1])


def _bytes(dtype: str, sizes: str) -> int:
    number = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    return -(-number * bits_of(dtype) // 8)


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction holds, through copies and conversions; None if it is not constant."""
    for _ in range(8):
        rest = computation.lines.get(name, "")
        after = opcode_on(rest)
        if match := re.match(r"constant\((-?\d+)\)", after):
            return int(match[1])
        if not re.match(r"(copy|bitcast|convert|copy-start|copy-done)\(", after):
            return None
        name = operands(rest)[0]
    return None


def _continues(rest: str, computation: Computation) -> bool:
    """Whether it is a later part of a collective that a TPU spreads over fusions: only the start counts."""
    if '"async_collective_fusion_config"' not in rest:
        return False
    return not any('custom_call_target="AsyncCollectiveStart"' in line for line in computation.lines.values())


def _scattered(name: str, computation: Computation) -> list[str]:
    """The slices, if a fusion (never the entry) does nothing with an all-reduce but keep each device's own slice."""
    if computation.entry:
        return []
    slices, names = [], {name}
    for each, rest in computation.lines.items():
        if each in names or not names & set(operands(rest)):
            continue
        after = opcode_on(rest)
        if after.startswith("dynamic-slice("):
            slices.append(each)
        elif re.match(r"(get-tuple-element|bitcast|reshape)\(", after):
            names.add(each)
        elif not set(operands(rest)) <= {*slices, *names} or not after.startswith("tuple("):
            return []
    return slices


def _sources(text: str) -> dict[int, str]:
    """file:line of each stack frame in the tables at the head of a program: the innermost that no library's is."""

    def section(title: str) -> Sequence[str]:
        match = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        return match[1].splitlines() if match else []

    files = {int(n): name for n, name in (re.match(r'(\d+) "(.*)"', line).groups() for line in section("FileNames"))}  # pyright: ignore[reportOptionalMemberAccess]
    fields = r"(\d+) \{file_name_id=(\d+).*? line=(\d+)"
    places = {int(n): (files[int(f)], line) for n, f, line in re.findall(fields, "\n".join(section("FileLocations")))}
    fields = r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
    frames = {int(n): (int(p), int(up or 1) - 1) for n, p, up in re.findall(fields, "\n".join(section("StackFrames")))}

    def source(frame: int) -> str:
        chain = [frame]
        while (up := frames[chain[-1]][1]) in frames and up not in chain:
            chain.append(up)
        found = [places[frames[each][0]] for each in chain]
        return ":".join(next((place for place in found if "site-packages" not in place[0]), found[0]))

    return {frame: source(frame) for frame in frames}
