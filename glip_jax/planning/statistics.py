"""Statistics of a compiled training step: plain values that are stored as JSON."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["CollectiveTraffic", "CompileMode", "CompileStatistics", "TopOperation"]

CompileMode = Literal["tpu", "tpu-whole", "fake", "local"]
"""Compiler and extent: libtpu without code generation (tpu) or with it (tpu-whole); XLA for fake CPU devices (fake) or for the
GPUs of this machine (local)."""


@dataclass(frozen=True)
class CollectiveTraffic:
    """Collectives of one kind that span the same mesh axes, per chip and step."""

    kind: str
    axes: tuple[str, ...]
    executions: int
    bytes: float
    """Size of the arrays."""
    sent_bytes: float
    """Bytes that a chip sends with ring algorithms."""
    outer: bool
    """Whether a group spans several TPU slices, or several GPU hosts."""


@dataclass(frozen=True)
class TopOperation:
    """An operation with much memory traffic, per chip and step."""

    opcode: str
    type: str
    origin: str
    result_bytes: int
    bytes: float
    padding: float
    flops: float
    cycles: float
    times: int
    machine_cycles: float = 0.0
    """By machine code, at least; 0 where it was not counted."""


@dataclass(frozen=True)
class CompileStatistics:
    """Statistics of the step compiled for one canvas size, per chip."""

    mode: CompileMode
    compiler: str
    """Name and version."""
    needed: float | None = None
    """Bytes of memory that the program needs, if the compiler refused it for lack of memory; the fields below are empty then."""
    available: float | None = None
    """Bytes of memory available to the compiler, if it reports them."""
    message: str = ""
    """The compiler's message, if it refused the program."""
    arguments: float = 0.0
    """Bytes of state and batch in the chip's layout."""
    outputs: float = 0.0
    aliased: float = 0.0
    """Bytes of outputs that reuse the memory of arguments."""
    temporaries: float = 0.0
    activations: float | None = None
    """The part of the temporaries that the forward pass keeps for the backward pass; None: not known."""
    code: float | None = None
    """Bytes of machine code; None: not generated."""
    flops: float = 0.0
    passes: float = 0.0
    """FLOPs weighted by passes of the matrix unit (float32 products of highest precision take six)."""
    bytes: float = 0.0
    """Memory traffic, padded to tiles."""
    padding: float = 0.0
    """The part of `bytes` that is padding."""
    cycles: float = 0.0
    """The compiler's estimate; 0 if it gives none."""
    machine_cycles: dict[str, float] = field(default_factory=dict)
    """Cycles counted in machine code, by part of the network (`machine_code.cycles_by_part`); empty if none was generated."""
    trip_counts_known: bool = True
    """Whether all trip counts of loops are known; loops without one count once."""
    undeclared_kernels: int = 0
    """Executions of kernels that do not declare their FLOPs."""
    collectives: tuple[CollectiveTraffic, ...] = ()
    """Collectives by kind and axes."""
    top_operations: tuple[TopOperation, ...] = ()
    """Operations with the most memory traffic."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of tracing and compiling on this machine."""

    @property
    def peak(self) -> float:
        """Peak memory in bytes: arguments, outputs that are not aliased, temporaries and program."""
        return self.needed or self.arguments + self.outputs - self.aliased + self.temporaries + (self.code or 0.0)
