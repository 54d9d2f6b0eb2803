"""The job `train`: settings and flags to `glip_jax.training.loop.train`."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from glip_jax.cli.command_line import Arguments, CommandLineError, parse
from glip_jax.cli.reports import drawing
from glip_jax.config import Config, ConfigError, flatten
from glip_jax.data.manifest import ShardError, finished
from glip_jax.distributed import exit_codes
from glip_jax.distributed.cluster import Cluster, ProcessError, ProcessGroup, announced, join
from glip_jax.distributed.mesh import MeshError
from glip_jax.evaluation.average_precision import GroundTruthError
from glip_jax.evaluation.evaluate import EvaluationError, check_set, evaluate
from glip_jax.io import gcs, provenance
from glip_jax.io.assets import AssetError, resolve
from glip_jax.io.checkpoint import CheckpointError, NotSavedError, what_is_left
from glip_jax.io.errors import full_disk
from glip_jax.structures.batch import Batch
from glip_jax.structures.prompts import PromptError
from glip_jax.training.loop import NonFiniteLossError, train
from glip_jax.training.monitoring.source_counts import CorruptDataError
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
    """Join the other hosts of a pod or cluster first, as a TPU pod or srun announces them."""
    coordinator: str = ""
    """Elsewhere: HOST:PORT of process 0, the same for all; with --processes and --index."""
    processes: int = 0
    """How many processes there are."""
    index: int = -1
    """Which of them this is, from 0."""
    patience: int = 300
    """Seconds to wait for the other processes."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns one of `glip_jax.distributed.exit_codes`. After SIGTERM or Ctrl-C it raises SystemExit, the step saved."""
    try:
        arguments = parse(argv, TrainArguments, "train")
        if not arguments.workdir:
            raise CommandLineError("no working folder: expected --workdir=DIR (made if it is not there)")
    except (CommandLineError, ConfigError) as fault:
        return _said(fault, exit_codes.BAD_INPUT)
    explicit = bool(arguments.coordinator) or arguments.processes > 0 or arguments.index >= 0
    try:
        if not arguments.distributed and not explicit:
            _alone()
            return _train(arguments, None)
        join(ProcessGroup(arguments.coordinator, arguments.processes, arguments.index, arguments.patience))
    except ProcessError as fault:
        return _said(fault, exit_codes.BAD_INPUT)
    if jax.process_count() == 1:
        return _train(arguments, None)
    try:
        cluster = Cluster(_facts(arguments.config), functools.partial(_code, arguments.workdir), arguments.patience)
    except ProcessError as fault:
        _said(fault, exit_codes.BAD_INPUT)
        sys.stderr.flush()
        # jax takes its leave of the others, and would wait for those that did not come.
        os._exit(exit_codes.BAD_INPUT)
    try:
        return cluster.finish(_train(arguments, cluster))
    except SystemExit as stopped:
        raise SystemExit(
            cluster.finish(stopped.code if isinstance(stopped.code, int) else exit_codes.UNEXPECTED)
        ) from None
    except BaseException as error:
        traceback.print_exception(error)
        return cluster.finish(exit_codes.UNEXPECTED)


def _alone() -> None:
    """ProcessError if this process was started as one of several, who would all train the same in one folder."""
    number, by = announced(os.environ)
    if number > 1:
        raise ProcessError(
            f"{by} announces {number} processes, but --distributed is not given: each would train alone, in the same "
            "--workdir; give --distributed, or start one process only"
        )


def _facts(config: Config) -> dict[str, str]:
    """What all hosts must have alike: settings, code, versions, and the data's manifests."""
    facts = {f"config.{name}": repr(value) for name, value in flatten(config)}
    facts |= {f"version of {name}": version for name, version in provenance.versions().items() if name != "device"}
    facts["the package's code"] = provenance.code()["files"][:12]
    for name, source in config.data.sources.items():
        try:
            manifest = finished(source.path)
        except (ShardError, OSError) as error:
            facts[f"data.sources.{name}"] = f"unreadable ({error})"
            continue
        if manifest is not None:
            told = json.dumps(asdict(manifest), sort_keys=True).encode()
            facts[f"data.sources.{name}"] = f"{manifest.records} records, {hashlib.sha256(told).hexdigest()[:12]}"
    return facts


def _code(workdir: str, error: BaseException) -> int:
    """The exit code of what ends a job in `workdir`."""
    match error:
        case NonFiniteLossError():
            return exit_codes.NOT_FINITE
        case NotSavedError():
            return exit_codes.STORAGE_UNAVAILABLE if gcs.is_remote(workdir) else exit_codes.NOT_WRITTEN
        case _ if isinstance(error, _FAULTS) or _out_of_memory(error):
            return exit_codes.BAD_INPUT
        case gcs.StorageError():
            return exit_codes.STORAGE_UNAVAILABLE if error.errno == errno.ETIMEDOUT else exit_codes.BAD_INPUT
        case OSError() if full_disk(error):
            return exit_codes.NOT_WRITTEN
    return exit_codes.UNEXPECTED


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was too small, for the program or as it ran."""
    words = ("RESOURCE_EXHAUSTED", "Ran out of memory")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)


def _said(fault: BaseException | str, code: int) -> int:
    print(f"train: {fault}", file=sys.stderr)
    return code


def _train(arguments: TrainArguments, cluster: Cluster | None) -> int:
    """Trains; what may go wrong by the user's or the disk's doing gives a line and its exit code."""
    config = arguments.config
    try:
        with cluster or contextlib.nullcontext():
            train(
                config,
                arguments.workdir,
                evaluate=_evaluator(config) if config.evaluation.sets and config.train.evaluate_every >= 0 else None,
                draw=_drawer(config),
                initial_parameters=pretrained.initialize,
                resume_with_changes=arguments.resume_with_changes,
                cluster=cluster,
            )
    except Exception as fault:
        code = _code(arguments.workdir, fault)
        if code == exit_codes.UNEXPECTED:
            raise
        if _out_of_memory(fault):
            words = " ".join(str(fault).split())[:200]
            return _said(
                f"the memory of a device is too small ({words}): give fewer images (train.batch_size), "
                "model.remat=blocks, or more of mesh.fsdp; `python -m glip_jax plan` says what fits", code,
            )  # fmt: skip
        if isinstance(fault, gcs.StorageError):
            return _said(gcs.describe(fault), code)
        if isinstance(fault, OSError):
            full = full_disk(fault)
            left = what_is_left(arguments.workdir, full)
            return _said(f"{fault.filename or arguments.workdir} cannot be written ({full}); checkpoints: {left}", code)
        return _said(fault, code)
    return exit_codes.DONE


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
