"""Checkpoints of a run: parameters, optimizer, moving average, step and config, behind Orbax.

    WORKDIR/checkpoints/STEP/{params,optimizer,ema,run}   one folder a step, written aside and renamed when complete
    WORKDIR/config.json                                   the settings of the latest start, flat
    WORKDIR/phases.json                                   every accepted change of settings, with its step

Arrays are restored onto whatever mesh the caller's abstract state names. Paths may be local or gs://.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from glip_jax.config import Config, differences, flatten

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Saved",
    "check_config",
    "latest_step",
    "restore_parameters",
    "saved_config",
    "unfinished",
    "write_config",
]

_FOLDER = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint that is not there, does not fit the model, or was made with other settings."""


class Saved(NamedTuple):
    """The parts of a run that a checkpoint holds, as pytrees of arrays (or of jax.ShapeDtypeStruct, to restore)."""

    params: Any
    optimizer: Any
    ema: Any
    """Averages of the trainable parameters; empty when the average is off."""


class Checkpoints:
    """The checkpoints of one working folder. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, workdir: str, keep: int) -> None:
        """Opens (and makes) `workdir`/checkpoints, keeping the newest `keep`; says which half-written ones it removes."""
        self.folder = _folder(workdir)
        for path in unfinished(workdir):
            print(f"{path} was left half-written by an interrupted run: ignored and removed", flush=True)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = _manager(
            self.folder, ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, step: int, saved: Saved, config: Config) -> None:
        """Starts writing step `step` in the background; arrays are copied first, so the caller may donate them."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(saved.params),
            "optimizer": ocp.args.StandardSave(saved.optimizer),
            "run": ocp.args.JsonSave({"step": step, "config": _plain(config)}),
        }
        if saved.ema:
            items["ema"] = ocp.args.StandardSave(saved.ema)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when every started write is complete."""
        self._manager.wait_until_finished()

    def run(self, step: int) -> dict[str, Any]:
        """The flat settings that checkpoint `step` was written with."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]["config"]

    def restore(self, step: int, like: Saved) -> Saved:
        """Checkpoint `step` with the structure, shapes and shardings of `like` (jax.ShapeDtypeStruct leaves).

        Raises CheckpointError listing the parameters that only one side has or whose shapes differ.
        """
        metadata = self._manager.item_metadata(step)
        wanted = {name: tree for name, tree in like._asdict().items() if tree}
        for name, tree in wanted.items():
            if name not in metadata or metadata[name] is None:
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} holds no {name}, which the settings ask for: "
                    "set optimizer.ema_decay as it was in that run, or use a new --workdir"
                )
            _same_arrays(f"{self.folder / str(step)}, {name}", metadata[name], tree)
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()})
        restored = self._manager.restore(step, args=args)
        return Saved(*(restored[name] if name in wanted else {} for name in Saved._fields))


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
        names = ["params"] + (["ema"] if which == "ema" and "ema" in metadata and metadata["ema"] is not None else [])

        def restorable(tree: Any) -> Any:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), _tree(tree))

        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(restorable(metadata[name])) for name in names})
        restored = manager.restore(step, args=args)
    parameters = jax.tree.map(np.asarray, restored["params"])
    return _overlaid(parameters, jax.tree.map(np.asarray, restored["ema"])) if "ema" in names else parameters


def check_config(workdir: str, step: int, saved: Mapping[str, Any], config: Config, *, accept: bool) -> list[str]:
    """Compares the settings of checkpoint `step` with `config`; returns the lines of what changes numbers.

    Differences are refused with CheckpointError unless `accept`, which records them in `workdir`/phases.json.
    Settings that change no number (cadence, workers, mesh) may differ freely.
    """
    lines = differences(dict(saved), config)
    if not lines:
        return []
    if not accept:
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"{workdir} holds step {step} of a run with other settings:\n  {listed}\n"
            "Give the old settings to go on with that run, a new --workdir to start another, or "
            "--resume-with-changes to continue from that step as a new, recorded phase."
        )
    path = epath.Path(workdir) / "phases.json"
    phases = json.loads(path.read_text()) if path.exists() else []
    phase = {"step": step, "differences": lines}
    if phase not in phases and jax.process_index() == 0:
        path.write_text(json.dumps([*phases, phase], indent=1))
    return lines


def write_config(workdir: str, config: Config) -> None:
    """Writes the resolved settings, flat, to `workdir`/config.json."""
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(_plain(config), indent=1, sort_keys=True))


def _plain(config: Config) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config)}


def _manager(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of its own work as information or warning
    arrays = ("params", "optimizer", "ema")
    handlers = {name: ocp.StandardCheckpointHandler() for name in arrays} | {"run": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _reader(workdir: str) -> ocp.CheckpointManager:
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
        listed = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(f"checkpoint {what}: arrays do not fit the model:\n  {listed}\nUse a new --workdir.")


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        result[key] = _overlaid(below[key], value) if isinstance(value, Mapping) else value
    return result
