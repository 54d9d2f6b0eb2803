"""The check of every path that a user gives: flags, settings, and names of files inside of data.

Paths are local, or gs://BUCKET/NAME. Settings that name a file of weights or a vocabulary may also be package:NAME/inner/file.
"""

import dataclasses
import os
import posixpath
import re
import typing
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from etils import epath

from glip_jax import UserError
from glip_jax.config.data import ASSET, PATH

__all__ = ["OutsideError", "PathError", "check_paths", "checked", "paths_of", "within"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_REMOTE_COPY = re.compile(r"[\w.-]+@[\w.-]+:")
_READ = "local paths and gs://BUCKET/NAME are read"


class PathError(UserError):
    """A path of a kind that is not read."""


class OutsideError(UserError, OSError):
    """The name of a file inside of data that leads out of the folder it belongs to."""


def checked(path: epath.PathLike, name: str = "", *, package: bool = False) -> str:
    """The path as text if it is of a kind that is read.

    `name`: the flag or setting, for the message. `package`: whether package:NAME/inner/file is read too. Raises PathError for
    other schemes (https://, s3://, file://, ...), paths of Windows, addresses of scp, a leading ~, and null characters.
    """
    text = os.fspath(path)
    fault = _fault(text, package)
    if fault:
        shown = _printable(re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", text))  # pathlib removes one slash
        raise PathError(f"{name}{'=' if name else ''}{shown}: {fault}")
    return text


def _fault(text: str, package: bool) -> str:
    """Why a path is not read, and what to do; "" if it is."""
    if "\0" in text:
        return "it holds a null character, which no path has"
    if _WINDOWS.match(text):
        return f"a path of Windows is not read; {_READ}: write the path as this system does (/mnt/c/... in WSL)"
    if text == "~" or re.match(r"~[\w.-]*/", text):
        return "~ is not replaced here, only the shell does that, at the beginning of a word: write $HOME or the whole path"
    if text.startswith("package:"):
        return (
            "" if package else "package: is read for files of weights and vocabularies only; give a local path or gs://"
        )
    if _REMOTE_COPY.match(text):
        return f"an address of another host is not read; {_READ}: copy it to this machine first"
    match = _SCHEME.match(text)
    if not match:
        return ""
    scheme, rest = match[1], match[2].lstrip("/")
    if scheme == "gs":
        return ""
    match scheme.lower():
        case "gs" | "gcs":
            return f"{scheme}:// is not read; {_READ}: write gs://{rest}"
        case "file":
            return f"file:// is not read; {_READ}: write /{rest}"
        case "http" | "https" | "ftp":
            return f"{scheme}:// is not read; {_READ}: download it first"
        case _:
            return f"{scheme}:// is not read; {_READ}: copy it to a local disk or a bucket first"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


def check_paths(settings: Any, prefix: str = "") -> None:
    """Checks all paths in a dataclass of flags or settings; raises PathError for the first that is not read.

    `prefix`: what stands before a field's name in the message, such as --.
    """
    for name, value, package in paths_of(settings):
        # Settings are written with the underscores of their fields, flags with dashes.
        checked(value, prefix + (name if "." in name else name.replace("_", "-")) if name else "", package=package)


def paths_of(settings: Any) -> Iterator[tuple[str, str, bool]]:
    """Yields (name, path, whether package: is read) for every path in a dataclass of flags or settings that is not empty.

    Paths are fields of a type of pathlib or epath, and those marked as `config.PathStr` or `config.AssetStr`. The name of a
    positional argument is empty.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for item in dataclasses.fields(settings):
        marks = list(_marks(hints[item.name]))
        name = "" if any("POSITIONAL" in repr(mark).upper() for mark in marks) else item.name
        yield from _paths_in(getattr(settings, item.name), name, marks)


def _paths_in(value: Any, name: str, marks: list[Any]) -> Iterator[tuple[str, str, bool]]:
    if dataclasses.is_dataclass(value):
        for inner, path, package in paths_of(value):
            yield f"{name}.{inner}", path, package
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _paths_in(item, f"{name}.{key}", marks)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _paths_in(item, name, marks)
    elif isinstance(value, PurePath | epath.Path) or (isinstance(value, str) and value and {PATH, ASSET}.intersection(
        mark for mark in marks if isinstance(mark, str)
    )):  # fmt: skip
        yield name, os.fspath(value), ASSET in marks


def _marks(hint: Any) -> Iterator[Any]:
    """What `Annotated` says of a type and of the types in it."""
    yield from getattr(hint, "__metadata__", ())
    for inner in typing.get_args(hint):
        yield from _marks(inner)


def within(folder: epath.Path, name: str) -> epath.Path:
    """The file called `name` below `folder`; OutsideError if the name leads out of it, by `..` or as an absolute path."""
    if name.startswith("/"):
        plain = posixpath.relpath(name, os.path.abspath(folder)) if "://" not in os.fspath(folder) else ".."
    else:
        plain = posixpath.normpath(name)
    if plain == ".." or plain.startswith("../") or "\0" in name:
        raise OutsideError(f"{_printable(name)} leads out of {folder}: expected a path below that folder")
    return folder / name
