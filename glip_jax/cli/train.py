"""The job `train`: settings and flags to `glip_jax.training.loop.train`."""

import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from glip_jax import UserError
from glip_jax.cli.command_line import Arguments, CommandLineError, parse
from glip_jax.cli.name_vectors import give_vectors
from glip_jax.cli.processes import ProcessArguments, fingerprints, run_joined
from glip_jax.cli.reports import drawing
from glip_jax.config import Config, ConfigError
from glip_jax.data.manifest import ShardError, finished
from glip_jax.data.mixture import Mixture
from glip_jax.distributed import exit_codes
from glip_jax.distributed.cluster import Cluster
from glip_jax.evaluation.at_start import metric_names
from glip_jax.evaluation.evaluate import check_set, evaluate, load_set
from glip_jax.evaluation.shares import Share
from glip_jax.inference import Detector
from glip_jax.io.assets import resolve
from glip_jax.io.checkpoint import NotSavedError, complete_steps, recovery_hint
from glip_jax.io.errors import full_disk
from glip_jax.io.workdir import workdir_path
from glip_jax.structures.batch import Batch
from glip_jax.structures.canvas import pixels_of
from glip_jax.training.loop import Feed, train
from glip_jax.training.monitoring.evaluations import Evaluate, Meet
from glip_jax.training.state import State
from glip_jax.weights import pretrained

__all__ = ["TrainArguments", "main", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainArguments(ProcessArguments, Arguments):
    """Train in --workdir; the same command resumes from the newest checkpoint there.

    Every setting of the config file can be overridden: --config.section.field=value, tuples as 1,2,3. Settings that
    change results may not differ between two starts in one working folder, unless --resume-with-changes is given.
    """

    resume_with_changes: bool = False
    """Resume although settings that change results differ: a new phase, recorded in WORKDIR/phases.json."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; raises what ends it. After SIGTERM or Ctrl-C it raises SystemExit, the step saved.

    Where several processes train, one that fails ends here, so that it waits for none that is gone.
    """
    arguments = parse(argv, TrainArguments, "train")
    if not arguments.workdir:
        raise CommandLineError("no working folder: expected --workdir=DIR (made if it is not there)")
    return run_joined(
        "train",
        arguments,
        lambda: _fingerprints(arguments.config),
        lambda cluster: _train(arguments, cluster),
        saves=True,
    )


def _train(arguments: TrainArguments, cluster: Cluster | None) -> int:
    run(arguments.config, arguments.workdir, arguments.resume_with_changes, cluster)
    return exit_codes.DONE


def _fingerprints(config: Config) -> dict[str, str]:
    """What all hosts must have alike: settings, code, versions, and the data's manifests."""
    values = fingerprints(config)
    for name, source in config.data.sources.items():
        try:
            manifest = finished(source.path)
        except (ShardError, OSError) as error:
            values[f"data.sources.{name}"] = f"unreadable ({error})"
            continue
        if manifest is not None:
            content = json.dumps(asdict(manifest), sort_keys=True).encode()
            values[f"data.sources.{name}"] = f"{manifest.records} records, {hashlib.sha256(content).hexdigest()[:12]}"
    return values


def run(config: Config, workdir: str, resume_with_changes: bool = False, cluster: Cluster | None = None) -> State:
    """Trains with everything that the job gives the loop: evaluation, the drawn first batch, files of pretrained parameters.

    Raises NotSavedError where the disk is full, and what `glip_jax.training.loop.train` raises.
    """
    try:
        return train(
            config,
            workdir,
            evaluate=_evaluator(config, workdir)
            if config.evaluation.sets and config.train.evaluate_every >= 0
            else None,
            draw=_drawer(config),
            initial_parameters=pretrained.initialize,
            resume_with_changes=resume_with_changes,
            cluster=cluster,
            feed=_by_meaning(config, workdir) if config.data.captions.hard_by == "meaning" else None,
        )
    except OSError as error:
        full = "" if isinstance(error, UserError) else full_disk(error)
        if not full:
            raise
        raise NotSavedError(
            f"{error.filename or workdir} cannot be written ({full}); checkpoints: {recovery_hint(workdir, full)}"
        ) from error


def _by_meaning(config: Config, workdir: str) -> Callable[[Mixture, State], Feed]:
    """Returns what feeds the loop with the batches of a mixture that knows the meaning of names."""
    init = config.init_from
    if not (init.text or init.model) and not complete_steps(workdir):
        logger.info(
            "note: data.captions.hard_by is meaning, and init_from names no text encoder: vectors of a random one say little of meaning"
        )

    def feed(mixture: Mixture, state: State) -> Feed:
        give_vectors(mixture, state.params, workdir_path(workdir))
        return Feed(functools.partial(mixture.batches, patches=config.model.patches))

    return feed


def _drawer(config: Config) -> Any:
    """Returns what draws the first batch with its phrases, for WORKDIR/first_batch.png."""

    def draw(batch: Batch) -> bytes:
        vocabulary = resolve(config.model.text.vocabulary).read_text().split("\n")
        image = np.asarray(batch.image)
        if image.shape[-1] != 3:
            image = pixels_of(image)
            image = image[..., ::-1] if config.model.input.order == "bgr" else image
        return drawing.png(drawing.draw_batch(batch._replace(image=image), vocabulary))

    return draw


def _evaluator(config: Config, workdir: str) -> Evaluate:
    """Evaluates `config.evaluation.sets`, always with the same detector, so that nothing is compiled for the second evaluation; their annotations are read and their images looked for now, not after hours of training."""
    for name, dataset in config.evaluation.sets.items():
        for note in check_set(name, dataset, config):
            logger.info(f"note: {note}")
    _check_best_by(config)

    detector: Detector | None = None

    def evaluate_sets(params: Any, step: int, meet: Meet) -> dict[str, float]:
        nonlocal detector
        share = Share(jax.process_index(), jax.process_count(), meet)
        try:
            detector = detector or Detector(config, None)
            detector.use(params)
            return evaluate(config, detector=detector, share=share)
        except Exception as error:
            every = config.checkpoint.every
            # The checkpoint of a step is begun before its evaluation.
            saved = step if step == config.train.steps else step - step % every
            saved = max([saved, *complete_steps(workdir)])
            line = (
                f"the evaluation after step {step} failed; the run is saved at step {saved}: `python -m glip_jax evaluate "
                f"--config=FILE.py --workdir={workdir}` measures it, and the same `train` command goes on from there"
                if saved
                else f"the evaluation after step {step} failed, and no step is saved yet"
            )
            if not isinstance(error, UserError):
                logger.error(line)
                raise
            error.args = (f"{error}; {line}",)
            raise
        finally:
            if detector is not None:
                detector.use(None)  # training needs the memory

    return evaluate_sets


def _check_best_by(config: Config) -> None:
    """Raises ConfigError where no evaluation gives the metric `checkpoint.best_by`."""
    if not config.checkpoint.best:
        return
    _, name, metric = config.checkpoint.best_by.split("/", 2)  # as `validate` demands
    known = metric_names(load_set(name, config.evaluation.sets[name]), config.evaluation.max_images)
    if metric not in known:
        near = difflib.get_close_matches(metric, known, 1)
        raise ConfigError(
            f"checkpoint.best_by is {config.checkpoint.best_by!r}: evaluations of {name} give {', '.join(known)}"
            f"{f'; did you mean {near[0]}?' if near else ''}"
        )
