"""Checkpoints of a run: parameters, optimizer, moving average, step and config, behind Orbax.

    WORKDIR/checkpoints/STEP/{params,optimizer,ema,run}   one folder a step, written aside and renamed when complete
    WORKDIR/config.json                                   the settings of the latest start, flat
    WORKDIR/started_from.json                             what the parameters of step 0 were read from, with hashes
    WORKDIR/phases.json                                   every accepted change of settings, with its step

Arrays are restored onto whatever mesh the caller's abstract state names. Paths may be local or gs://.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from glip_jax.config import Config, differences, flatten
from glip_jax.exits import full_disk

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "NotSavedError",
    "Saved",
    "check_config",
    "check_network",
    "fingerprint",
    "is_workdir",
    "latest_step",
    "prepare",
    "restore_parameters",
    "saved_config",
    "started_from",
    "unfinished",
    "what_is_left",
    "write_config",
    "write_started_from",
]

_FOLDER = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint that is not there, does not fit the model, or was made with other settings."""


class NotSavedError(RuntimeError):
    """A checkpoint that could not be written; the message says what is left of the run and what to do."""


class Saved(NamedTuple):
    """The parts of a run that a checkpoint holds, as pytrees of arrays (or of jax.ShapeDtypeStruct, to restore)."""

    params: Any
    optimizer: Any
    """Empty in a checkpoint of imported weights: the run that begins there makes it anew."""
    ema: Any
    """Averages of the trainable parameters; empty when the average is off, or made anew as well."""


class Checkpoints:
    """The checkpoints of one working folder. Use as a context manager: leaving it waits for the last write.

    Every method that writes or waits raises NotSavedError if a write failed, in the background or here. The older
    checkpoints are then untouched, as one is removed only after a newer one is complete.
    """

    def __init__(self, workdir: str, keep: int) -> None:
        """Opens (and makes) `workdir`/checkpoints, keeping the newest `keep`; says which half-written ones it removes."""
        self.folder = _folder(workdir)
        for path in unfinished(workdir):
            print(f"{path} was left half-written by an interrupted run: ignored and removed", flush=True)
            if jax.process_index() == 0:
                epath.Path(path).rmtree(missing_ok=True)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = _manager(
            self.folder, ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        )
        self._workdir = workdir
        self._writing: int | None = None
        """The step whose write was started last and not waited for."""
        self._failed = False

    def __enter__(self) -> "Checkpoints":
        # Parts of a failed write that end after its event loop report to this hook, many tracebacks that say nothing.
        self._hook, hook = sys.unraisablehook, sys.unraisablehook
        sys.unraisablehook = lambda fault: None if str(fault.exc_value) == "Event loop is closed" else hook(fault)
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # Whoever leaves for a reason of his own hears of that one, unless it is the same full disk.
        quiet = error is not None and not full_disk(error)
        try:
            with contextlib.suppress(*([Exception] if quiet else [])), self._complaining():
                self._manager.close()
        finally:
            if self._failed:
                self._clear()
            sys.unraisablehook = self._hook

    def _clear(self) -> None:
        """Removes the half-written folder; the other parts of a checkpoint may still be writing into it for a moment."""
        for _ in range(20):
            left = unfinished(self._workdir) if jax.process_index() == 0 else []
            for path in left:
                with contextlib.suppress(OSError):
                    epath.Path(path).rmtree()
            if not left:
                return
            time.sleep(0.1)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, step: int, saved: Saved, config: Config) -> None:
        """Starts writing step `step` in the background; arrays are copied first, so the caller may donate them.

        Waits for the write before it.
        """
        self.wait()
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in saved._asdict().items() if tree}
        items["run"] = ocp.args.JsonSave({"step": step, "config": _plain(config)})
        self._writing = step
        with self._complaining():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when every started write is complete."""
        with self._complaining():
            self._manager.wait_until_finished()
        self._writing = None

    def check(self) -> None:
        """Raises NotSavedError if the write in the background came to a bad end; does not wait for it."""
        # Orbax' own check_for_errors takes the error away from the thread that, without one, removes old checkpoints.
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def run(self, step: int) -> dict[str, Any]:
        """The flat settings that checkpoint `step` was written with."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]["config"]

    def imported(self, step: int) -> bool:
        """Whether checkpoint `step` holds parameters alone: read from a file, not yet trained."""
        return _part(self._manager.item_metadata(step), "optimizer") is None

    def restore(self, step: int, like: Saved) -> Saved:
        """Checkpoint `step` with the structure, shapes and shardings of `like` (jax.ShapeDtypeStruct leaves).

        Raises CheckpointError listing the parameters that only one side has or whose shapes differ.
        """
        metadata = self._manager.item_metadata(step)
        wanted = {name: tree for name, tree in like._asdict().items() if tree}
        for name, tree in wanted.items():
            if _part(metadata, name) is None:
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} holds no {name}, which the settings ask for: "
                    "set optimizer.ema_decay as it was in that run, or use a new --workdir"
                )
            _same_arrays(f"{self.folder / str(step)}, {name}", metadata[name], tree)
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()})
        restored = self._manager.restore(step, args=args)
        return Saved(*(restored[name] if name in wanted else {} for name in Saved._fields))

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        """What goes wrong while writing as NotSavedError; leaving the context removes the half-written folder."""
        try:
            yield
        except Exception as error:
            if self._writing is None:
                raise
            full = full_disk(error)
            reason = full or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            self._failed = True
            raise NotSavedError(
                f"the checkpoint of step {self._writing} could not be written to {self.folder} ({reason}); "
                f"{what_is_left(self._workdir, full)}"
            ) from error


def what_is_left(workdir: str, full: str) -> str:
    """For messages of a run that could not write: its newest complete checkpoint, and what to do (`full`: the disk is)."""
    mend, newest = "make room there" if full else "mend that", latest_step(workdir)
    if newest is None:
        return f"there is no earlier one: {mend}, then the same command begins again"
    return f"the one of step {newest} is complete and untouched: {mend}, then the same command goes on from it"


def prepare(workdir: str) -> None:
    """Makes the working folder and tries that files can be made in it; CheckpointError if not."""
    if jax.process_index() != 0:
        return
    folder = epath.Path(workdir)
    probe = folder / f".written-by-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except (OSError, ImportError) as error:
        if full_disk(error):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise CheckpointError(
            f"--workdir={workdir} cannot be written ({reason}): expected a folder, or the name of one that can be made"
        ) from None


def _folder(workdir: str) -> epath.Path:
    """The folder of checkpoints; absolute where it is local, as Orbax demands."""
    folder = epath.Path(workdir) / _FOLDER
    return folder if "://" in str(workdir) else folder.absolute()


def unfinished(workdir: str) -> list[str]:
    """Folders of checkpoints whose writing was interrupted; never restored from."""
    folder = _folder(workdir)
    if not folder.exists():
        return []
    return sorted(str(path) for path in folder.iterdir() if "orbax-checkpoint-tmp" in path.name)


def is_workdir(path: str) -> bool:
    """Whether `path` is a working folder: it has a folder of checkpoints, complete or not."""
    return _folder(path).is_dir()


def latest_step(workdir: str) -> int | None:
    """Step of the newest complete checkpoint of a working folder, None without one."""
    folder = _folder(workdir)
    if not folder.exists():
        return None
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)


def saved_config(workdir: str, step: int | None = None) -> dict[str, Any]:
    """Flat settings of a checkpoint (the newest complete one by default)."""
    step = _existing(workdir, step)
    with _reader(workdir) as manager:
        return manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]["config"]


def restore_parameters(workdir: str, which: Literal["ema", "raw"] = "ema", step: int | None = None) -> dict[str, Any]:
    """Parameters of a checkpoint as a nested dict of numpy arrays, without needing the model or the mesh.

    `ema`: the moving averages where they exist (all trainable parameters), else the raw ones. `step`: None is the
    newest complete checkpoint. Raises CheckpointError without one.
    """
    step = _existing(workdir, step)
    with _reader(workdir) as manager:
        metadata = manager.item_metadata(step)
        names = ["params"] + (["ema"] if which == "ema" and _part(metadata, "ema") is not None else [])

        def restorable(tree: Any) -> Any:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), _tree(tree))

        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(restorable(metadata[name])) for name in names})
        restored = manager.restore(step, args=args)
    parameters = jax.tree.map(np.asarray, restored["params"])
    return _overlaid(parameters, jax.tree.map(np.asarray, restored["ema"])) if "ema" in names else parameters


def fingerprint(params: Any) -> str:
    """SHA-256 of the parameters: float32 bytes in sorted order of paths. Every process must call it."""
    digest = hashlib.sha256()
    for _, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        spread = jax.process_count() > 1 and isinstance(leaf, jax.Array)
        whole = multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf
        digest.update(np.ascontiguousarray(whole, np.float32).tobytes())
    return digest.hexdigest()


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
            f"(saved -> given: {_listed(ordered)}): give the old settings to go on with that run, a new --workdir to start "
            "another, or --resume-with-changes to continue from that step as a new, recorded phase"
            + (" (not where that changes the shape of a parameter)" if network else "")
        )
    path = epath.Path(workdir) / "phases.json"
    phases = json.loads(path.read_text()) if path.exists() else []
    phase = {"step": step, "differences": lines}
    if phase not in phases and jax.process_index() == 0:
        path.write_text(json.dumps([*phases, phase], indent=1))
    return lines


def check_network(workdir: str, saved: dict[str, Any], config: Config) -> None:
    """Raises CheckpointError if `config` describes another network than the flat settings `saved` of a checkpoint.

    What leaves the network the same may differ: where its vocabulary lies, and how it is computed.
    """
    free = ("model.text.vocabulary:", "model.dtype:", "model.remat:", "model.head.unroll:")
    changed = [line for line in differences(saved, config) if line.startswith("model.") and not line.startswith(free)]
    if changed:
        raise CheckpointError(
            f"{workdir} holds a checkpoint of another network than the settings say (saved -> given: {_listed(changed)}): "
            "give the settings that it was trained with"
        )


def write_config(workdir: str, config: Config) -> None:
    """Writes the resolved settings, flat, to `workdir`/config.json."""
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(_plain(config), indent=1, sort_keys=True))


def write_started_from(workdir: str, record: Mapping[str, Any]) -> None:
    """Writes what step 0 was read from to `workdir`/started_from.json; an empty record removes an older one."""
    path = epath.Path(workdir) / "started_from.json"
    if record:
        path.write_text(json.dumps(record, indent=1))
    else:
        path.unlink(missing_ok=True)


def started_from(workdir: str) -> dict[str, Any] | None:
    """That record; None if there is none, as for random values."""
    path = epath.Path(workdir) / "started_from.json"
    return json.loads(path.read_text()) if path.exists() else None


def _plain(config: Config) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config)}


def _manager(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    # Orbax tells every step of its own work as information or warning, and prints tracebacks of what it raises as well.
    logging.set_verbosity(logging.FATAL)
    arrays = ("params", "optimizer", "ema")
    handlers = {name: ocp.StandardCheckpointHandler() for name in arrays} | {"run": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _reader(workdir: str) -> ocp.CheckpointManager:
    logging.set_verbosity(logging.FATAL)  # before the options below, which warn of one another
    return _manager(_folder(workdir), ocp.CheckpointManagerOptions(read_only=True))


def _existing(workdir: str, step: int | None) -> int:
    folder = _folder(workdir)
    found = step if step is not None else latest_step(workdir)
    if found is None:
        half = unfinished(workdir)
        note = f" (only half-written ones: {', '.join(half)})" if half else ""
        raise CheckpointError(f"{folder} holds no complete checkpoint{note}: expected a --workdir that `train` wrote")
    if not (folder / str(found)).exists():
        steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []
        raise CheckpointError(f"{folder} holds no checkpoint of step {found}; there are: {steps}")
    return found


def _part(metadata: Any, name: str) -> Any:
    """Metadata of one part of a checkpoint, None if it is not there."""
    return dict(metadata.items()).get(name)


def _tree(metadata: Any) -> Any:
    return getattr(metadata, "tree", metadata)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def name(path: tuple[Any, ...]) -> str:
        return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

    return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(_tree(tree))}


def _same_arrays(what: str, found: Any, wanted: Any) -> None:
    ours, theirs = _shapes(wanted), _shapes(found)
    faults = [f"only in the checkpoint: {name} {theirs[name]}" for name in sorted(set(theirs) - set(ours))]
    faults += [f"only in the model: {name} {ours[name]}" for name in sorted(set(ours) - set(theirs))]
    shared = sorted(set(ours) & set(theirs))
    faults += [f"{name}: {theirs[name]} saved, {ours[name]} wanted" for name in shared if ours[name] != theirs[name]]
    if faults:
        raise CheckpointError(
            f"checkpoint {what}: is of another network ({_listed(faults)}): give the settings it was made with, or use a "
            "new --workdir"
        )


def _listed(lines: list[str], most: int = 8) -> str:
    """The lines in one, so that a message stays a line."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        result[key] = _overlaid(below[key], value) if isinstance(value, Mapping) else value
    return result
