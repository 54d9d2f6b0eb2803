"""What a compiler says of a training step: plain values, kept as JSON."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["CompileStatistics", "TopOperation", "How", "CollectiveTraffic"]

How = Literal["tpu", "tpu-whole", "fake", "local"]
"""Which compiler: libtpu's until it would write machine code, or to its end; the CPU's for made-up devices; that of the GPUs here."""


@dataclass(frozen=True)
class CollectiveTraffic:
    """Collectives of one kind that span the same mesh axes, per chip and step."""

    kind: str
    axes: tuple[str, ...]
    executions: int
    bytes: float
    """Of the arrays."""
    sent_bytes: float
    """That a chip sends, by ring algorithms."""
    outer: bool
    """Whether a group reaches beyond one slice of TPUs, or one host of GPUs."""


@dataclass(frozen=True)
class TopOperation:
    """An operation that touches much memory, per chip and step."""

    opcode: str
    type: str
    origin: str
    result_bytes: int
    bytes: float
    padding: float
    flops: float
    cycles: float
    times: int


@dataclass(frozen=True)
class CompileStatistics:
    """What a compiler says of one step on one canvas, per chip."""

    how: How
    compiler: str
    """Name and version."""
    needed: float | None = None
    """Bytes of memory, where the compiler refused because that was too much; then what is below is empty."""
    available: float | None = None
    """Bytes that the compiler has at hand, where it says so."""
    words: str = ""
    """Its own, where it refused."""
    arguments: float = 0.0
    """Bytes of state and batch as the chip lays them out."""
    outputs: float = 0.0
    aliased: float = 0.0
    """Of the outputs, those that take the place of arguments."""
    temporaries: float = 0.0
    activations: float | None = None
    """Of the temporaries, what the forward pass leaves for the backward pass; None: not told apart."""
    code: float | None = None
    """Of the program itself; None: it was not written."""
    flops: float = 0.0
    passes: float = 0.0
    """FLOPs weighted by passes of the matrix unit (float32 products of highest precision take six)."""
    bytes: float = 0.0
    padding: float = 0.0
    cycles: float = 0.0
    known: bool = True
    calls: int = 0
    sent: tuple[CollectiveTraffic, ...] = ()
    hot: tuple[TopOperation, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """What lowering and compiling took here."""

    @property
    def peak(self) -> float:
        """Bytes at once: arguments, what outputs take beside them, temporaries and the program."""
        return self.needed or self.arguments + self.outputs - self.aliased + self.temporaries + (self.code or 0.0)
