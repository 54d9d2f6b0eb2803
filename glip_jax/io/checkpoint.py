"""Checkpoints of a run: parameters, optimizer, moving average, step and config, behind Orbax.

    WORKDIR/checkpoints/STEP/{params,optimizer,ema,run}   one folder per step, renamed to this name when it is complete
    WORKDIR/checkpoints/STEP/checksums.json               size and MD5 of its files, written just before that
    WORKDIR/checkpoints/STEP.damaged                      a checkpoint whose files changed; the run resumed from an older one

Arrays are restored onto the mesh of the caller's abstract state. Paths may be local or gs://: a bucket cannot rename, so
there a file `commit_success.txt`, written last, marks a complete folder. `glip_jax.io.checkpoint_reader` reads one
checkpoint without the mesh and the model.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from glip_jax import UserError
from glip_jax.config import CheckpointConfig, Config
from glip_jax.io import checksums, gcs
from glip_jax.io.checkpoint_reader import (
    Checkpoint,
    fingerprint,
    leaf_path,
    open_checkpoint,
    readable,
)
from glip_jax.io.checkpoint_steps import (
    METADATA,
    checkpoint_folder,
    clean_up,
    complete_steps,
    is_workdir,
    latest_step,
    newest,
    unfinished,
)
from glip_jax.io.errors import full_disk
from glip_jax.io.workdir import CheckpointError, flat_settings, join_lines, on_first_process

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
    "unfinished",
    "recovery_hint",
]


_MIN_PART_BYTES = 1 << 20
"""An array is written by several replicas if each part has this size at least."""


class NotSavedError(UserError, RuntimeError):
    """A checkpoint that could not be written; the message names the newest complete one and says what to do."""

    exit_code = 74  # exit_codes.NOT_WRITTEN


class Saved(NamedTuple):
    """The parts of a run that a checkpoint holds, as pytrees of arrays (or of jax.ShapeDtypeStruct, to restore)."""

    params: Any
    optimizer: Any
    """Empty in a checkpoint of imported weights: the run that starts there initializes it."""
    ema: Any
    """Averages of the trainable parameters; empty when the average is off, or in imported weights."""


class Checkpoints:
    """Saves and restores the checkpoints of one run. Use as a context manager: leaving it waits for the last write.

    Every method that writes or waits raises NotSavedError if a write failed, in the background or here. Older checkpoints
    are then intact, because one is removed only after a newer one is complete.
    """

    def __init__(self, workdir: str, keep: int, policy: CheckpointConfig | None = None) -> None:
        """Opens (and creates) `workdir`/checkpoints, keeping the newest `keep` and those that `policy` names.

        Half-written checkpoints are removed, a newest one that is damaged is renamed; both are logged. Raises
        CheckpointError if all are damaged.
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
        on_first_process(lambda: clean_up(workdir))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )  # fmt: skip
        self._manager = _manager(self.folder, options)
        self._workdir = workdir
        self._writing: int | None = None
        """The step whose write was started last and not awaited yet."""
        self._failed = False
        self._required: list[str] = []
        """Files without which the checkpoint that is being written is incomplete."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # An error that ends the context is more telling than one of the last write, unless it is the same full disk.
        quiet = error is not None and not full_disk(error)
        try:
            with contextlib.suppress(*([Exception] if quiet else [])), self._not_saved_errors():
                self._manager.close()
        finally:
            if self._failed:
                self._clear()

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
        """Records the score of `step`, for `policy.best`; higher is better."""
        self._scores[step] = value

    def save(self, step: int, saved: Saved, config: Config, lines: Sequence[str] = ()) -> None:
        """Starts writing step `step` in the background, after the write before it; the caller may donate the arrays.

        `lines` of metrics.jsonl are saved with it, see `lines`.
        """
        self.wait()
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in saved._asdict().items() if tree}
        items["run"] = ocp.args.JsonSave({"step": step, "config": flat_settings(config), "lines": list(lines)})
        self._writing = step
        self._required = [f"{name}/{'metadata' if name == 'run' else '_METADATA'}" for name in items]
        with self._not_saved_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when every started write is complete."""
        with self._not_saved_errors():
            self._manager.wait_until_finished()
        self._writing = None

    def check(self) -> None:
        """Raises NotSavedError if the write in the background failed; does not wait for it."""
        # Orbax's check_for_errors clears the error, and the thread that removes old checkpoints would then do so.
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def run(self, step: int) -> dict[str, Any]:
        """The flat settings that checkpoint `step` was saved with."""
        return self._run(step)["config"]

    def lines(self, step: int) -> list[str]:
        """The lines that `save` was given; none in checkpoints of older versions."""
        return self._run(step).get("lines", [])

    def _run(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def imported(self, step: int) -> bool:
        """Whether checkpoint `step` holds parameters only: imported from a file, not yet trained."""
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
        """Writes the checksums just before the checkpoint becomes complete; Orbax calls it in the background."""
        if jax.process_index() != 0 or self._writing is None:
            return
        name = str(self._writing)
        aside = [path for path in self.folder.iterdir() if path.name.startswith(f"{name}.orbax-checkpoint-tmp")]
        # Items are written concurrently: if one failed, the others must not make a complete checkpoint.
        checksums.write(aside[0] if aside else self.folder / name, without=METADATA, wanted=self._required)

    @contextlib.contextmanager
    def _not_saved_errors(self) -> Iterator[None]:
        """Turns errors of writing into NotSavedError; leaving `Checkpoints` removes the half-written folder."""
        try:
            yield
        except Exception as error:
            if self._writing is None:
                raise
            full = full_disk(error)
            reason = full or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            self._failed = True
            failure = NotSavedError(
                f"the checkpoint of step {self._writing} could not be written to {self.folder} ({reason}); "
                f"{recovery_hint(self._workdir, full)}"
            )
            if gcs.is_remote(self._workdir):
                failure.exit_code = 69  # exit_codes.STORAGE_UNAVAILABLE: the same command goes on when it answers
            raise failure from error


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Preserves the `number` checkpoints of the highest scores; one without a score is not among them."""

    def __init__(self, number: int, scores: Mapping[int, float]) -> None:
        self._number, self._scores = number, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each of `checkpoints`, whether it is kept."""
        del context
        scored = [info.step for info in checkpoints if info.step in self._scores]
        best = sorted(scored, key=lambda step: (self._scores[step], step))[-self._number :]
        return [info.step in best for info in checkpoints]


def recovery_hint(workdir: str, full: str) -> str:
    """For messages of a run that could not write: its newest intact checkpoint, and what to do (`full`: the disk is)."""
    mend, left = "make room there" if full else "mend that", newest(workdir)[0]
    if left is None:
        return f"there is no earlier one: {mend}, then the same command begins again"
    return f"the one of step {left} is complete and untouched: {mend}, then the same command goes on from it"


class _Manager(ocp.CheckpointManager):
    """Leaves jax's preemption service to the loop. Orbax asks it for steps that were saved, also in a thread, when the loop has asked
    for later ones; the service would take the processes to be there, and name a step that some have passed.
    """

    def reached_preemption(self, step: int) -> bool:  # noqa: ARG002
        return False


def _manager(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    # Orbax logs every step of its own work, and prints tracebacks of errors that it raises too.
    logging.set_verbosity(logging.FATAL)
    # Each replica writes a part of an array, cut out by a program for every shape and part: hundreds are compiled at the first
    # save, which only large arrays repay.
    parallel = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_PART_BYTES)
    ocp.type_handlers.register_type_handler(jax.Array, parallel, override=True)
    arrays = ("params", "optimizer", "ema")
    handlers = {name: ocp.StandardCheckpointHandler() for name in arrays} | {"run": ocp.JsonCheckpointHandler()}
    return _Manager(folder, options=options, item_handlers=handlers)


def _part(metadata: Any, name: str) -> Any:
    """Metadata of one item of a checkpoint, None if it has no such item."""
    return dict(metadata.items()).get(name)


def _tree(metadata: Any) -> Any:
    return getattr(metadata, "tree", metadata)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(_tree(tree))}


def _same_arrays(what: str, found: Any, wanted: Any) -> None:
    model, saved = _shapes(wanted), _shapes(found)
    lines = [f"only in the checkpoint: {name} {saved[name]}" for name in sorted(set(saved) - set(model))]
    lines += [f"only in the model: {name} {model[name]}" for name in sorted(set(model) - set(saved))]
    shared = sorted(set(model) & set(saved))
    lines += [f"{name}: {saved[name]} saved, {model[name]} wanted" for name in shared if model[name] != saved[name]]
    if lines:
        raise CheckpointError(
            f"checkpoint {what}: is of another network ({join_lines(lines)}): give the settings it was made with, or use a "
            "new --workdir"
        )
