"""Types of settings and flags with the range of their numbers, declared beside each field, and the one check of all fields."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["BelowOne", "Channels", "Count", "Factor", "FalseAlarms", "Fraction", "Limit", "Pixels", "Processes", "Range", "Seconds", "Size", "Steps", "faults"]  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Numbers from `minimum` to `maximum` in `unit`, or one of `also`; without the ends that `above` and `below` exclude."""

    minimum: float
    maximum: float
    unit: str = ""
    above: bool = False
    below: bool = False
    also: tuple[int, ...] = ()

    def __contains__(self, value: float) -> bool:
        low = self.minimum < value if self.above else self.minimum <= value
        return value in self.also or (low and (value < self.maximum if self.below else value <= self.maximum))

    def __str__(self) -> str:
        others = "".join(f"{value}, or " for value in self.also)
        low = f"more than {self.minimum:g}, at most" if self.above else f"{self.minimum:.10g} to"
        return f"{others}{low} {'less than ' if self.below else ''}{self.maximum:.10g} {self.unit}".rstrip()


Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
Factor = Annotated[float, Range(0, 1000)]
Seconds = Annotated[float, Range(0, 1e9, "seconds", above=True)]
Pixels = Annotated[int, Range(1, 16384, "pixels")]
Channels = Annotated[int, Range(1, 65536, "channels")]
Size = Annotated[int, Range(1, 1_000_000)]
Count = Annotated[int, Range(1, 1_000_000_000)]
Limit = Annotated[int, Range(0, 1_000_000_000)]
"""As `Count`; 0 has a meaning of its own."""
Steps = Annotated[int, Range(1, 1_000_000_000, "steps")]
Processes = Annotated[int, Range(0, 1024)]
"""Processes or threads of this machine."""
FalseAlarms = Annotated[float, Range(0, 1e6, "an image and name", above=True)]


_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def faults(value: Any, hint: Any, name: str = "") -> Iterator[str]:
    """A line for every setting in `value` that has not the type or the range of `hint`; dataclasses, dicts and tuples are walked."""
    origin, inside = get_origin(hint), get_args(hint)
    kind: Any = origin or hint
    if dataclasses.is_dataclass(hint):
        if isinstance(value, kind):
            for key, inner in _hints(hint).items():
                yield from faults(getattr(value, key), inner, f"{name}.{key}" if name else key)
        else:
            yield f"{name} is {value!r}: expected {kind.__name__}(...)"
    elif origin is Annotated and not isinstance(inside[1], Range):
        yield from faults(value, inside[0], name)
    elif origin is Annotated:
        range_ = inside[1]
        if not isinstance(value, int if inside[0] is int else int | float):
            yield f"{name} is {value!r}: expected {'an integer' if inside[0] is int else 'a number'}, {range_}"
        elif value not in range_:
            yield f"{name} is {value}: expected {range_}"
    elif origin in (Union, UnionType):
        # None, or a value of the other type.
        found = [list(faults(value, each, name)) for each in inside if each is not NoneType]
        if not (value is None and NoneType in inside) and all(found):
            yield from found[0]
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from faults(item, inside[1], f"{name}.{key}")
    elif origin is tuple and isinstance(value, tuple | list):
        kinds = inside[:1] * len(value) if inside[-1] is ... else inside
        if len(value) != len(kinds):
            yield f"{name} has {len(value)} entries: expected {len(kinds)}"
        for number, (item, each) in enumerate(zip(value, kinds)):
            yield from faults(item, each, f"{name}[{number}]" if len(value) > 1 else name)
    elif origin is Literal:
        if value not in inside:
            yield f"{name} is {value!r}: expected {' or '.join(map(str, inside))}"
    elif not isinstance(value, kind):
        yield f"{name} is {value!r}: expected {'text' if kind is str else kind.__name__}"
