"""Every number on the command line of every job has a range, and another number is refused with it in one line."""

import dataclasses
import inspect
import math
import re
import typing
from typing import Any

import pytest

from glip_jax import __main__
from glip_jax.cli.command_line import Arguments
from glip_jax.config.ranges import Range
from tests.jobs import FORMATS, JOBS

ODD = (-2, 0, math.nan, 10**13)


def numbers_of(kind: Any, prefix: str = "--") -> dict[str, tuple[Range | None, bool]]:
    """The range (None: it has none) of each flag that is a number or several, and whether it is an integer."""
    found: dict[str, tuple[Range | None, bool]] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        option = f"{prefix}{name.replace('_', '-')}"
        if name != "config" and dataclasses.is_dataclass(hint):
            found |= numbers_of(hint, f"{option}.")
        text = inspect.formatannotation(hint)
        if (number := re.search(r"\b(int|float)\b", text)) and "Config" not in text:
            found[option] = (_range(hint), number[1] == "int")
    return found


def _range(hint: Any) -> Range | None:
    inside = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated and isinstance(inside[1], Range):
        return inside[1]
    return next(filter(None, map(_range, inside)), None)


def _words(job: str, kind: type) -> list[str]:
    """A command that lacks nothing."""
    words = job.split()
    for item in dataclasses.fields(kind):
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            positional = "POSITIONAL" in repr(typing.get_type_hints(kind, include_extras=True)[item.name]).upper()
            value = {"kind": "detection", "metric": "coco"}.get(item.name, "x")
            words.append(value if positional else f"--{item.name.replace('_', '-')}={value}")
    words = [word for word in words if not word.startswith("--config")]
    return [*words, "--config=configs/debug.py"] if "config" in typing.get_type_hints(kind) else words


_KINDS = {**JOBS, **{f"data {name}": kind for name, kind in FORMATS.items()}}
_COMMON = {"--shards", "--processes"}
CASES = [
    pytest.param(job, kind, option, id=f"{job}{option}")
    for job, kind in _KINDS.items()
    for option in numbers_of(kind)
    # The formats share theirs.
    if not (job.startswith("data ") and job != "data coco" and option in _COMMON)
]


@pytest.mark.parametrize(("job", "kind", "option"), CASES)
def test_a_number_out_of_its_range_is_refused_with_it(
    job: str, kind: type, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    range_, is_integer = numbers_of(kind)[option]
    assert range_ is not None
    odd = [value for value in ODD if value not in range_ and not (is_integer and math.isnan(value))]
    assert odd
    # Jobs with settings take half a second each.
    for value in odd[:1] if issubclass(kind, Arguments) else odd:
        assert __main__.main([*_words(job, kind), f"{option}={value}"]) == 2
        error = capsys.readouterr().err
        found = re.fullmatch(rf"{job.split()[0]}: {option}=(\S+): expected {re.escape(str(range_))}\n", error)
        assert found and (float(found[1]) == value or math.isnan(value)), error
