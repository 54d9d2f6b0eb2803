"""Opens one checkpoint for reading: found and verified once, then its step, settings, parameters and metric lines belong together.

    checkpoint = open_checkpoint("runs/demo")              # the newest complete one; or runs/demo/checkpoints/1500
    checkpoint.step, checkpoint.config, checkpoint.parameters("ema")

Nothing here needs the network, the optimizer or the mesh of the run. Paths may be local or gs://.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from glip_jax.config import Config, ConfigError, OptimizerConfig
from glip_jax.config.saved import current_names, unflatten
from glip_jax.io import checksums
from glip_jax.io.checkpoint_steps import checkpoint_folder, complete_steps, damage_of, latest_step, unfinished
from glip_jax.io.workdir import CheckpointError

__all__ = ["Checkpoint", "Which", "fingerprint", "note_on_averages", "open_checkpoint", "readable", "share_of_start"]

logger = logging.getLogger(__name__)

Which = Literal["ema", "raw"]
"""Which parameters: their moving averages (where the run kept averages; else raw), or those of the last update."""

_ATTEMPTS = 5
"""How often the newest checkpoint is looked for while a running training removes the one that was just found."""


class Checkpoint:
    """One checkpoint, opened. A training that saves meanwhile does not change what it gives."""

    def __init__(
        self, workdir: str, path: epath.Path, step: int | None, settings: Mapping[str, Any], lines: Sequence[str],
        read: Callable[[Which], dict[str, Any]],
    ) -> None:  # fmt: skip
        """`read` returns the parameters as a nested dict of numpy arrays; it is called when they are asked for."""
        self.workdir = workdir
        """The folder of the run as it was given, or of an export the exported folder."""
        self.path = path
        """The folder WORKDIR/checkpoints/STEP, or the folder of an export."""
        self.step = step
        """Completed training steps; None for an export, which does not record them."""
        self.settings = dict(settings)
        """The settings of the run, flat, under today's names (see `glip_jax.config.saved`): {"optimizer.rate": 0.0001, ...}."""
        self.lines = list(lines)
        """The lines of metrics.jsonl up to this step; none in an export."""
        self._read = read
        self._noted = False

    @functools.cached_property
    def config(self) -> Config:
        """The settings of the run, typed; those that are newer than the checkpoint have their default.

        Raises ConfigError if the checkpoint has settings that this version does not know.
        """
        try:
            return unflatten(self.settings)
        except ConfigError as error:
            raise ConfigError(f"checkpoint {self.path} {error}: give a file that fits it, --config=FILE.py") from error

    def parameters(self, which: Which = "ema") -> dict[str, Any]:
        """Parameters of the network as a nested dict of numpy arrays, read now; nothing of them is kept here.

        The head of the side loss on descriptions, which only training reads, is left out. Raises CheckpointError for files that are damaged or were removed since, and for values that are not finite.
        """
        parameters = self._read(which)
        if "description" in parameters.get("head", {}):
            parameters = parameters | {
                "head": {name: part for name, part in parameters["head"].items() if name != "description"}
            }
        if which == "ema" and self.step is not None and (self.path / "ema").exists():
            self._note_on_averages(self.step)
        bad = [path for path, leaf in jax.tree_util.tree_leaves_with_path(parameters) if not np.isfinite(leaf).all()]
        if bad:
            raise CheckpointError(
                f"{self.path}: {len(bad)} arrays are not finite, first {jax.tree_util.keystr(bad[0])}: the run diverged; "
                "give an earlier --step"
            )
        return parameters

    def _note_on_averages(self, step: int) -> None:
        """Logs once where much of the averages is the initial parameters."""
        with contextlib.suppress(ConfigError):  # of settings that this version does not know
            note = note_on_averages(step, self.config.optimizer)
            if note and not self._noted:
                logger.warning(f"{self.path}: {note}")
            self._noted = True

    def fingerprint(self, which: Which = "raw") -> str:
        """SHA-256 of the parameters, which are read for it; that of `raw` is what training prints at its end."""
        return fingerprint(self._read(which))


def open_checkpoint(path: str, step: int | None = None, *, verify: Sequence[str] = ("params", "ema")) -> Checkpoint:
    """Finds and verifies one checkpoint.

    Args:
        path: WORKDIR (its newest complete checkpoint that is not damaged; a damaged newer one is logged as a warning),
            or WORKDIR/checkpoints/STEP. Local or gs://.
        step: the checkpoint of this step of WORKDIR instead of the newest.
        verify: items whose files are compared with their checksums now; the others are compared when they are read,
            too late to choose an older checkpoint. () where only the settings are wanted. The optimizer's state, which
            is most of a checkpoint, is never read here.

    Raises:
        CheckpointError: there is none, not this one, or it is damaged.
    """
    workdir, step = _split(path, step)
    for attempt in range(1, _ATTEMPTS + 1):
        chosen = _existing(workdir, step, ("run", *verify))
        folder = checkpoint_folder(workdir) / str(chosen)
        try:
            run = json.loads((folder / "run" / "metadata").read_text())
        except FileNotFoundError:
            # A running training removed it after it was verified, so there is a newer one.
            if step is not None or attempt == _ATTEMPTS:
                raise CheckpointError(_removed(folder)) from None
            continue
        read = functools.partial(_read_parameters, folder, set(verify))
        return Checkpoint(workdir, folder, chosen, current_names(run["config"]), run.get("lines", []), read)
    raise AssertionError


def fingerprint(params: Any) -> str:
    """SHA-256 of the parameters: float32 bytes in sorted order of slash-separated paths. Every process must call it."""
    digest = hashlib.sha256()
    leaves = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for _, leaf in sorted(leaves.items()):
        distributed = jax.process_count() > 1 and isinstance(leaf, jax.Array)
        array = multihost_utils.process_allgather(leaf, tiled=True) if distributed else leaf
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()


def share_of_start(step: int, optimizer: OptimizerConfig) -> float:
    """The weight that the parameters of step 0 have in the averages after `step` steps: the product of the decays; 0 without averages.

    The decay of step n is `ema_decay`, with the ramp the smaller one of it and (1 + n) / (10 + n). The product of (1 + n) / (10 + n)
    over the first m steps is 9! / ((m + 1) ... (m + 9)).
    """
    decay = optimizer.ema_decay
    ramp = min(step, max(0, math.ceil((10 * decay - 1) / (1 - decay)))) if optimizer.ema_ramp else 0
    return math.factorial(9) / math.prod(range(ramp + 1, ramp + 10)) * decay ** (step - ramp) if decay else 0.0


def note_on_averages(step: int, optimizer: OptimizerConfig) -> str:
    """A line where more than a tenth of the averages is still the parameters of step 0; else empty."""
    share = share_of_start(step, optimizer)
    if share <= 0.1:
        return ""
    return (
        f"the averaged parameters after step {step} are {share:.0%} those of step 0 (optimizer.ema_decay {optimizer.ema_decay:g}"
        f"{'' if optimizer.ema_ramp else ', optimizer.ema_ramp False'}): evaluation.parameters=raw takes those of the last step instead"
    )


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Within it, arrays that cannot be read are a CheckpointError.

    Where the files agree with their checksums the error is not one of damage and stays what it is.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not path.exists():
            raise CheckpointError(_removed(path)) from error
        if checksums.mismatch(path) is not None:
            raise
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({text}); it was written before checksums were kept, so this was found only now: remove "
            "it, then the same command uses the one before"
        ) from error


def _split(path: str, step: int | None) -> tuple[str, int | None]:
    """Working folder and step that a path names."""
    found = re.fullmatch(r"(?:(.*)/)?checkpoints/(\d+)/*", str(path))
    if found is None:
        return str(path), step
    if step is not None and step != int(found[2]):
        raise CheckpointError(f"{path} is the checkpoint of step {found[2]}, and --step={step}: give one of them")
    return {None: ".", "": "/"}.get(found[1], found[1]), int(found[2])


def _existing(workdir: str, step: int | None, items: Sequence[str]) -> int:
    """The step to open, whose `items` are as they were written."""
    folder = checkpoint_folder(workdir)
    if step is None:
        step = latest_step(workdir, items)
        if step is not None:
            return step
        half = unfinished(workdir)
        note = f" (only half-written ones: {', '.join(half)})" if half else ""
        raise CheckpointError(f"{folder} holds no complete checkpoint{note}: expected a --workdir that `train` wrote")
    steps = complete_steps(workdir)
    if step not in steps:
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; there are: {steps}")
    fault = damage_of(folder / str(step), items)
    if fault:
        raise CheckpointError(f"{folder / str(step)} is damaged ({fault}): name another --step of {steps}")
    return step


def _read_parameters(folder: epath.Path, verified: set[str], which: Which) -> dict[str, Any]:
    """Parameters of a checkpoint folder; items that are not among `verified` are compared with their checksums first."""
    import orbax.checkpoint as ocp  # only now: it takes seconds to load, and settings are read without it

    items = ["params"] + (["ema"] if which == "ema" and (folder / "ema").exists() else [])
    rest = [item for item in items if item not in verified]
    with readable(folder):
        if rest and (fault := damage_of(folder, rest)):
            raise CheckpointError(f"{folder} is damaged ({fault}): name another --step")
        absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax reports every step of its own work
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        trees = []
        for item in items:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                metadata = checkpointer.metadata(folder / item).item_metadata
                tree = getattr(metadata, "tree", metadata)
                like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
                trees.append(checkpointer.restore(folder / item, args=ocp.args.StandardRestore(like)))
    return functools.reduce(_overlaid, (jax.tree.map(np.asarray, tree) for tree in trees))


def _removed(folder: epath.Path) -> str:
    return (
        f"{folder} was removed while it was read, as a running training keeps only its newest checkpoints: give the same "
        "command again, or raise checkpoint.keep of that run"
    )


def leaf_path(path: tuple[Any, ...]) -> str:
    """The keys of a leaf's path in a pytree, joined by "/"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the leaves of `above` in their place."""
    result = dict(below)
    for key, value in above.items():
        result[key] = _overlaid(below[key], value) if isinstance(value, Mapping) else value
    return result
