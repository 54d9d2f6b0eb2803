"""The training loop: from the first step or the newest checkpoint to the last step. `python -m glip_jax train` runs it.

The loop dispatches a step, then reads the metrics of the step before, so the accelerator never waits for the host.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from glip_jax.config import Config, ConfigError, resumed, validate
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.cluster import Cluster
from glip_jax.distributed.exit_codes import CANCELLED, PREEMPTED
from glip_jax.distributed.mesh import check_fits, make_mesh, place_batch, replicated
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io import fsspec_gcs
from glip_jax.io.checkpoint import Checkpoints, Saved, complete_steps, fingerprint
from glip_jax.io.checkpoint_reader import note_on_averages
from glip_jax.io.claims import Owned, owned_workdir
from glip_jax.io.workdir import (
    check_config,
    check_shared,
    check_sources,
    on_first_process,
    prepare,
    workdir_path,
    write_config,
    write_started_from,
)
from glip_jax.models.descriptions import description_table
from glip_jax.structures.batch import Batch
from glip_jax.structures.prompts import PromptError
from glip_jax.training.monitoring.cached_programs import program_counts
from glip_jax.training.monitoring.decisions import Decide, Decisions
from glip_jax.training.monitoring.evaluations import Evaluate, Evaluations
from glip_jax.training.monitoring.goodput import StartTimes
from glip_jax.training.monitoring.metrics import Progress, read
from glip_jax.training.monitoring.pending import NonFiniteLossError, PendingMetrics
from glip_jax.training.monitoring.profiler import Profiler
from glip_jax.training.monitoring.signals import StopSignals
from glip_jax.training.monitoring.source_counts import reduced_records
from glip_jax.training.monitoring.throughput import Throughput
from glip_jax.training.monitoring.watchdog import Watchdog
from glip_jax.training.monitoring.writer import Writer, wandb_module, wandb_run
from glip_jax.training.optimizer import make_optimizer
from glip_jax.training.programs import Programs
from glip_jax.training.state import State, abstract_state, fresh_parameters, fresh_state
from glip_jax.training.step import Objective, glip_objective, make_step

__all__ = ["Feed", "InitialParameters", "NonFiniteLossError", "train"]

logger = logging.getLogger(__name__)

_STEPS_AHEAD = 1000
"""Steps whose canvases are compiled ahead: enough to meet each canvas of a schedule."""

InitialParameters = Callable[[dict[str, Any], Config], tuple[dict[str, Any], dict[str, Any]]]
"""(parameters, config) to parameters read from the files of `config.init_from`, and a record of what was read:
`glip_jax.weights.pretrained.initialize`."""


class Feed(NamedTuple):
    """What a step is fed with."""

    batches: Callable[[int, int, int], Iterator[Batch]]
    """(first step, host, hosts) to the batches, as `Mixture.batches`."""
    objective: Objective | None = None
    """What reads them; None: the network on pixels or patches."""
    rate: Callable[[int], float] | None = None
    """Factor on the learning rates of the 0-based step, beside the schedule of `optimizer`: one that is no part of the compiled step."""


def train(
    config: Config,
    workdir: str,
    evaluate: Evaluate | None = None,
    draw: Callable[[Batch], bytes] | None = None,
    initial_parameters: InitialParameters | None = None,
    resume_with_changes: bool = False,
    cluster: Cluster | None = None,
    decide: Decide | None = None,
    feed: Callable[[Mixture, State], Feed] | None = None,
) -> State:
    """Trains to `config.train.steps` in `workdir`, from its newest complete checkpoint if there is one.

    `evaluate(parameters, step, meet)` returns metrics to record; all processes call it every `train.evaluate_every` steps and at the end.
    `draw(batch)` makes WORKDIR/first_batch.png of the first batch. `initial_parameters` reads the files of `config.init_from`.
    `cluster`: the processes that train together, where there are several; they stop after the same step, whichever of them
    received the signal. `decide` is called after every evaluation: it stops the run, cuts the learning rates, or names the checkpoint
    that `checkpoint.best` keeps, instead of `checkpoint.best_by`. `feed(mixture, state)`: other batches of the mixture, such as encoded
    ones, and the objective that reads them. The last line logged is `fingerprint: SHA-256`.

    Settings, data and devices are checked before anything is written.

    Raises:
        CheckpointError: the checkpoint has other settings and `resume_with_changes` is not set, or `workdir` cannot be written.
        MeshError: batch, devices and mesh do not fit.
        ConfigError: data are missing or damaged, or optax has no optimizer of that name.
        NotSavedError: a checkpoint could not be written.
        NonFiniteLossError: the loss or a gradient is not finite.
        CorruptDataError: more of a source is corrupt than `data.max_corrupt_rate`.
        SystemExit: after a signal, when the step was saved; with exit_codes.PREEMPTED or CANCELLED.
    """
    validate(config)
    times = StartTimes()
    fsspec_gcs.do_without(enable_compilation_cache(workdir))
    mesh = make_mesh(config.mesh)
    times.initialized()
    check_fits(config, mesh)
    make_optimizer({}, config.train.steps, config.optimizer)  # raises for an unknown optimizer
    # A run that has finished needs no data.
    mixture = Mixture(config) if max(complete_steps(workdir), default=0) < config.train.steps else None
    first = jax.process_index() == 0
    for note in [*mixture.notes, *reduced_records(mixture)] if mixture is not None and first else ():
        logger.info(f"note: {note}")
    wandb = wandb_module(config.train.wandb) if first else None
    on_first_process(lambda: prepare(workdir))
    check_shared(workdir)
    with contextlib.ExitStack() as stack:
        owned: list[Owned] = []
        on_first_process(lambda: owned.append(stack.enter_context(owned_workdir(workdir))))
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint.keep, config.checkpoint))
        if (saved := checkpoints.latest()) is not None:
            config = resumed(checkpoints.run(saved), config)
        with times.restoring() if saved is not None else contextlib.nullcontext():
            state = _start(config, workdir, mesh, checkpoints, initial_parameters, resume_with_changes)
        start = int(state.step)
        if mixture is None and start < config.train.steps:  # the last checkpoint is damaged
            mixture = Mixture(config)
        progress = Progress(start, config.train.steps, quiet=not first)
        stack.callback(progress.close)
        lines = checkpoints.lines(start) if start else []
        sink = stack.enter_context(wandb_run(wandb, workdir, config))
        writer = stack.enter_context(Writer(workdir, start, lines, sink, progress.log)) if first else None
        write_config(workdir, config)
        note = note_on_averages(config.train.steps, config.optimizer) if config.evaluation.parameters == "ema" else ""
        if note and first:
            logger.warning(note)
        signals = StopSignals(None if cluster is None else cluster.asked)
        evaluations = Evaluations(config, workdir, evaluate, writer, progress.log, cluster, signals)
        decisions = Decisions(decide, mesh, progress.log)
        run = _Run(
            config, epath.Path(workdir), mesh, checkpoints, writer, progress, evaluations, decisions, cluster, signals, owned, times
        )  # fmt: skip
        run.read_scores(start, lines)
        if cluster is not None:
            # Entered last, it is the first context that an error leaves: nothing that follows waits for long for processes that are gone.
            stack.enter_context(cluster)
        if mixture is not None and not decisions.stop:
            fed = feed(mixture, state) if feed else Feed(partial(mixture.batches, patches=config.model.patches))
            state = _train_steps(run, state, start, mixture, fed, draw)
        elif evaluations.missing(start):
            with signals:
                run.evaluation(start, state)
        checkpoints.wait()
        digest = fingerprint(state.params)
        if first:
            progress.log(f"fingerprint: {digest}")
    return state


def _objective(config: Config, mixture: Mixture, state: State, mesh: Mesh) -> Objective:
    """`glip_objective`, with the vectors of the descriptions where a setting uses them: the text encoder is frozen, so a resumed run makes the same.

    Raises ConfigError for a description beyond the token budget.
    """
    if not config.reads_descriptions or mixture.descriptions is None:
        return glip_objective(config)
    text = jax.jit(lambda params: params, out_shardings=replicated(mesh))(state.params["text"])
    try:
        table = description_table(
            {"text": jax.tree.map(np.asarray, text)}, config.model, mixture.descriptions, mixture.tokenizer
        )
    except PromptError as error:
        raise ConfigError(f"data.captions.descriptions.file: {error}") from None
    return glip_objective(config, descriptions=table)


def _start(
    config: Config,
    workdir: str,
    mesh: Mesh,
    checkpoints: Checkpoints,
    initial_parameters: InitialParameters | None,
    resume_with_changes: bool,
) -> State:
    """The initial state, from 1. the newest complete checkpoint, 2. the files of `config.init_from`, 3. random values."""
    first = jax.process_index() == 0
    log = logger.info if first else lambda _: None
    step = checkpoints.latest()
    if step is None:
        params, record = _read_initial(fresh_parameters(config, mesh), config, initial_parameters)
        files = " and ".join(name for name in ("model", "backbone", "text") if getattr(config.init_from, name))
        check_sources(workdir, None, config, accept=True)
        log(f"starting at step 0 from {f'pretrained {files}, the rest random' if files else 'random values'}")
        if first:
            overview = parameter_overview.get_parameter_overview(params, include_stats=False)
            (workdir_path(workdir) / "parameters.txt").write_text(overview + "\n")
            write_started_from(workdir, record)
        return fresh_state(params, config, mesh)
    changes = check_config(workdir, step, checkpoints.run(step), config, accept=resume_with_changes)
    changes += check_sources(workdir, step, config, accept=resume_with_changes)
    for line in changes:
        log(f"new phase from step {step}: {line}")
    like = abstract_state(config, mesh)
    if checkpoints.imported(step):
        params = checkpoints.restore(step, Saved(like.params, {}, {})).params
        log(f"starting at step {step} from imported weights, {checkpoints.folder / str(step)}")
        return fresh_state(params, config, mesh)
    params, optimizer, ema = checkpoints.restore(step, Saved(like.params, like.optimizer, like.ema))
    log(f"resuming at step {step} from {checkpoints.folder / str(step)}")
    return State(params, optimizer, ema, jax.device_put(jnp.int32(step), like.step.sharding))


def _read_initial(
    params: dict[str, Any], config: Config, initial_parameters: InitialParameters | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` with the random values replaced by what `config.init_from` names, and a record of it."""
    init = config.init_from
    if not (init.model or init.backbone or init.text):
        return params, {}
    if initial_parameters is None:
        raise ConfigError(
            f"init_from is {init}, but this caller of train() gave no `initial_parameters` to read the files with"
        )
    read, record = initial_parameters(params, config)
    return jax.device_put(read, jax.tree.map(lambda leaf: leaf.sharding, params)), record


@dataclass(frozen=True)
class _Run:
    """What does not change from step to step."""

    config: Config
    folder: epath.Path
    mesh: Mesh
    checkpoints: Checkpoints
    writer: Writer | None
    """None on all processes but the first."""
    progress: Progress
    evaluations: Evaluations
    decisions: Decisions
    cluster: Cluster | None
    signals: StopSignals
    owned: list[Owned]
    """The working folder, on the first process."""
    times: StartTimes

    def draw_first_batch(self, batch: Batch, draw: Callable[[Batch], bytes] | None) -> None:
        """Writes WORKDIR/first_batch.png, if it is asked for."""
        if draw is not None and self.config.train.draw_first_batch and self.writer is not None:
            self.writer.file("first_batch.png", draw(batch))
            self.progress.log(f"first batch drawn: {self.folder / 'first_batch.png'}")

    def save(self, step: int, state: State) -> None:
        """Starts writing a checkpoint, with the lines of metrics that are not in metrics.jsonl yet."""
        lines = []
        if self.writer is not None:
            lines = self.writer.unwritten()
            self.writer.flush()
        self.checkpoints.save(step, Saved(state.params, state.optimizer, state.ema), self.config, lines)

    def stop(self, step: int) -> None:
        """Ends the process after a signal, as soon as the checkpoint of `step` is complete."""
        self.checkpoints.wait()
        number = self.signals.number if self.cluster is None else self.cluster.met(self.signals.number)
        code = CANCELLED if number == signal.SIGINT else PREEMPTED
        name = signal.Signals(number).name
        self.progress.log(f"{name}: saved step {step}; the same command goes on from there (exit code {code})")
        raise SystemExit(code)

    def evaluation(self, step: int, state: State) -> None:
        """Evaluates `step`, which is saved. A signal ends that and the run at once; the evaluation is made after the resume."""
        metrics, score, left = self.evaluations.make(step, state)
        if left:
            self.stop(step)
        if not self.decisions.made:
            self.score(step, {self.config.checkpoint.best_by: score})
        elif self.decisions.make(step, metrics).best:
            self.checkpoints.scored(step, step)

    def read_scores(self, start: int, lines: Sequence[str]) -> None:
        """The scores of earlier evaluations, and the decisions after them, when the run resumes at `start`.

        `lines`: those that the checkpoint holds. Among checkpoints that a decision named, the latest is the best one.
        """
        recorded = read(str(self.folder)) if self.decisions.made or self.config.checkpoint.best else []
        if not self.decisions.made:
            for line in recorded:
                self.score(line["step"], line)
        elif start:
            for step in self.decisions.replay([*lines, *recorded], start):
                self.checkpoints.scored(step, step)

    def score(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Gives the checkpoints the score of `step`, where `metrics` hold `checkpoint.best_by`."""
        value = metrics.get(self.config.checkpoint.best_by)
        if isinstance(value, int | float) and not np.isnan(value):
            self.checkpoints.scored(step, value)


class _Dispatched(NamedTuple):
    """A step that the devices work on."""

    step: int
    state: State
    """After the step."""
    last: bool
    """Whether it is the last one of the run."""
    stops: bool
    """Whether a signal stops the run after this step; the same in all processes."""


class _Hook(NamedTuple):
    """An action that follows some of the steps."""

    due: Callable[[_Dispatched], bool]
    action: Callable[[_Dispatched], None]


def _train_steps(
    run: _Run, state: State, start: int, mixture: Mixture, feed: Feed, draw: Callable[[Batch], bytes] | None
) -> State:
    """Runs the steps after `start`; see `train`."""
    config, settings, mesh = run.config, run.config.train, run.mesh
    file = run.writer.file if run.writer is not None else None
    throughput = Throughput(config, mesh)
    pending = PendingMetrics(
        config, str(run.folder), start, mixture, throughput, run.progress, run.writer, run.checkpoints, run.times
    )
    watchdog = Watchdog(run.folder, settings.hang_multiple, settings.hang_min, settings.hang_first, file, start)
    profiler = Profiler(run.folder, settings.profile, file, run.progress.log)
    cuts = run.decisions.made or feed.rate is not None
    objective = feed.objective or _objective(config, mixture, state, mesh)
    step_function = make_step(config, mesh, objective, state, tuple(mixture.source_names), cuts)
    batches = iter(feed.batches(start, jax.process_index(), jax.process_count()))
    programs = Programs(step_function, map(mixture.canvas, range(start, min(settings.steps, start + _STEPS_AHEAD))))
    seen: set[tuple[int, ...]] = set()

    def dispatch(state: State, batch: Batch, step: int) -> tuple[State, dict[str, Any]]:
        canvas = mixture.canvas(step - 1)
        name = f"canvas {len(seen) + 1} of {len(mixture.canvases)} ({canvas[0]}x{canvas[1]})"
        waits = programs.waits(canvas)
        if not waits and canvas not in seen:
            run.progress.log(f"{name}: compiled beside the training")
        with _compiling(run, throughput, watchdog, name) if waits else contextlib.nullcontext():
            cut = (run.decisions.scale(feed.rate(step - 1) if feed.rate is not None else 1.0),) if cuts else ()
            result = programs(canvas, state, place_batch(batch, mesh), *cut)
        seen.add(canvas)
        throughput.step(canvas, batch.tokens.shape[-1])
        return result

    def save(now: _Dispatched) -> None:
        pending.report(now.step)
        with throughput.exclude("checkpoint"):
            run.save(now.step, now.state)

    def evaluation(now: _Dispatched) -> None:
        with throughput.exclude("evaluation"), watchdog.paused():
            run.evaluation(now.step, now.state)

    def end_profile(now: _Dispatched) -> None:
        with throughput.exclude("profile"):
            profiler.stop(now.step)

    def saves(now: _Dispatched) -> bool:
        every = config.checkpoint.every
        return now.last or now.stops or (every > 0 and now.step % every == 0) or run.evaluations.due(now.step)

    # In this order: what is evaluated was saved, also where a signal or a kill ends the evaluation, which is then made after the
    # resume; and a run that a signal stops evaluates nothing.
    hooks = [
        _Hook(saves, save),
        _Hook(
            lambda now: now.stops and (not now.last or run.evaluations.due(now.step)), lambda now: run.stop(now.step)
        ),
        _Hook(lambda now: run.evaluations.due(now.step), evaluation),
        _Hook(lambda now: profiler.ends(now.step, now.last or run.decisions.stop), end_profile),
    ]

    with run.signals, pending, contextlib.ExitStack() as stack:
        stack.callback(getattr(batches, "close", lambda: None))  # Grain's threads end before the process does
        stack.enter_context(watchdog)
        stack.enter_context(programs)
        if run.evaluations.missing(start):
            evaluation(_Dispatched(start, state, False, False))
        for step in range(start + 1, settings.steps + 1):
            if run.decisions.stop:
                break
            profiler.start_if_due(step, watchdog.take_request())
            begin = time.perf_counter()
            batch = next(batches)
            wait = time.perf_counter() - begin
            if step == 1:
                run.draw_first_batch(batch, draw)
            state, metrics = dispatch(state, batch, step)
            # Reads the metrics of the step before, while the devices work on this one.
            pending.push(step, metrics, wait)
            run.checkpoints.check()
            for each in run.owned:
                each.check()
            stops = run.signals.number != 0 if run.cluster is None else run.cluster.agreed()
            now = _Dispatched(step, state, step == settings.steps, stops)
            for hook in hooks:
                if hook.due(now):
                    # Before the action: a state that is not finite is never saved.
                    pending.drain()
                    hook.action(now)
            watchdog.heartbeat(step)
    return state


@contextlib.contextmanager
def _compiling(run: _Run, throughput: Throughput, watchdog: Watchdog, canvas: str) -> Iterator[None]:
    """Around the first step on a canvas."""
    begin = time.perf_counter()
    run.progress.log(f"compiling {canvas}")
    with throughput.exclude("compile"), watchdog.compiling():
        yield
    counts = program_counts()
    run.progress.log(
        f"{canvas}: step ready in {time.perf_counter() - begin:.1f} s; programs so far: {counts.compiled} compiled, {counts.cached} from the cache"
    )
