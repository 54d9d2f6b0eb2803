"""The job `doctor`: what this machine has of what the other jobs need."""

import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from glip_jax.cli import environment
from glip_jax.cli.command_line import flags
from glip_jax.distributed import exit_codes

__all__ = ["Check", "Doctor", "checks", "main"]

logger = logging.getLogger(__name__)

_DISK_GB = 5.0
_SHARED_MEMORY_GB = 1.0


@dataclass(frozen=True)
class Doctor:
    """Check Python, library versions, devices, compile cache and disks; exit code 2 if something that every job needs is missing."""


class Check(NamedTuple):
    """A line of the report."""

    state: Literal["ok", "note", "missing"]
    """missing: no job works without it; note: worth knowing, or needed by some jobs only."""
    name: str
    text: str


def main(argv: Sequence[str]) -> int:
    """Runs `doctor`; returns 0, or 2 if something is missing that every job needs."""
    flags(argv, Doctor, "doctor", "--debug")
    found = checks()
    width = max(len(check.name) for check in found)
    for check in found:
        logger.info(f"{check.state:7}  {check.name:{width}}  {check.text}")
    missing = [check.name for check in found if check.state == "missing"]
    if missing:
        logger.error(f"doctor: missing: {', '.join(missing)}; install with: {environment.install_command()}")
        return exit_codes.BAD_INPUT
    return exit_codes.DONE


def checks() -> list[Check]:
    """Everything that is looked at, in order."""
    unmet = environment.mismatches()
    found = [_python(unmet)]
    found += [
        Check("missing" if not each.found else "note", each.name, str(each).removeprefix(f"{each.name} "))
        for each in unmet
        if each.name != "Python"
    ]
    if not unmet:
        found.append(Check("ok", "libraries", f"{len(environment.required())} requirements met, {_versions()}"))
    found += [_extra(name, lines) for name, lines in environment.extras().items()]
    found.append(_libtpu())
    if all(each.found for each in unmet):
        found.append(_devices())
    found.append(_compile_cache())
    found += [
        _disk("disk of this folder", Path.cwd(), _DISK_GB),
        _disk("temporary files", Path(tempfile.gettempdir()), 1.0),
    ]
    if Path("/dev/shm").is_dir():
        # Workers pass batches through it; a container has 64 MB by default.
        found.append(_disk("shared memory", Path("/dev/shm"), _SHARED_MEMORY_GB))
    return found


def _python(unmet: Sequence[environment.Mismatch]) -> Check:
    old = [each for each in unmet if each.name == "Python"]
    text = f"{platform.python_version()}, {sys.executable}"
    return Check("missing", "Python", f"{text}, expected {old[0].expected}") if old else Check("ok", "Python", text)


def _versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint", "grain"))


def _extra(name: str, lines: Sequence[str]) -> Check:
    unmet = environment.mismatches(lines)
    text = "installed" if not unmet else "; ".join(map(str, unmet))
    return Check("note" if unmet else "ok", f"extra {name}", text)


def _libtpu() -> Check:
    try:
        return Check("ok", "libtpu", metadata.version("libtpu"))
    except metadata.PackageNotFoundError:
        return Check(
            "note", "libtpu", "not installed; a TPU and `plan` with the TPU's compiler need requirements-tpu.txt"
        )


def _devices() -> Check:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # what jax raises where a backend cannot start
        return Check("missing", "devices", " ".join(str(error).split()))
    kinds = sorted({device.device_kind for device in devices})
    return Check(
        "ok", "devices", f"{len(devices)} of {devices[0].platform} ({', '.join(kinds)}), {os.cpu_count()} CPU cores"
    )


def _compile_cache() -> Check:
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "glip_jax" / "jax")
    files = [path.stat().st_size for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    parent = next(path for path in [folder, *folder.parents] if path.exists())
    if not os.access(parent, os.W_OK):
        return Check("note", "compile cache", f"{folder} cannot be written: every start compiles again")
    return Check("ok", "compile cache", f"{folder}, {len(files)} programs, {sum(files) / 1e6:.0f} MB")


def _disk(name: str, folder: Path, expected: float) -> Check:
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{folder}, {free:.1f} GB free"
    return (
        Check("ok", name, text)
        if free >= expected
        else Check("note", name, f"{text}, expected {expected:g} GB or more")
    )
