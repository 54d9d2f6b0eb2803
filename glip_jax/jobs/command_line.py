"""From `--config=configs/x.py --config.a.b=v --workdir=DIR` to typed settings.

A config file is Python with `get_config() -> Config`; tyro checks the types of what the command line overrides. Names
are looked up here first, so that a misspelling gets one line with the nearest names.
"""

import dataclasses
import difflib
import importlib.util
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from glip_jax.config import Config, ConfigError, flatten, validate

__all__ = ["Arguments", "CommandLineError", "load_config", "parse"]


class CommandLineError(ValueError):
    """A command that cannot be understood; the message is for the person who typed it."""


@dataclass(frozen=True)
class Arguments:
    """What every job is given. A job with flags of its own derives a dataclass with those fields."""

    config: tyro.conf.FlagConversionOff[Config]
    """Settings: --config=FILE.py, then --config.section.field=value for single ones."""
    workdir: str = ""
    """Folder of the run, local or gs://."""


Parsed = TypeVar("Parsed", bound=Arguments)


def parse(argv: Sequence[str], kind: type[Parsed] = Arguments, job: str = "JOB") -> Parsed:
    """Arguments of a job from its command line, settings validated.

    Tuples are written `--config.data.short_sides=480,640`, booleans `=True`. Raises CommandLineError (file missing or
    without get_config, unknown name, no --config) and ConfigError (settings that do not fit); exits with code 2 and
    tyro's message for a value of the wrong type, with 0 for --help.
    """
    path, rest = _config_path(argv)
    wants_help = any(argument in ("-h", "--help") for argument in rest)
    if path is None and not wants_help:
        raise CommandLineError(f"{job}: no settings: expected --config=configs/NAME.py")
    config = Config() if path is None else load_config(path)
    names = [item.name for item in dataclasses.fields(kind) if item.name != "config"]
    rest = _checked(rest, config, names)
    parsed = tyro.cli(kind, default=kind(config=config), args=rest, prog=f"python -m glip_jax {job}", description="")
    validate(parsed.config)
    return parsed


def load_config(path: str) -> Config:
    """`get_config()` of a Python file; CommandLineError says what is wrong with the file and on which line."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(str(file.parent / name) for name in near)}?" if near else ""
        raise CommandLineError(f"--config={path}: no such file{hint}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise CommandLineError(f"--config={path}: expected a Python file (*.py) with get_config() -> Config")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise CommandLineError(f"--config={path}: no get_config() in the file; expected get_config() -> Config")
        config = module.get_config()
    except (CommandLineError, ConfigError):
        raise
    except Exception as error:
        raise CommandLineError(f"--config={path}{_line_of(error, file)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise CommandLineError(f"--config={path}: get_config() returned {type(config).__name__}, expected Config")
    return config


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


def _checked(arguments: Sequence[str], config: Config, flags: Sequence[str]) -> list[str]:
    """The arguments with tuples spelled as tyro wants them; unknown names are refused with the nearest."""
    fields = dict(flatten(config))
    result = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not option.startswith("--config."):
            name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
            if option.startswith("--") and name not in (*flags, "help"):
                _refuse(option, [f"--{flag.replace('_', '-')}" for flag in flags] + ["--config"])
            result.append(argument)
            continue
        known = {name.replace("-", "_"): name for name in fields}
        name = known.get(option.removeprefix("--config.").replace("-", "_"))
        if name is None:
            _refuse(option, [f"--config.{field}" for field in fields])
        elif isinstance(fields[name], tuple) and equals:
            items = [item.strip() for item in value.strip("()[]").split(",")]
            result += [option, *(item for item in items if item)]
        else:
            result.append(argument)
    return result


def _refuse(option: str, names: Sequence[str]) -> None:
    near = difflib.get_close_matches(option, names, n=3, cutoff=0.6)
    section = option.rpartition(".")[0]
    within = [name for name in names if name.startswith(f"{section}.")]
    leaf = option.rpartition(".")[2]
    near = [f"{section}.{n}" for n in difflib.get_close_matches(leaf, [n.rpartition(".")[2] for n in within])] or near
    near += [name for name in names if name.rpartition(".")[2] == leaf and name not in near][:3]
    hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(within or names)}"
    raise CommandLineError(f"unknown setting {option}; {hint}")
