"""Tables of the reference, made from the dataclasses when the site is built.

A page holds a comment `<!-- generated: NAME -->`; the comment is replaced with Markdown before the page is parsed:

    settings    every setting of `Config`, a table a section
    jobs        every job of `python -m glip_jax` with its own flags, every format of the job `data` with its options
    joblist     rows of a table: every job and what it does
    renamed     settings and metrics that had another name in earlier versions
    schema      every field of a record and of a manifest
    published   what gcs/manifests says of published data sets
    benchmark   every set of the job `benchmark`: files, prompts, metrics, licence
    peers       published numbers on these sets
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tyro
from sphinx.application import Sphinx

from glip_jax.__main__ import _MODULES, JOBS
from glip_jax.config import Config
from glip_jax.config.ranges import Range
from glip_jax.config.saved import RENAMED_KEYS
from glip_jax.data.manifest import Manifest
from glip_jax.data.records import Record
from glip_jax.evaluation.benchmark.sets import BenchmarkSet
from glip_jax.evaluation.benchmark.table import GROUPS, SETS

__all__ = ["setup"]

_ROOT = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"<!-- generated: (\w+) -->")

_STORED = {
    "boxes": "N x 4 float32, little-endian",
    "spans": "per box a list of (begin, end)",
    "unknown": "per phrase a list of (begin, end)",
}
"""Types of a record's fields that their annotations say too generally."""


class _ParserReachedError(BaseException):
    """Leaves a job where its command line would be parsed. No Exception, so that no job handles it."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the replacement of the comments."""
    app.connect("source-read", _replace)
    return {"parallel_read_safe": True}


def _replace(_: Sphinx, __: str, source: list[str]) -> None:
    tables: dict[str, Callable[[], str]] = {
        "settings": _settings,
        "jobs": _jobs,
        "joblist": _joblist,
        "renamed": _renamed,
        "schema": _schema,
        "published": _published,
        "benchmark": _benchmark,
        "peers": _peers,
    }
    source[0] = _MARK.sub(lambda found: tables[found[1]](), source[0])


def _settings() -> str:
    """A heading and a table for `Config` and every dataclass within it."""
    return "\n".join(_section(Config, "", True))


def _section(kind: type, prefix: str, affects: bool) -> Iterator[str]:
    types, texts, inner = typing.get_type_hints(kind, include_extras=True), _texts(kind), []
    yield f"\n## `{prefix.rstrip('.') or 'Config'}`\n\n{_prose(kind)}\n"
    rows = []
    for item in dataclasses.fields(kind):
        below = _dataclass_in(types[item.name])
        counts = affects and item.metadata.get("affects_results", item.metadata.get("numbers", True))
        if below is not None:
            entry = "NAME." if typing.get_origin(types[item.name]) is dict else ""
            inner.append((below, f"{prefix}{item.name}.{entry}", counts))
        else:
            rows.append(
                (
                    f"`{item.name}`",
                    _type(types[item.name]),
                    _default(item),
                    "yes" if counts else "no",
                    texts.get(item.name, ""),
                )
            )
    if rows:
        yield _table(("setting", "type and range", "default", "affects results", "meaning"), rows)
    for below, name, counts in inner:
        yield from _section(below, name, counts)


def _jobs() -> str:
    """A heading, the description and a table of flags for every job."""
    lines = []
    for job in JOBS:
        kind = _arguments_of(job)
        parts = _subcommands(kind)
        lines.append(f"\n## `{job}`\n")
        if not parts:
            lines += [_prose(kind), _takes_config(kind), _flags(kind, set())]
            continue
        shared = _shared([part for _, part in parts])
        base = next(
            part for part in parts[0][1].__mro__ if shared <= set(_names(part)) and not set(_names(part)) - shared
        )
        lines += [
            f"{JOBS[job][:1].upper()}{JOBS[job][1:]}: `{job} FORMAT ...`. Flags of every format:\n",
            _flags(base, set()),
        ]
        for name, part in parts:
            lines += [f"\n### `{job} {name}`\n\n{_prose(part)}\n", _flags(part, shared)]
    return "\n".join(lines)


def _joblist() -> str:
    """The rows of the table of jobs."""
    return "\n".join(f"| [`{job}`](#{job}) | {what} |" for job, what in JOBS.items())


def _published() -> str:
    """A table of the counts that imports are compared with."""
    rows = []
    for path in sorted((_ROOT / "gcs" / "manifests").glob("*.json")):
        fields = json.loads(path.read_text())
        counts = [
            f"{fields['counts'][key]:,}" if key in fields["counts"] else "" for key in ("records", "boxes", "names")
        ]
        units = "; ".join(f"{what}: {unit}" for what, unit in fields.get("units", {}).items())
        rows.append((fields["title"], *counts, units))
    return _table(("set", "records", "boxes", "names", "counted are"), rows)


def _benchmark() -> str:
    """A table of the benchmark's sets; of ODinW and RF100-VL, which have many, the first."""
    rows = []
    for item in _shown(SETS.values()):
        files = "<br>".join(
            f"{each.role}: `{each.paths[0]}`{' (not needed)' if each.optional else ''}" for each in item.files
        )
        modes = "<br>".join(
            f"`{mode.name}`: {mode.boxes} boxes, {mode.chunk or 'as many as fit'} a prompt{'' if mode.default else ', on request'}"
            for mode in item.modes
        )
        counts = ", ".join(f"{count:,} {what}" for what, count in {**item.counts, **item.reported}.items())
        rows.append(
            (
                f"`{item.name}`",
                files,
                item.prompt_rule,
                modes,
                ", ".join(metric.label for metric in item.metrics),
                counts or "not known",
                item.licence,
            )
        )
    return _table(("set", "files below --data", "prompt", "asked", "metrics", "expected", "licence"), rows)


def _peers() -> str:
    """A table of published numbers."""
    rows = [
        (f"`{owner}`", each.model, each.mode, each.metric, each.key, f"{each.value:g}", each.source)
        for owner, published in [
            *((item.name, item.published) for item in SETS.values()),
            *((g.name, g.published) for g in GROUPS.values()),
        ]
        for each in published
    ]
    return _table(("set", "model", "asked", "metric", "number", "%", "source"), rows)


def _shown(items: Iterable[BenchmarkSet]) -> Iterator[BenchmarkSet]:
    families = set()
    for item in items:
        family = item.name.split("_")[0] if item.name.startswith(("odinw", "rf100vl")) else item.name
        if family not in families:
            yield item
        families.add(family)


def _renamed() -> str:
    """A table of old and new names."""
    rows = [(f"`{old}`", f"`{new}`", "metric" if "/" in old else "setting") for old, new in RENAMED_KEYS.items()]
    return _table(("until now", "today", "what it is"), rows)


def _arguments_of(job: str) -> Any:
    """The dataclass (or union of dataclasses) that the job has its command line parsed into."""
    found: list[Any] = []

    def record(kind: Any, *_: Any, **__: Any) -> None:
        found.append(kind)
        raise _ParserReachedError

    before, tyro.cli = tyro.cli, record  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with contextlib.suppress(_ParserReachedError):
            importlib.import_module(f"glip_jax.cli.{_MODULES.get(job, job)}").main(["--help"])
    finally:
        tyro.cli = before  # pyright: ignore[reportAttributeAccessIssue]
    return found[0]


def _subcommands(kind: Any) -> list[tuple[str, type]]:
    """(name, dataclass) of each subcommand; none for a job without."""
    if isinstance(kind, type):
        return []
    return [(part.__metadata__[0].name, typing.get_args(part)[0]) for part in typing.get_args(kind)]


def _shared(kinds: list[type]) -> set[str]:
    return set.intersection(*(set(_names(kind)) for kind in kinds))


def _names(kind: type) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _takes_config(kind: Any) -> str:
    takes = dataclasses.is_dataclass(kind) and _dataclass_in(typing.get_type_hints(kind).get("config")) is Config
    return (
        "Takes `--config=FILE.py` and every [setting](settings.md) as `--config.section.field=value`.\n"
        if takes
        else ""
    )


def _flags(kind: Any, without: set[str], prefix: str = "") -> str:
    """A table of the flags of a dataclass; "" where there are none."""
    rows = list(_flag_rows(kind, without | {"config"}, prefix))
    return _table(("flag", "type", "default", "meaning"), rows) if rows else "No further flags.\n"


def _flag_rows(kind: Any, without: set[str], prefix: str) -> Iterator[tuple[str, ...]]:
    types, texts = typing.get_type_hints(kind, include_extras=True), _texts(kind)
    for item in dataclasses.fields(kind):
        if item.name in without:
            continue
        below = _dataclass_in(types[item.name])
        if below is not None:
            yield from _flag_rows(below, set(), f"{prefix}{item.name}.")
            continue
        marks = list(_marks(types[item.name]))
        given = [mark for mark in marks if hasattr(mark, "metavar") and hasattr(mark, "aliases")]
        flag = f"--{prefix}{item.name.replace('_', '-')}"
        names = [f"`{flag}`"] + [f"`{alias}`" for mark in given for alias in (mark.aliases or ())]
        if any(mark is tyro.conf.Positional or "Positional" in str(mark) for mark in marks):
            names = [f"`{next((mark.metavar for mark in given if mark.metavar), item.name.upper())}`"]
        text = next((mark.help for mark in given if isinstance(mark.help, str)), "") or texts.get(item.name, "")
        if typing.get_type_hints(kind)[item.name] is bool and names[0].startswith("`--"):
            names.append(f"`--no-{flag[2:]}`")
        yield ", ".join(names), _type(typing.get_type_hints(kind)[item.name]), _default(item), text


def _marks(hint: Any) -> Iterator[Any]:
    """What `Annotated` says of a type, nested ones and tuples of marks taken apart."""
    for mark in getattr(hint, "__metadata__", ()):
        yield from mark if isinstance(mark, tuple) else (mark,)
    if hasattr(hint, "__metadata__"):
        yield from _marks(typing.get_args(hint)[0])


def _schema() -> str:
    """The fields of a record and of a manifest in one table."""
    rows = []
    for where, kind in (("record", Record), ("`manifest.json`", Manifest)):
        types, texts = typing.get_type_hints(kind), _texts(kind)
        for item in dataclasses.fields(kind):
            kind_of = _STORED.get(item.name, "") if where == "record" else ""
            rows.append((where, f"`{item.name}`", kind_of or _type(types[item.name]), texts.get(item.name, "")))
    return _table(("where", "field", "type", "meaning"), rows)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field holds, itself or as the values of a dict."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is dict:
        hint = typing.get_args(hint)[1]
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _texts(kind: type) -> dict[str, str]:
    """Field name -> the string that stands below the field, of the class and its bases."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each) or each.__module__ not in sys.modules:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = inspect.cleandoc(str(text.value.value))  # pyright: ignore[reportAttributeAccessIssue]
    return texts


def _prose(kind: Any) -> str:
    """The docstring of a dataclass, "" for the signature that Python puts in its place."""
    text = inspect.cleandoc(kind.__doc__ or "")
    if text.startswith(f"{kind.__name__}("):
        return ""
    blocks = (_block(list(lines), code) for code, lines in _runs(text.splitlines()))
    return "\n".join(blocks) + "\n"


def _runs(lines: list[str]) -> Iterator[tuple[bool, Iterator[str]]]:
    """Runs of lines of code (indented, or an example to its paragraph's end) and of prose."""
    example, codes = False, []
    for line in lines:
        example = bool(line) and (example or line.startswith("example:"))
        codes.append(example or line.startswith("  "))
    for code, pairs in itertools.groupby(zip(codes, lines), key=lambda pair: pair[0]):
        yield code, (line for _, line in pairs)


def _block(lines: list[str], code: bool) -> str:
    if not code:
        return _escaped("\n".join(lines))
    text = "\n".join(textwrap.dedent("\n".join(lines)).splitlines()).removeprefix("example: ")
    return f"\n```text\n{text}\n```\n"


def _escaped(text: str) -> str:
    """Prose in which nothing but backticks is markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]|])", r"\\\1", part) for part in parts)


def _type(hint: Any) -> str:
    """A type as the command line takes it."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return ", ".join([_type(inside[0]), *(str(mark) for mark in hint.__metadata__ if isinstance(mark, Range))])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        return f"list of {_type(inside[0])}" if inside[-1:] == (...,) else f"{len(inside)} x {_type(inside[0])}"
    if origin is dict:
        return f"{_type(inside[0])} → {_type(inside[1])}"
    if inside:
        return " or ".join(_type(part) for part in inside)
    plain = {str: "text", int: "int", float: "float", bool: "bool", type(None): "none", bytes: "bytes"}
    return plain.get(hint, "any" if hint is typing.Any else getattr(hint, "__name__", str(hint)).lower())


def _default(item: "dataclasses.Field[Any]") -> str:
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return "required"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`" if value else "empty"
    if isinstance(value, Path) and value.is_relative_to(_ROOT):
        value = value.relative_to(_ROOT)
    if isinstance(value, float):
        value = f"{value:.6g}"
    if isinstance(value, str) and value != value.strip():
        value = f'"{value}"'
    return {"": "empty", "{}": "empty", "None": "none"}.get(str(value), f"`{value}`")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        *cells, text = row
        lines.append("| " + " | ".join([*cells, _escaped(" ".join(text.split()))]).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"
