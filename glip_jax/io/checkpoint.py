"""Checkpoints of a run: parameters, optimizer, moving average, step and config, behind Orbax.

    WORKDIR/checkpoints/STEP/{params,optimizer,ema,run}   one folder a step, written aside and renamed when complete
    WORKDIR/checkpoints/STEP/checksums.json               size and MD5 of its files, written just before that
    WORKDIR/checkpoints/STEP.damaged                      one whose files are no longer those; a run went on from an older one

Arrays are restored onto whatever mesh the caller's abstract state names. Paths may be local or gs://, where nothing can be
renamed and a file `commit_success.txt`, written last, says that a folder is complete.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from glip_jax import UserError
from glip_jax.config import CheckpointConfig, Config
from glip_jax.io import checksums
from glip_jax.io.checkpoint_reader import (
    Checkpoint,
    fingerprint,
    open_checkpoint,
    readable,
    restore_parameters,
    saved_config,
)
from glip_jax.io.checkpoint_steps import (
    METADATA,
    checkpoint_folder,
    complete_steps,
    is_workdir,
    latest_step,
    newest,
    put_in_order,
    unfinished,
)
from glip_jax.io.errors import full_disk
from glip_jax.io.workdir import CheckpointError, listed, plain

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "NotSavedError",
    "Saved",
    "complete_steps",
    "fingerprint",
    "is_workdir",
    "latest_step",
    "open_checkpoint",
    "restore_parameters",
    "saved_config",
    "unfinished",
    "what_is_left",
]


class NotSavedError(UserError, RuntimeError):
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

    def __init__(self, workdir: str, keep: int, policy: CheckpointConfig | None = None) -> None:
        """Opens (and makes) `workdir`/checkpoints, keeping the newest `keep` and what else `policy` says.

        Half-written ones are removed and said; a newest one that is damaged is set aside and said. Raises CheckpointError
        if there are only damaged ones.
        """
        self.folder = checkpoint_folder(workdir)
        self._scores: dict[int, float] = {}
        policy = policy or CheckpointConfig()
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep)]
        if policy.keep_every:
            kept.append(policies.EveryNSteps(policy.keep_every))
        if policy.best:
            kept.append(_Best(policy.best, self._scores))
        _by_the_first(lambda: put_in_order(workdir))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )  # fmt: skip
        self._manager = _manager(self.folder, options)
        self._workdir = workdir
        self._writing: int | None = None
        """The step whose write was started last and not waited for."""
        self._failed = False
        self._wanted: list[str] = []
        """Files without which what is being written is not complete."""

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

    def scored(self, step: int, value: float) -> None:
        """Says how good `step` is, for `policy.best`; higher is better."""
        self._scores[step] = value

    def save(self, step: int, saved: Saved, config: Config, lines: Sequence[str] = ()) -> None:
        """Starts writing step `step` in the background; arrays are copied first, so the caller may donate them.

        Waits for the write before it. `lines` of the run's record are kept with it, see `lines`.
        """
        self.wait()
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in saved._asdict().items() if tree}
        items["run"] = ocp.args.JsonSave({"step": step, "config": plain(config), "lines": list(lines)})
        self._writing = step
        self._wanted = [f"{name}/{'metadata' if name == 'run' else '_METADATA'}" for name in items]
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
        return self._run(step)["config"]

    def lines(self, step: int) -> list[str]:
        """The lines that `save` was given, none in checkpoints of before."""
        return self._run(step).get("lines", [])

    def _run(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def imported(self, step: int) -> bool:
        """Whether checkpoint `step` holds parameters alone: read from a file, not yet trained."""
        return _part(self._manager.item_metadata(step), "optimizer") is None

    def restore(self, step: int, like: Saved) -> Saved:
        """Checkpoint `step` with the structure, shapes and shardings of `like` (jax.ShapeDtypeStruct leaves).

        Raises CheckpointError listing the parameters that only one side has or whose shapes differ.
        """
        with readable(self.folder / str(step)):
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

    def _seal(self) -> None:
        """Checksums of what was written, just before it becomes complete; Orbax calls it in the background."""
        if jax.process_index() != 0 or self._writing is None:
            return
        name = str(self._writing)
        aside = [path for path in self.folder.iterdir() if path.name.startswith(f"{name}.orbax-checkpoint-tmp")]
        # Parts are written beside one another: where one failed, the others must not make a complete checkpoint.
        checksums.seal(aside[0] if aside else self.folder / name, without=METADATA, wanted=self._wanted)

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


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Preserves the `number` checkpoints of the highest scores; one without a score is not among them."""

    def __init__(self, number: int, scores: Mapping[int, float]) -> None:
        self._number, self._scores = number, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """One answer for each of `checkpoints`."""
        del context
        scored = [info.step for info in checkpoints if info.step in self._scores]
        best = sorted(scored, key=lambda step: (self._scores[step], step))[-self._number :]
        return [info.step in best for info in checkpoints]


def what_is_left(workdir: str, full: str) -> str:
    """For messages of a run that could not write: its newest sound checkpoint, and what to do (`full`: the disk is)."""
    mend, left = "make room there" if full else "mend that", newest(workdir)[0]
    if left is None:
        return f"there is no earlier one: {mend}, then the same command begins again"
    return f"the one of step {left} is complete and untouched: {mend}, then the same command goes on from it"


def _by_the_first(act: Callable[[], None]) -> None:
    """Lets the first process act while the others wait; CheckpointError in all of them if it fails so."""
    fault: CheckpointError | None = None
    if jax.process_index() == 0:
        try:
            act()
        except CheckpointError as error:
            fault = error
    if jax.process_count() > 1 and not multihost_utils.broadcast_one_to_all(np.int32(fault is None)):
        fault = fault or CheckpointError("the checkpoints cannot be used: the first process says why")
    if fault is not None:
        raise fault


def _manager(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    # Orbax tells every step of its own work as information or warning, and prints tracebacks of what it raises as well.
    logging.set_verbosity(logging.FATAL)
    arrays = ("params", "optimizer", "ema")
    handlers = {name: ocp.StandardCheckpointHandler() for name in arrays} | {"run": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


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
            f"checkpoint {what}: is of another network ({listed(faults)}): give the settings it was made with, or use a "
            "new --workdir"
        )
