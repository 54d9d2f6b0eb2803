"""The job `train`: settings and flags to `glip_jax.training.loop.train`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from glip_jax import drawing, exits, storage
from glip_jax.assets import AssetError, resolve
from glip_jax.checkpoint import CheckpointError, NotSavedError, what_is_left
from glip_jax.config import Config, ConfigError
from glip_jax.evaluation.average_precision import GroundTruthError
from glip_jax.evaluation.evaluate import EvaluationError, check_set, evaluate
from glip_jax.jobs.command_line import Arguments, CommandLineError, parse
from glip_jax.parallel import MeshError
from glip_jax.prompts import PromptError
from glip_jax.structures import Batch
from glip_jax.training.loop import NonFiniteLossError, train
from glip_jax.training.source_counts import CorruptDataError
from glip_jax.weights import names, pretrained, torch_files

__all__ = ["TrainArguments", "main"]

_FAULTS = (
    AssetError,
    CheckpointError,
    CommandLineError,
    ConfigError,
    CorruptDataError,
    EvaluationError,
    GroundTruthError,
    MeshError,
    PromptError,
    names.WeightError,
    torch_files.TorchFileError,
)


@dataclass(frozen=True)
class TrainArguments(Arguments):
    """Train in --workdir; the same command again goes on from the newest checkpoint there.

    Every setting of the config file can be overridden: --config.section.field=value, tuples as 1,2,3. Settings that
    change numbers may not differ between two starts in one working folder, unless --resume-with-changes is given.
    """

    resume_with_changes: bool = False
    """Go on although settings that change numbers differ: a new phase, recorded in WORKDIR/phases.json."""
    distributed: bool = False
    """Join the other hosts of a pod or cluster first (jax.distributed)."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns one of `glip_jax.exits`. After SIGTERM or Ctrl-C it raises SystemExit, the step saved."""
    arguments = TrainArguments(Config())
    try:
        arguments = parse(argv, TrainArguments, "train")
        if not arguments.workdir:
            raise CommandLineError("no working folder: expected --workdir=DIR (made if it is not there)")
        if arguments.distributed:
            jax.distributed.initialize()
        config = arguments.config
        train(
            config,
            arguments.workdir,
            evaluate=_evaluator(config) if config.evaluation.sets and config.train.evaluate_every >= 0 else None,
            draw=_drawer(config),
            towers=pretrained.initialize,
            resume_with_changes=arguments.resume_with_changes,
        )
    except _FAULTS as fault:
        print(f"train: {fault}", file=sys.stderr)
        return exits.BAD_INPUT
    except NotSavedError as fault:
        print(f"train: {fault}", file=sys.stderr)
        return exits.UNAVAILABLE if storage.is_remote(arguments.workdir) else exits.NOT_WRITTEN
    except OSError as fault:
        full = exits.full_disk(fault)
        if not full:
            raise
        left = what_is_left(arguments.workdir, full)
        print(
            f"train: {fault.filename or arguments.workdir} cannot be written ({full}); checkpoints: {left}",
            file=sys.stderr,
        )
        return exits.NOT_WRITTEN
    except NonFiniteLossError as fault:
        print(f"train: {fault}", file=sys.stderr)
        return exits.NOT_FINITE
    return exits.DONE


def _drawer(config: Config) -> Any:
    """Draws the first batch with its phrases, for WORKDIR/first_batch.png."""

    def draw(batch: Batch) -> bytes:
        vocabulary = resolve(config.model.text.vocabulary).read_text().split("\n")
        return drawing.png(drawing.draw_batch(batch, vocabulary))

    return draw


def _evaluator(config: Config) -> Any:
    """Evaluates `config.evaluation.sets`; their annotations are read now, not after hours of training."""
    for name, dataset in config.evaluation.sets.items():
        check_set(name, dataset)
    return lambda params, _: evaluate(config, params)
