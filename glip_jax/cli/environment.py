"""Is what is installed what was asked for? Looked at before anything heavy is imported, so it imports next to nothing."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

__all__ = ["PYTHON", "fault", "wanted"]

PYTHON = (3, 11)
"""The oldest Python, as in pyproject.toml."""


_ROOT = Path(__file__).resolve().parents[2]


def wanted() -> tuple[list[str], str]:
    """The requirements of the package and the arguments of pip that install them.

    From requirements.txt in a checkout, else from the installed package's own metadata.
    """
    file = _ROOT / "requirements.txt"
    if file.is_file() and (_ROOT / "pyproject.toml").is_file():
        lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
        return [line for line in lines if line and not line.startswith("-")], f"-r {shlex.quote(str(file))}"
    try:
        lines = metadata.requires("glip_jax") or []
    except metadata.PackageNotFoundError:
        return [], ""
    return lines, shlex.join(line.partition(";")[0].strip() for line in lines if "extra ==" not in line)


def fault(requirements: Sequence[str] | None = None) -> str:
    """One line about all that is missing or of a wrong version, with the command that mends it; "" if nothing is.

    `requirements`: lines as in requirements.txt; None is `wanted()`. What jax asks of its own parts (jaxlib) counts
    as well, as a mismatch there fails only at its import, with a traceback.
    """
    if sys.version_info < PYTHON:
        found, least = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, PYTHON))
        return f"environment: Python is {found}, expected {least} or newer; make one with: python{least} -m venv .venv"
    lines, arguments = wanted()
    mend = f"{shlex.quote(sys.executable)} -m pip install {arguments}"
    try:
        import packaging.requirements
    except ImportError:
        return f"environment: packaging is not installed; mend it with: {mend}"
    del packaging
    found = list(_wrong(lines if requirements is None else requirements))
    if not any(text.startswith("jax ") for text in found):
        found += _wrong(line for line in metadata.requires("jax") or [] if line.startswith("jaxlib"))
    return f"environment: {'; '.join(found)}; mend it with: {mend}" if found else ""


def _wrong(lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """For each requirement that is not met: name, what is installed, what is expected."""
    from packaging.requirements import Requirement

    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        expected = f"expected {requirement.specifier}" if str(requirement.specifier) else "expected any version"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{requirement.name} is not installed, {expected}"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, {expected}"
