"""Compares the installed libraries with the requirements, before anything heavy is imported."""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

__all__ = ["PYTHON", "Mismatch", "absent", "extras", "install_command", "mismatches", "required", "warning"]

PYTHON = (3, 11)
"""The oldest Python, as in pyproject.toml."""

_ROOT = Path(__file__).resolve().parents[2]


class Mismatch(NamedTuple):
    """A requirement that is not met."""

    name: str
    found: str
    """The installed version; "" if the library is not installed."""
    expected: str
    """The specifier, such as `<0.11,>=0.10.1`; "" for any version."""

    def __str__(self) -> str:
        found = f"is {self.found}" if self.found else "is not installed"
        return f"{self.name} {found}, expected {self.expected or 'any version'}"


def required() -> list[str]:
    """The requirements of the package, from requirements.txt in a checkout, else from the installed package's metadata."""
    if _in_checkout():
        return _lines(_ROOT / "requirements.txt")
    return [line for line in _metadata() if not _extra(line)]


def extras() -> Mapping[str, list[str]]:
    """The requirements of each extra by its name: requirements-NAME.txt, else the installed package's metadata."""
    if _in_checkout():
        files = sorted(_ROOT.glob("requirements-*.txt"))
        return {file.stem.removeprefix("requirements-"): _lines(file) for file in files}
    found: dict[str, list[str]] = {}
    for line in _metadata():
        if name := _extra(line):
            found.setdefault(name, []).append(line.partition(";")[0].strip())
    return found


def mismatches(requirements: Iterable[str] | None = None) -> list[Mismatch]:
    """The requirements that are not met.

    `requirements`: lines as in requirements.txt; None is `required()` and jaxlib as jax requires it, because another
    version of that fails with a traceback when it is imported.
    """
    if sys.version_info < PYTHON:
        return [Mismatch("Python", ".".join(map(str, sys.version_info[:3])), f">={PYTHON[0]}.{PYTHON[1]}")]
    try:
        import packaging.requirements
    except ImportError:
        return [Mismatch("packaging", "", "")]
    del packaging
    if requirements is not None:
        return _unmet(requirements)
    found = _unmet(required())
    if not any(mismatch.name == "jax" for mismatch in found):
        found += _unmet(
            line for line in metadata.requires("jax") or [] if line.startswith("jaxlib") and not _extra(line)
        )
    return found


def absent(found: Sequence[Mismatch]) -> str:
    """One line about what makes every job impossible (a library that is not installed, an old Python); "" if nothing does."""
    python = [mismatch for mismatch in found if mismatch.name == "Python"]
    if python:
        version = f"python{PYTHON[0]}.{PYTHON[1]}"
        return f"environment: {python[0]}; make an environment with: {version} -m venv .venv"
    missing = [mismatch for mismatch in found if not mismatch.found]
    return f"environment: {'; '.join(map(str, missing))}; install with: {install_command()}" if missing else ""


def warning(found: Sequence[Mismatch]) -> str:
    """One line about libraries of other versions than the requirements name."""
    return f"environment: {'; '.join(map(str, found))}; `python -m glip_jax doctor` says more"


def install_command() -> str:
    """The command that installs what the package requires."""
    if _in_checkout():
        arguments = f"-r {shlex.quote(str(_ROOT / 'requirements.txt'))}"
    else:
        arguments = shlex.join(line.partition(";")[0].strip() for line in required())
    return f"{shlex.quote(sys.executable)} -m pip install {arguments}"


def _in_checkout() -> bool:
    return (_ROOT / "requirements.txt").is_file() and (_ROOT / "pyproject.toml").is_file()


def _lines(file: Path) -> list[str]:
    lines = (line.partition("#")[0].partition(" --")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def _metadata() -> list[str]:
    try:
        return metadata.requires("glip_jax") or []
    except metadata.PackageNotFoundError:
        return []


def _unmet(lines: Iterable[str]) -> list[Mismatch]:
    from packaging.requirements import Requirement

    found = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": _extra(line)}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            found.append(Mismatch(requirement.name, version, str(requirement.specifier)))
        elif requirement.extras:
            of_library = metadata.requires(requirement.name) or []
            found += _unmet(line for line in of_library if _extra(line) in requirement.extras)
    return found


def _extra(line: str) -> str:
    """The extra that a line of a package's metadata belongs to; "" for none."""
    return line.rpartition("extra ==")[2].strip(" '\")") if "extra ==" in line else ""
