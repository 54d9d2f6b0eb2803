"""The checkpoint folders of a run: which are complete, which are damaged. `glip_jax.io.checkpoint` reads and writes what they hold."""

import json
import logging
from collections.abc import Mapping, Sequence

from etils import epath

from glip_jax.io import checksums
from glip_jax.io.workdir import CheckpointError, join_lines, workdir_path

logger = logging.getLogger(__name__)

__all__ = [
    "METADATA",
    "checkpoint_folder",
    "complete_steps",
    "damage_of",
    "is_workdir",
    "latest_step",
    "newest",
    "clean_up",
    "unfinished",
]

_FOLDER = "checkpoints"

METADATA = "_CHECKPOINT_METADATA"
"""A file of Orbax, to which it adds the time after the checksums were written: it has none."""


def checkpoint_folder(workdir: str) -> epath.Path:
    """The folder of checkpoints; absolute if it is local, as Orbax requires."""
    folder = workdir_path(workdir) / _FOLDER
    return folder if "://" in str(workdir) else folder.absolute()


def unfinished(workdir: str) -> list[str]:
    """Folders of checkpoints whose writing was interrupted; they are never restored from."""
    folder = checkpoint_folder(workdir)
    if not folder.exists():
        return []
    return sorted(str(path) for path in folder.iterdir() if "orbax-checkpoint-tmp" in path.name or _uncommitted(path))


def _uncommitted(path: epath.Path) -> bool:
    """Whether a checkpoint folder in a bucket is incomplete; the name of a local one tells it."""
    return path.name.isdigit() and "://" in str(path) and not (path / "commit_success.txt").exists()


def is_workdir(path: str) -> bool:
    """Whether `path` is a working folder: it has a folder of checkpoints, even an empty one."""
    return checkpoint_folder(path).is_dir()


def complete_steps(workdir: str) -> list[int]:
    """Steps of all complete checkpoints of a working folder, in order, damaged ones included."""
    folder = checkpoint_folder(workdir)
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and not _uncommitted(path))


def latest_step(workdir: str, items: Sequence[str] = ()) -> int | None:
    """Step of the newest complete checkpoint of a working folder that is not damaged, None without one.

    `items`: the parts (such as `params`) whose files are compared with their checksums, () for all. Logs a warning, once, for
    a newer one that is damaged. Raises CheckpointError if all are.
    """
    step, damaged = newest(workdir, items)
    for damaged_step, fault in damaged.items():
        line = f"{checkpoint_folder(workdir) / str(damaged_step)} is damaged ({fault})"
        if step is not None and line not in _REPORTED:
            logger.warning("%s: the one of step %d is used", line, step)
            _REPORTED.add(line)
    if step is None and damaged:
        raise CheckpointError(_all_damaged(workdir, damaged))
    return step


_REPORTED: set[str] = set()


def newest(workdir: str, items: Sequence[str] = ()) -> tuple[int | None, dict[int, str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with those after it."""
    damaged = {}
    for step in reversed(complete_steps(workdir)):
        folder = checkpoint_folder(workdir) / str(step)
        fault = damage_of(folder, items)
        if not fault:
            return step, damaged
        if folder.exists():  # else a running training removed it meanwhile
            damaged[step] = fault
    return None, damaged


def damage_of(path: epath.Path, items: Sequence[str] = ()) -> str:
    """What is wrong with the files of a complete checkpoint, "" if nothing is.

    `items`: the parts whose files are compared with their checksums, () for all. Of a checkpoint that was written before
    checksums were kept: whether its main files exist.
    """
    try:
        json.loads((path / METADATA).read_text())
    except FileNotFoundError:
        return f"{METADATA} is missing"
    except ValueError:
        return f"{METADATA} is no JSON"
    fault = checksums.mismatch(path, items)
    if fault is not None:
        return fault
    required = ("params/_METADATA", "params/manifest.ocdbt", "run/metadata")
    missing = [name for name in required if not (path / name).exists()]
    return f"{missing[0]} is missing" if missing else ""


def _all_damaged(workdir: str, damaged: Mapping[int, str]) -> str:
    faults = join_lines([f"step {step}: {fault}" for step, fault in sorted(damaged.items())])
    return (
        f"{checkpoint_folder(workdir)} holds only damaged checkpoints ({faults}): restore one from a copy, or start "
        "again in a new --workdir"
    )


def clean_up(workdir: str) -> None:
    """Removes half-written checkpoints, renames damaged newest ones to STEP.damaged, creates the folder; logs all of it."""
    folder = checkpoint_folder(workdir)
    for path in unfinished(workdir):
        logger.info("%s was left half-written by an interrupted run: ignored and removed", path)
        epath.Path(path).rmtree(missing_ok=True)
    step, damaged = newest(workdir)
    if step is None and damaged:
        raise CheckpointError(_all_damaged(workdir, damaged))
    for damaged_step, fault in damaged.items():
        aside = next(name for n in range(1000) if not (name := folder / f"{damaged_step}.damaged{n or ''}").exists())
        (folder / str(damaged_step)).rename(aside)
        logger.info("checkpoint %d is damaged (%s): set aside as %s, step %d is used", damaged_step, fault, aside, step)
    folder.mkdir(parents=True, exist_ok=True)
