"""The files of a working folder beside its checkpoints: settings, what step 0 was read from, accepted changes.

    WORKDIR/config.json         the settings of the latest start, flat
    WORKDIR/started_from.json   what the parameters of step 0 were read from, with hashes
    WORKDIR/phases.json         every accepted change of settings, with its step
    WORKDIR/sources.json        hashes of the content of the data sources, by name

Paths may be local or gs://.
"""

import errno
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from glip_jax import UserError
from glip_jax.config import Config, differences, flatten
from glip_jax.io import fsspec_gcs
from glip_jax.io.errors import full_disk
from glip_jax.io.gcs import StorageError
from glip_jax.io.paths import checked
from glip_jax.io.provenance import source_hash

logger = logging.getLogger(__name__)

__all__ = [
    "CheckpointError",
    "check_config",
    "check_network",
    "check_shared",
    "check_sources",
    "on_first_process",
    "join_lines",
    "workdir_path",
    "flat_settings",
    "prepare",
    "started_from",
    "write_config",
    "write_started_from",
    "write_atomic",
]


_VISIBLE_SECONDS = 15.0
"""After which a file that another host wrote is seen in a folder that they share, whatever that caches."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that does not exist, does not fit the model, or was made with other settings."""


def workdir_path(workdir: str) -> epath.Path:
    """The folder as a path; requests to gs:// are retried."""
    if "://" in checked(workdir):
        fsspec_gcs.install()
    return epath.Path(workdir)


def prepare(workdir: str) -> None:
    """Creates the working folder and tries to write in it; CheckpointError if that fails."""
    if not _first_process():
        return
    folder = workdir_path(workdir)
    probe = folder / f".written-by-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except (OSError, ImportError) as error:
        if full_disk(error) or (isinstance(error, StorageError) and error.errno == errno.ETIMEDOUT):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise CheckpointError(
            f"--workdir={workdir} cannot be written ({reason}): expected a folder, or the name of one that can be created"
        ) from None


def check_shared(workdir: str) -> None:
    """Checks that every process sees the working folder that process 0 prepared, and can write there.

    Else raises CheckpointError, everywhere, with the hosts that do not.
    """
    import jax  # only now: jobs that read working folders do not need it
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    folder, index = workdir_path(workdir), jax.process_index()
    name = f".seen-from-{secrets.token_hex(8)}" if index == 0 else ""
    if index == 0:
        (folder / name).write_text("")
    name = (
        bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(name.encode().ljust(32), np.uint8))).decode().strip()
    )
    fault = ""
    try:
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while index and not (folder / name).exists():
            if time.monotonic() > deadline:
                raise OSError("")
            time.sleep(0.2)
        if index:
            (folder / f"{name}-{index}").write_text("")
            (folder / f"{name}-{index}").unlink()
    except OSError as error:
        fault = (
            error.strerror and f"cannot write there ({error.strerror})"
        ) or "does not see what process 0 wrote there"
        fault = f"process {index} on {socket.gethostname()} {fault}"
    rows = np.frombuffer(fault.encode()[:240].ljust(240), np.uint8)
    found = [bytes(row).decode(errors="replace").strip() for row in multihost_utils.process_allgather(rows)]
    if index == 0:
        (folder / name).unlink(missing_ok=True)
    if faults := [text for text in found if text]:
        raise CheckpointError(
            f"--workdir={workdir} is not one folder for all processes: {join_lines(faults, 4)}: give a folder that all hosts share, "
            "by its absolute path, or gs://"
        )


def on_first_process(act: Callable[[], None]) -> None:
    """Lets process 0 act while the others wait; if it raises CheckpointError, all of them do."""
    import jax
    from jax.experimental import multihost_utils

    fault: CheckpointError | None = None
    if jax.process_index() == 0:
        try:
            act()
        except CheckpointError as error:
            fault = error
    if jax.process_count() > 1 and not multihost_utils.broadcast_one_to_all(np.int32(fault is None)):
        fault = fault or CheckpointError("the working folder cannot be used: process 0 says why")
    if fault is not None:
        raise fault


def _first_process() -> bool:
    import jax  # only now: jobs that read working folders do not need it

    return jax.process_index() == 0


def check_config(workdir: str, step: int, saved: Mapping[str, Any], config: Config, *, accept: bool) -> list[str]:
    """Compares the settings of checkpoint `step` with `config`; returns the lines of what changes numbers.

    Differences are refused with CheckpointError unless `accept`, which records them in `workdir`/phases.json.
    Settings that change no number (cadence, workers, mesh) may differ freely.
    """
    lines = differences(dict(saved), config)
    if not lines:
        return []
    if not accept:
        ordered = sorted(lines, key=lambda line: not line.startswith("model."))
        network = ordered[0].startswith("model.")
        raise CheckpointError(
            f"{workdir} holds step {step} of a run with {'another network' if network else 'other settings'} "
            f"(saved -> given: {join_lines(ordered)}): give the old settings to go on with that run, a new --workdir to start "
            "another, or --resume-with-changes to continue from that step as a new, recorded phase"
            + (" (not where that changes the shape of a parameter)" if network else "")
        )
    _record_phase(workdir, step, lines)
    return lines


def _record_phase(workdir: str, step: int, lines: list[str]) -> None:
    if _first_process():  # the others read nothing: they would read what this one is writing
        phases, phase = _phases(workdir), {"step": step, "differences": lines}
        if phase not in phases:
            write_atomic(workdir_path(workdir) / "phases.json", json.dumps([*phases, phase], indent=1))


def check_sources(workdir: str, step: int | None, config: Config, *, accept: bool) -> list[str]:
    """Compares the content of the data sources with that of the run so far, and records it in `workdir`/sources.json.

    `step`: of the checkpoint, None for a run that begins. Another content under the same name is refused with CheckpointError
    unless `accept`; returns the lines of what changed. Sources that cannot be read are not compared (a run that has finished needs
    no data), nor are those of runs of earlier versions, which recorded none.
    """
    path = workdir_path(workdir) / "sources.json"
    known = json.loads(path.read_text()) if step is not None and path.exists() else {}
    found = {name: source_hash(source.path) for name, source in config.data.sources.items()}
    found = {name: digest for name, digest in found.items() if digest}
    changed = [name for name, digest in found.items() if known.get(name, digest) != digest]
    lines = [f"data.sources.{name}: content {known[name][:12]} -> {found[name][:12]}" for name in changed]
    if lines and not accept:
        raise CheckpointError(
            f"{workdir} holds step {step} of a run with other data (then -> now: {join_lines(lines)}): give a new --workdir to train on "
            "what lies there now, or --resume-with-changes to continue from that step as a new, recorded phase"
        )
    if lines and step is not None:
        _record_phase(workdir, step, lines)
    if _first_process() and known != known | found:
        write_atomic(path, json.dumps(known | found, indent=1))
    return lines


def _phases(workdir: str) -> list[dict[str, Any]]:
    """The accepted changes so far. A damaged phases.json is set aside as phases.json.damaged, which a warning says."""
    path = workdir_path(workdir) / "phases.json"
    if not path.exists():
        return []
    try:
        phases = json.loads(path.read_bytes())
        if isinstance(phases, list):
            return phases
        reason = f"a {type(phases).__name__}, not a list"
    except ValueError as error:
        reason = str(error)
    aside = path.parent / "phases.json.damaged"
    path.rename(aside)
    logger.warning("%s is damaged (%s): set aside as %s, changes are recorded anew", path, reason, aside)
    return []


def check_network(workdir: str, saved: dict[str, Any], config: Config) -> None:
    """Raises CheckpointError if `config` describes another network than the flat settings `saved` of a checkpoint.

    The path of the vocabulary and how the network is computed may differ.
    """
    free = ("model.text.vocabulary:", "model.dtype:", "model.remat:", "model.head.unroll:", "model.trainable:")
    changed = [line for line in differences(saved, config) if line.startswith("model.") and not line.startswith(free)]
    if changed:
        raise CheckpointError(
            f"{workdir} holds a checkpoint of another network than the settings say (saved -> given: {join_lines(changed)}): "
            "give the settings that it was trained with"
        )


def write_config(workdir: str, config: Config) -> None:
    """Writes the resolved settings, flat, to `workdir`/config.json."""
    if _first_process():
        folder = workdir_path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.json", json.dumps(flat_settings(config), indent=1, sort_keys=True))


def write_started_from(workdir: str, record: Mapping[str, Any]) -> None:
    """Writes the record of what step 0 was read from to `workdir`/started_from.json; an empty record removes the file."""
    path = workdir_path(workdir) / "started_from.json"
    if record:
        write_atomic(path, json.dumps(record, indent=1))
    else:
        path.unlink(missing_ok=True)


def started_from(workdir: str) -> dict[str, Any] | None:
    """The record of what step 0 was read from; None if there is none, as for random values, or if it is damaged (a warning)."""
    path = workdir_path(workdir) / "started_from.json"
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except ValueError as error:
        logger.warning("%s is damaged (%s): left out", path, error)
        return None


def flat_settings(config: Config) -> dict[str, Any]:
    """The settings, flat, with lists in place of tuples, as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config)}


def join_lines(lines: list[str], most: int = 8) -> str:
    """The first lines joined into one, for a message of one line."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def write_atomic(path: epath.Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it, so that no reader sees half of it; a bucket shows whole files only."""
    data = content.encode() if isinstance(content, str) else content
    if "://" in str(path):
        path.write_bytes(data)
        return
    aside = path.parent / f"{path.name}.unfinished"
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
