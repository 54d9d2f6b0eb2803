"""GLIP (arXiv 2112.03857) in JAX: training, evaluation and transfer of text-prompted detectors.

    import glip_jax

    detector = glip_jax.load_detector("runs/demo")
    for found in detector(["photo.jpg"], ["green book", "snail"]):
        print(found.boxes, found.scores, found.names)

Importing the package is light: jax and the other libraries are loaded when something that needs them is used.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glip_jax.config import Config
    from glip_jax.inference import Detector
    from glip_jax.structures.batch import Prompt
    from glip_jax.training.state import State

__all__ = ["Config", "Detector", "UserError", "evaluate", "load_detector", "train"]

_LAZY = {"Config": "glip_jax.config", "Detector": "glip_jax.inference"}


def __getattr__(name: str) -> Any:
    """Classes that are loaded when they are used (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'glip_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


class UserError(Exception):
    """An error that the user can mend: its text names the thing, what was found, what was expected and what to do.

    Every error of the package that is not a fault of its code derives from it. A job prints the text in one line, without a
    traceback, and ends with `exit_code`.
    """

    exit_code: int = 2


def load_detector(
    checkpoint: str | os.PathLike[str], *, step: int | None = None, parameters: str | None = None, batch_size: int = 1
) -> "Detector":
    """Loads a trained detector; see `glip_jax.inference.Detector`, whose instances are called with images and names.

    Args:
        checkpoint: WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, or a Hugging Face folder
            that the job `export` wrote; local or gs://.
        step: the checkpoint of this step of WORKDIR instead of the newest.
        parameters: "ema" or "raw"; default: the setting `evaluation.parameters` of the run.
        batch_size: images that share one step on a device. A step costs the same however many of them it holds, so give 1
            for single images and 8, say, for folders on an accelerator. A call of more images uses more of the devices.

    Raises:
        UserError: the checkpoint does not exist or is damaged, or its vocabulary does not exist on this machine.
    """
    from glip_jax.cli.query import read_query
    from glip_jax.distributed.runtime import enable_compilation_cache
    from glip_jax.inference import Detector
    from glip_jax.io import fsspec_gcs
    from glip_jax.weights.readers import open_checkpoint_or_export

    if parameters not in (None, "ema", "raw"):
        raise ValueError(f"parameters={parameters!r}: expected 'ema' or 'raw'")
    fsspec_gcs.install()
    opened = open_checkpoint_or_export(os.fspath(checkpoint), step)
    enable_compilation_cache()
    config = opened.config
    which = "raw" if (parameters or config.evaluation.parameters) == "raw" else "ema"

    def read_caption(text: str) -> "Prompt":
        query = read_query(text, "", "", config)
        for note in query.notes:
            logging.getLogger(__name__).log(logging.WARNING if note.startswith("note: ") else logging.INFO, note)
        return query.prompts[0]

    return Detector(config, opened.parameters(which), batch_size, read_caption=read_caption)


def train(config: "Config", workdir: str | os.PathLike[str], *, resume_with_changes: bool = False) -> "State":
    """Trains in `workdir` to `config.train.steps`, from its newest checkpoint if it has one, as the job `train` does in one process.

    Progress is logged at INFO to the logger `glip_jax`; without a handler it is not shown.

    Args:
        config: what `get_config()` of a file in `configs/` returns, or a `Config` of your own.
        workdir: folder of the run, local or gs://; made if it does not exist.
        resume_with_changes: resume although settings that change results differ from those of the checkpoint; the change
            is recorded in WORKDIR/phases.json.

    Returns:
        The state after the last step: parameters, optimizer state, averages, step.

    Raises:
        UserError: settings, data and devices do not fit one another, the checkpoint is of another run, or a checkpoint
            cannot be written.
        SystemExit: SIGTERM or Ctrl-C; the step was saved.
    """
    from glip_jax.cli.train import run
    from glip_jax.io import fsspec_gcs

    fsspec_gcs.install()
    return run(config, os.fspath(workdir), resume_with_changes)


def evaluate(
    checkpoint: str | os.PathLike[str], config: "Config | None" = None, *, step: int | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint and returns its numbers, such as {"evaluation/coco/AP": 0.31}; writes nothing.

    Args:
        checkpoint, step: as in `load_detector`.
        config: settings with the sets to evaluate on (`evaluation.sets`); default: those of the run.

    Raises:
        UserError: there is no such checkpoint, `config` describes another network, or a set cannot be evaluated.
    """
    from glip_jax.distributed.runtime import enable_compilation_cache
    from glip_jax.evaluation.evaluate import check_set
    from glip_jax.evaluation.evaluate import evaluate as evaluate_sets
    from glip_jax.io import fsspec_gcs
    from glip_jax.io.workdir import check_network
    from glip_jax.weights.readers import open_checkpoint_or_export

    fsspec_gcs.install()
    opened = open_checkpoint_or_export(os.fspath(checkpoint), step)
    config = config or opened.config
    if not config.evaluation.sets:
        raise UserError("config.evaluation.sets is empty: name a set with annotations and images")
    check_network(opened.workdir, opened.settings, config)
    for name, dataset in config.evaluation.sets.items():
        for note in check_set(name, dataset, config):
            logging.getLogger(__name__).warning(f"note: {note}")
    enable_compilation_cache()
    return evaluate_sets(config, opened.parameters(config.evaluation.parameters))
