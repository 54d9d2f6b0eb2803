"""From `--config=configs/x.py --config.a.b=v --workdir=DIR` to typed settings.

A config file is Python with `get_config() -> Config`; tyro checks the types of what the command line overrides. Names
are looked up here first, so that a misspelling gets one line with the nearest names.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import io
import logging
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import tyro

from glip_jax import UserError
from glip_jax.config import Config, ConfigError, PathStr, current_name, flatten, renamed_hint, validate
from glip_jax.config.ranges import faults
from glip_jax.distributed import exit_codes
from glip_jax.io.assets import bundled
from glip_jax.io.paths import check_paths, checked

__all__ = ["Arguments", "CommandLineError", "split_settings", "flags", "load_config", "parse", "value_of"]


logger = logging.getLogger(__name__)


class CommandLineError(UserError, ValueError):
    """A command that cannot be understood; the message is for the person who typed it."""


@dataclass(frozen=True)
class Arguments:
    """What every job is given. A job with flags of its own derives a dataclass with those fields."""

    config: tyro.conf.FlagConversionOff[Config]
    """Settings: --config=FILE.py, then --config.section.field=value for single ones."""
    workdir: PathStr = ""
    """Folder of the run, local or gs://."""


Parsed = TypeVar("Parsed", bound=Arguments)


def parse(
    argv: Sequence[str],
    kind: type[Parsed] = Arguments,
    job: str = "JOB",
    example: str = "",
    settings: Config | None = None,
) -> Parsed:
    """Arguments of a job from its command line, settings validated.

    Tuples are written `--config.data.short_sides=480,640` (items with commas in double quotes), booleans `=True`. `example`: arguments that --help shows.
    `settings` stand where there is no --config=FILE.py. Raises CommandLineError (file missing or without get_config,
    unknown name, value of a wrong type, no --config) and ConfigError (settings that do not fit); exits with 0 for
    --help.
    """
    path, rest = _config_path(argv)
    wants_help = any(argument in ("-h", "--help") for argument in rest)
    names = [item.name for item in dataclasses.fields(kind) if item.name != "config"]
    if path is None and settings is None and not wants_help:
        # A misspelled --config is named; which settings there are is known only with it.
        _checked([argument for argument in rest if not argument.startswith("--config.")], Config(), names)
        raise CommandLineError("no settings: expected --config=configs/NAME.py")
    config = (settings or Config()) if path is None else load_config(path)
    tuples = [name for name, hint in typing.get_type_hints(kind).items() if typing.get_origin(hint) is tuple]
    rest = _checked(rest, config, names, tuples)
    example = example or "--config=configs/demo.py --config.train.steps=1000 --workdir=runs/demo"
    parsed = _parsed(kind, rest, job, example, default=kind(config=config))
    validate(parsed.config)
    _check_ranges(parsed)
    check_paths(parsed, "--")
    return parsed


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that begin with --config (and a value that follows one without "="), and the others."""
    settings, own, follows = [], [], False
    for argument in argv:
        is_setting = argument == "--config" or argument.startswith(("--config=", "--config."))
        (settings if is_setting or follows else own).append(argument)
        follows = is_setting and "=" not in argument
    return settings, own


def flags(
    argv: Sequence[str], kind: Any, job: str, example: str = "", renamed: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """An instance of the dataclass `kind` (or of one of a union of subcommands), for jobs without settings.

    `renamed`: old flags, which work until version 1.0, and their new names. Raises CommandLineError for whatever does not
    fit, with the nearest name; exits with 0 for --help.
    """
    argv = [_new_name(argument, renamed) for argument in argv]
    parts = _kinds(kind)
    names = [f"--{name.replace('_', '-')}" for part in parts for name in _options(part)]
    for argument in argv:
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option.replace("--no-", "--") not in names and option != "--help":
            _refuse(option, list(dict.fromkeys(names)))
    if len(parts) > 1 and argv and not argv[0].startswith("-"):
        commands = [re.sub(r"(?<!^)(?=[A-Z])", "-", part.__name__).lower() for part in parts]
        if argv[0] not in commands:
            near = difflib.get_close_matches(argv[0], commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(commands)}"
            raise CommandLineError(f"unknown format {argv[0]!r}; {hint}")
    hints = {name: hint for part in parts for name, hint in typing.get_type_hints(part).items()}
    parsed = _parsed(kind, [item for argument in argv for item in _integers(argument, hints)], job, example)
    _check_ranges(parsed)
    check_paths(parsed, "--")
    return parsed


def _check_ranges(parsed: Any) -> None:
    """CommandLineError for the first number that is out of the range beside its flag; settings are `validate`'s."""
    for name, hint in typing.get_type_hints(type(parsed), include_extras=True).items():
        for fault in () if name == "config" else faults(getattr(parsed, name), hint, name):
            place, _, found = fault.partition(" is ")
            option = re.sub(r"\[\d+\]$", "", place).replace("_", "-")
            raise CommandLineError(f"--{option}={found}")


def _integers(argument: str, hints: Mapping[str, Any]) -> list[str]:
    """The argument as tyro expects it: `--chunk=20,40` of a tuple of integers in several."""
    option, equals, value = argument.partition("=")
    if equals and hints.get(option.removeprefix("--").replace("-", "_")) == tuple[int, ...]:
        return [option, *_items(value)]
    return [argument]


def _new_name(argument: str, renamed: Mapping[str, str]) -> str:
    option, equals, value = argument.partition("=")
    new = renamed.get(option.replace("_", "-"))
    if new is None:
        return argument
    logger.warning("%s is renamed: use %s; the old name works until version 1.0", option, new)
    return new + equals + value


def _parsed(kind: Any, rest: list[str], job: str, example: str, **options: Any) -> Any:
    """The result of tyro; its error message, a box of several lines, as a CommandLineError of one."""
    prog = f"python -m glip_jax {job}"
    doc = inspect.cleandoc(kind.__doc__ or "") if isinstance(kind, type) else ""
    about = "\n\n".join(filter(None, [doc, f"example: {prog} {example}" if example else "", exit_codes.SHORT]))
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(kind, args=rest, prog=prog, description=about, **options)
    except SystemExit as stop:
        if not stop.code:
            sys.stderr.write(message.getvalue())
            raise
    raise CommandLineError(_one_line(message.getvalue(), rest, prog))


_TYPES = {
    "INT": "an integer",
    "FLOAT": "a number",
    "STR": "text",
    "PATH": "a path",
    "[INT [INT ...]]": "integers: 1,2,3",
}


def _one_line(box: str, arguments: Sequence[str], prog: str) -> str:
    """Tyro's box without its frame: the message, with the value and its expected type."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    # Below the title: the message, a rule, what helps. Frames are drawn in ASCII where the terminal has nothing else.
    rows = [line.strip("│╭╮╰╯| ") for line in plain.splitlines()][1:]
    rows = rows[1:] if rows and set(rows[0]) <= set("─-") else rows
    first = next((i for i, row in enumerate(rows) if row and set(row) <= set("─-")), len(rows))
    text, helped = " ".join(rows[:first]), rows[first:]
    if found := re.match(r"Error parsing (--\S+): (.*)", text):
        option, reason = found[1], found[2]
        metavar = next((row.removeprefix(option).strip() for row in helped if row.startswith(f"{option} ")), "")
        metavar = metavar.replace("{None}|", "")
        wanted = f"expected {_TYPES.get(metavar, metavar)}" if metavar else reason
        return f"{option}={value_of(option, arguments)}: {wanted}; {prog} --help lists all"
    if found := re.match(r"Unrecognized options: (\S+)", text):
        return f"unknown argument {found[1]!r}; {prog} --help lists all"
    text = re.sub(r"^Missing from [^:]*:", "missing:", text).replace(" (required)", "").rstrip(".")
    return f"{text}; {prog} --help lists all"


def value_of(option: str, arguments: Sequence[str]) -> str:
    """What the command line gives an option, its last word for it; tuples stand as several arguments."""
    for i, argument in reversed(list(enumerate(arguments))):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option.replace("_", "-"):
            following = next((k for k in range(i + 1, len(arguments)) if arguments[k].startswith("--")), len(arguments))
            return value if equals else ",".join(arguments[i + 1 : following])
    return ""


def _options(kind: type) -> list[str]:
    """Names of a dataclass' fields; those of a dataclass within as `outer.inner`."""
    types = typing.get_type_hints(kind)
    names = []
    for item in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        inner = types[item.name]
        inside = _options(inner) if dataclasses.is_dataclass(inner) and isinstance(inner, type) else []
        names += [f"{item.name}.{name}" for name in inside] or [item.name]
    return names


def _kinds(kind: Any) -> list[type]:
    """The dataclasses of a union of subcommands, or the one given."""
    if isinstance(kind, type):
        return [kind] if dataclasses.is_dataclass(kind) else []
    inner = getattr(kind, "__args__", ())
    return [found for part in inner for found in _kinds(part)]


def load_config(path: str) -> Config:
    """`get_config()` of a Python file; CommandLineError says what is wrong with the file and on which line."""
    file = Path(checked(path, "--config"))
    if not file.is_file() and not file.is_absolute() and bundled(path).is_file():
        file = bundled(path)
    if file.is_dir():
        raise CommandLineError(
            f"--config={path} is a folder: expected a Python file (*.py) with get_config() -> Config"
        )
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(str(file.parent / name) for name in near)}?" if near else ""
        raise CommandLineError(f"--config={path}: no such file{hint}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise CommandLineError(f"--config={path}: expected a Python file (*.py) with get_config() -> Config")
    module = importlib.util.module_from_spec(spec)
    try:
        with _configs_importable(file):
            spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise CommandLineError(f"--config={path}: no get_config() in the file; expected get_config() -> Config")
        config = module.get_config()
    except (CommandLineError, ConfigError):
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}{renamed_hint(str(error))}"
        raise CommandLineError(f"--config={path}{_line_of(error, file)}: {message}") from error
    if not isinstance(config, Config):
        raise CommandLineError(f"--config={path}: get_config() returned {type(config).__name__}, expected Config")
    return config


@contextlib.contextmanager
def _configs_importable(file: Path) -> Iterator[None]:
    """Within it, `from configs.demo import demo` works from any folder: of the folder `configs` that `file` lies in, else bundled."""
    top = next((parent.parent for parent in file.resolve().parents if parent.name == "configs"), None)
    before = sys.path[:]
    sys.path[:] = [*([str(top)] if top else []), *before, str(bundled("configs").parent)]
    try:
        yield
    finally:
        sys.path[:] = before


def _line_of(error: Exception, file: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f", line {lines[-1]}" if lines else ""


def _config_path(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    path, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            if path is not None:
                raise CommandLineError("--config=FILE.py is given twice")
            path = argument.partition("=")[2] or next(arguments, "")
        else:
            rest.append(argument)
    return path, rest


def _checked(arguments: Sequence[str], config: Config, flags: Sequence[str], tuples: Sequence[str] = ()) -> list[str]:
    """The arguments with tuples (of `tuples`, flags of the job, too) as tyro expects them; unknown names are refused."""
    fields = dict(flatten(config))
    result = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not option.startswith("--config."):
            name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
            if option.startswith("--") and name not in (*flags, "help"):
                _refuse(option, [f"--{flag.replace('_', '-')}" for flag in flags] + ["--config"])
            result += [option, *_items(value)] if name in tuples and equals else [argument]
            continue
        known = {name.replace("-", "_"): name for name in fields}
        given = option.removeprefix("--config.").replace("-", "_")
        name = known.get(current_name(given))
        if name is not None and current_name(given) != given:
            logger.warning("%s is renamed: use --config.%s; the old name works until version 1.0", option, name)
            option = f"--config.{name}"
            argument = option + equals + value
        if name is None:
            _refuse(option, [f"--config.{field}" for field in fields])
        elif isinstance(fields[name], tuple) and equals:
            result += [option, *_items(value)]
        else:
            result.append(argument)
    return result


def _items(text: str) -> list[str]:
    """The items of a tuple: `480,640`, `(480, 640)`, or with commas in them `"salt, pepper",mug` and `('salt, pepper', 'mug')`."""
    if text[:1] in ("(", "[") and _closing(text) == len(text) - 1:
        with contextlib.suppress(ValueError, SyntaxError):
            found = ast.literal_eval(text)
            if isinstance(found, tuple | list) and not any(isinstance(item, tuple | list | dict) for item in found):
                return [str(item) for item in found]
        text = text[1:-1]
    items = (quoted.replace('""', '"') or plain for quoted, plain in _ITEM.findall(text))
    return [item.strip() for item in items if item.strip()]


_ITEM = re.compile(r'\s*(?:"((?:[^"]|"")+)"|((?:\([^()]*\)|\[[^\[\]]*\]|[^,])*?))\s*(?:,|$)', re.DOTALL)
"""An item in double quotes, or up to the next comma outside of brackets."""


def _closing(text: str) -> int:
    """Index of the bracket that closes the one with which the text begins; -1 if none does."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if not depth:
            return index
    return -1


def _refuse(option: str, names: Sequence[str]) -> None:
    near = difflib.get_close_matches(option, names, n=3, cutoff=0.6)
    section = option.rpartition(".")[0]
    within = [name for name in names if name.startswith(f"{section}.")]
    leaf = option.rpartition(".")[2]
    near = [f"{section}.{n}" for n in difflib.get_close_matches(leaf, [n.rpartition(".")[2] for n in within])] or near
    near += [name for name in names if name.rpartition(".")[2] == leaf and name not in near][:3]
    hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(within or names)}"
    raise CommandLineError(f"unknown option {option}; {hint}")
