"""Training from the first step, or from the newest checkpoint, to the last: what `python -m glip_jax train` runs.

The loop dispatches a step, then reads the numbers of the one before, so the accelerator never waits for the host.
"""

import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from glip_jax import UserError
from glip_jax.config import Config, ConfigError, validate
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.cluster import Cluster
from glip_jax.distributed.exit_codes import CANCELLED, PREEMPTED
from glip_jax.distributed.mesh import check_fits, make_mesh, place_batch, shardings
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io.checkpoint import Checkpoints, Saved, complete_steps, fingerprint
from glip_jax.io.workdir import check_config, opened, prepare, write_config, write_started_from
from glip_jax.structures.batch import Batch
from glip_jax.training.monitoring.metrics import Progress, Window, read
from glip_jax.training.monitoring.profiler import Profiler
from glip_jax.training.monitoring.source_counts import SourceCounts
from glip_jax.training.monitoring.throughput import Throughput
from glip_jax.training.monitoring.watchdog import Watchdog
from glip_jax.training.monitoring.writer import Writer, wandb_module, wandb_run
from glip_jax.training.state import State, abstract_state, evaluation_parameters, fresh_parameters, initial_state
from glip_jax.training.step import glip_objective, make_step

__all__ = ["NonFiniteLossError", "InitialParameters", "train"]

InitialParameters = Callable[[dict[str, Any], Config], tuple[dict[str, Any], dict[str, Any]]]
"""(parameters, config) to parameters of which `config.init_from` names files, and the record of what was read:
`glip_jax.weights.pretrained.initialize`."""

_PER_EXAMPLE = ("bad", "invalid", "source", "record")


class NonFiniteLossError(UserError, RuntimeError):
    """The loss or a gradient is NaN or infinite; the message names step, parts and examples."""


class _Pending(NamedTuple):
    """A dispatched step whose numbers were not read yet."""

    step: int
    metrics: dict[str, Any]
    wait: float


def train(
    config: Config,
    workdir: str,
    evaluate: Callable[[dict[str, Any], int], dict[str, float]] | None = None,
    draw: Callable[[Batch], bytes] | None = None,
    initial_parameters: InitialParameters | None = None,
    resume_with_changes: bool = False,
    cluster: Cluster | None = None,
) -> State:
    """Trains to `config.train.steps` in `workdir`, going on from its newest complete checkpoint if there is one.

    `evaluate(parameters, step)` returns numbers to record, every `train.evaluate_every` steps and at the end;
    `draw(batch)` makes WORKDIR/first_batch.png of the first batch; `initial_parameters` reads the files of `config.init_from`.
    Ends with a line `fingerprint: SHA-256`. `cluster`: the processes that train together, where there are several; they
    stop after the same step, whichever of them got the signal.

    What does not fit is found before anything is written. Raises CheckpointError if the checkpoint has other settings
    and `resume_with_changes` is not set or if `workdir` cannot be written, MeshError if batch, devices and mesh do not
    fit, ConfigError for data that are missing or damaged, NotSavedError if a checkpoint could not be written,
    NonFiniteLossError, CorruptDataError past `data.max_corrupt_rate`; SystemExit with exits.PREEMPTED or CANCELLED after a signal, saved.
    """
    validate(config)
    enable_compilation_cache()
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    # A run that is at its end needs no data.
    mixture = Mixture(config) if max(complete_steps(workdir), default=0) < config.train.steps else None
    first = jax.process_index() == 0
    wandb = wandb_module(config.train.wandb) if first else None
    prepare(workdir)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint.keep, config.checkpoint))
        state = _start(config, workdir, mesh, checkpoints, initial_parameters, resume_with_changes)
        start = int(state.step)
        if mixture is None and start < config.train.steps:  # its last checkpoint turned out to be damaged
            mixture = Mixture(config)
        progress = Progress(start, config.train.steps, quiet=not first)
        stack.callback(progress.close)
        kept = checkpoints.lines(start) if start else []
        sink = stack.enter_context(wandb_run(wandb, workdir, config))
        writer = stack.enter_context(Writer(workdir, start, kept, sink, progress.say)) if first else None
        write_config(workdir, config)
        run = _Run(config, workdir, mesh, checkpoints, writer, progress, evaluate, cluster)
        for line in read(workdir) if config.checkpoint.best else ():
            run.score(line["step"], line)
        if cluster is not None:
            stack.enter_context(
                cluster
            )  # the first to hear of what goes wrong, before anything waits for other processes
        if mixture is not None:
            state = run.steps(state, start, mixture, draw)
        elif evaluate is not None:
            run.evaluation(state, start)
        checkpoints.wait()
        digest = fingerprint(state.params)
        if first:
            progress.say(f"fingerprint: {digest}")
    return state


def _start(
    config: Config,
    workdir: str,
    mesh: Mesh,
    checkpoints: Checkpoints,
    initial_parameters: InitialParameters | None,
    resume_with_changes: bool,
) -> State:
    """What to start from: 1. the newest complete checkpoint, 2. the files of `config.init_from`, 3. random values."""
    first = jax.process_index() == 0
    say = print if first else lambda *_, **__: None
    step = checkpoints.latest()
    if step is None:
        params, record = _read(fresh_parameters(config, mesh), config, initial_parameters)
        read = " and ".join(name for name in ("model", "backbone", "text") if getattr(config.init_from, name))
        say(f"starting at step 0 from {f'pretrained {read}, the rest random' if read else 'random values'}", flush=True)
        if first:
            overview = parameter_overview.get_parameter_overview(params, include_stats=False)
            (opened(workdir) / "parameters.txt").write_text(overview + "\n")
            write_started_from(workdir, record)
        state = initial_state(params, config)
        return jax.device_put(state, shardings(state, mesh))
    changes = check_config(workdir, step, checkpoints.run(step), config, accept=resume_with_changes)
    for line in changes:
        say(f"new phase from step {step}: {line}")
    like = abstract_state(config, mesh)
    if checkpoints.imported(step):
        params = checkpoints.restore(step, Saved(like.params, {}, {})).params
        say(f"starting at step {step} from imported weights, {checkpoints.folder / str(step)}", flush=True)
        state = initial_state(params, config)
        return jax.device_put(state, shardings(state, mesh))
    params, moments, ema = checkpoints.restore(step, Saved(like.params, like.optimizer, like.ema))
    say(f"resuming at step {step} from {checkpoints.folder / str(step)}", flush=True)
    return State(params, moments, ema, jax.device_put(jnp.int32(step), like.step.sharding))


def _read(
    params: dict[str, Any], config: Config, initial_parameters: InitialParameters | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` with what `config.init_from` names in the place of random values, and the record of it."""
    init = config.init_from
    if not (init.model or init.backbone or init.text):
        return params, {}
    if initial_parameters is None:
        raise ConfigError(
            f"init_from is {init}, but this caller of train() gave no `initial_parameters` to read the files with"
        )
    read, record = initial_parameters(params, config)
    return jax.device_put(read, jax.tree.map(lambda leaf: leaf.sharding, params)), record


class _Run:
    """The steps of one process: what stays the same from step to step, and the windows of numbers."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: Mesh,
        checkpoints: Checkpoints,
        writer: Writer | None,
        progress: Progress,
        evaluate: Callable[[dict[str, Any], int], dict[str, float]] | None,
        cluster: Cluster | None,
    ) -> None:
        self.config, self.mesh, self.folder = config, mesh, epath.Path(workdir)
        self.checkpoints, self.writer, self.progress, self.evaluate = checkpoints, writer, progress, evaluate
        self.cluster = cluster
        self.window, self.throughput = Window(), Throughput(config, mesh)
        keep, settings = writer.file if writer is not None else None, config.train
        self.watchdog = Watchdog(self.folder, settings.hang_multiple, settings.hang_min, settings.hang_first, keep)
        self.profiler = Profiler(self.folder, settings.profile, keep, progress.say) if keep is not None else None
        self.counts: SourceCounts | None = None
        self.names: tuple[str, ...] = ()
        self.describe: Callable[[int, int], str] = "{}[{}]".format

    def steps(self, state: State, start: int, mixture: Mixture, draw: Callable[[Batch], bytes] | None) -> State:
        """Runs the steps after `start`; see `train`."""
        config, pending = self.config, None
        self.names, self.describe = tuple(mixture.source_names), mixture.describe
        self.counts = SourceCounts(self.names, mixture.records, config.data, mixture.describe)
        self.counts.resume(read(str(self.folder)) if start else [], mixture.shares, start * config.train.batch_size)
        step_function = make_step(config, self.mesh, glip_objective(config), state, self.names)
        canvases: set[tuple[int, ...]] = set()
        batches = iter(mixture.batches(start, jax.process_index(), jax.process_count()))
        with _signals() as received, contextlib.ExitStack() as stack:
            stack.callback(getattr(batches, "close", lambda: None))  # Grain's threads end before the process does
            self.watchdog.step = start
            stack.enter_context(self.watchdog)
            for step in range(start + 1, config.train.steps + 1):
                if self.profiler is not None:
                    self.profiler.before(step, self.watchdog.asked)
                    self.watchdog.asked = 0
                begin = time.perf_counter()
                batch = next(batches)
                wait = time.perf_counter() - begin
                if step == 1 and draw is not None and config.train.draw_first_batch and self.writer is not None:
                    self.writer.file("first_batch.png", draw(batch))
                    self.progress.say(f"first batch drawn: {self.folder / 'first_batch.png'}")
                canvas = batch.image.shape[1:3]
                with self._compiling(canvas) if canvas not in canvases else contextlib.nullcontext():
                    state, metrics = step_function(state, place_batch(batch, self.mesh))
                canvases.add(canvas)
                self.throughput.step(canvas, batch.tokens.shape[-1])
                self._read(pending)
                self.checkpoints.check()
                pending = _Pending(step, metrics, wait)
                last, stop = step == config.train.steps, _stop(received, step, self.cluster)
                if last or stop or step % config.checkpoint.every == 0:
                    # The numbers first: a state that is not finite is never saved.
                    self._read(pending, flush=True)
                    pending = None
                    saved, lines = Saved(state.params, state.optimizer, state.ema), []
                    if self.writer is not None:
                        lines = self.writer.unwritten()
                        self.writer.flush()
                    with self.throughput.exclude("checkpoint"):
                        self.checkpoints.save(step, saved, config, lines)
                if stop and not last:
                    self._leave(step, stop)
                every = config.train.evaluate_every
                if self.evaluate is not None and (last or (every > 0 and step % every == 0)):
                    self._read(pending)
                    pending = None
                    with self.throughput.exclude("evaluation"), self.watchdog.paused():
                        self.evaluation(state, step)
                if self.profiler is not None and self.profiler.ends(step, last):
                    self._read(pending)  # so that the step is over on the devices as well
                    pending = None
                    with self.throughput.exclude("profile"):
                        self.profiler.end(step)
                self.watchdog.heartbeat(step)
        return state

    @contextlib.contextmanager
    def _compiling(self, canvas: tuple[int, ...]) -> Iterator[None]:
        """Around the first step of a canvas."""
        begin = time.perf_counter()
        with self.throughput.exclude("compile"), self.watchdog.compiling():
            yield
        self.progress.say(f"canvas {canvas[0]}x{canvas[1]}: step ready in {time.perf_counter() - begin:.1f} s")

    def evaluation(self, state: State, step: int) -> None:
        """Evaluates and records the numbers at `step`; of several processes the first does, the others wait for it."""
        parameters, several = evaluation_parameters(state, self.config), jax.process_count() > 1
        if several:
            parameters = multihost_utils.process_allgather(parameters, tiled=True)
        score = self._evaluated(parameters, step) if self.writer is not None else np.nan
        if several:
            # All keep the same checkpoints then. And they wait here, not in the next step, which would seem to hang.
            score = float(multihost_utils.broadcast_one_to_all(np.float32(score)))
        self.score(step, {self.config.checkpoint.best_by: score})

    def _evaluated(self, parameters: dict[str, Any], step: int) -> float:
        """Evaluates, says and writes; returns the number that `checkpoint.best_by` names, NaN where it names none."""
        assert self.evaluate is not None
        assert self.writer is not None
        numbers = self.evaluate(parameters, step)
        by_set: defaultdict[str, list[str]] = defaultdict(list)
        for name, value in numbers.items():
            of, _, number = name.removeprefix("evaluation/").partition("/")
            by_set[of].append(f"{number} {value:.4f}")
        for of, values in by_set.items():
            self.progress.say(f"step {step}: {of}  " + "  ".join(values))
        best_by = self.config.checkpoint.best_by
        if self.config.checkpoint.best and best_by not in numbers:
            raise ConfigError(f"checkpoint.best_by is {best_by!r}: the evaluation gave {', '.join(sorted(numbers))}")
        self.writer.write(step, numbers)
        self.writer.flush()
        return numbers.get(best_by, np.nan)

    def score(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Tells the checkpoints how good `step` is, where `numbers` say so."""
        value = numbers.get(self.config.checkpoint.best_by)
        if isinstance(value, int | float) and not np.isnan(value):
            self.checkpoints.scored(step, value)

    def _read(self, pending: _Pending | None, flush: bool = False) -> None:
        """Waits for a step's numbers, checks them and closes the window where one ends (or on `flush`)."""
        if pending is None:
            return
        numbers = jax.device_get(pending.metrics)
        if not numbers["finite"]:
            raise NonFiniteLossError(self._complaint(pending.step, numbers))
        assert self.counts is not None
        self.counts.add(numbers["source"], numbers["record"], numbers["invalid"])
        scalars = {name: value for name, value in numbers.items() if name not in (*_PER_EXAMPLE, "finite")}
        self.window.add({**scalars, "wait_seconds": pending.wait})
        self.progress.advance()
        if flush or pending.step % self.config.train.log_every == 0:
            metrics = self.window.take()
            metrics |= self.throughput.take(metrics) | self.counts.metrics()
            self.progress.window(pending.step, metrics, self.names)
            if self.writer is not None:
                self.writer.write(pending.step, metrics)

    def _complaint(self, step: int, numbers: dict[str, Any]) -> str:
        parts = {name: float(value) for name, value in numbers.items() if name == "loss" or name.startswith("loss/")}
        parts["gradient_norm"] = float(numbers["gradient_norm"])
        listed = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        chosen = np.flatnonzero(numbers["bad"]) if numbers["bad"].any() else np.arange(len(numbers["bad"]))
        which = (
            "examples with a non-finite loss" if numbers["bad"].any() else "no single example's loss is; the batch was"
        )
        places = [(int(numbers["source"][i]), int(numbers["record"][i])) for i in chosen]
        examples = "; ".join(self.describe(*place) for place in places)
        latest = self.checkpoints.latest()
        return (
            f"step {step}: loss or gradient is not finite: {listed}\n{which}: {examples}\n"
            f"Newest checkpoint: {'none' if latest is None else f'step {latest}'}. Nothing was skipped or saved; look at "
            "those records, or lower optimizer.rate, lengthen optimizer.warmup_steps or lower optimizer.clip_norm."
        )

    def _leave(self, step: int, stop: int) -> None:
        self.checkpoints.wait()
        code = PREEMPTED if stop == signal.SIGTERM else CANCELLED
        name = signal.Signals(stop).name
        self.progress.say(f"{name}: saved step {step}; the same command goes on from there (exit code {code})")
        raise SystemExit(code)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying from the first; a second one acts as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are someone else's
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(received: list[int], step: int, cluster: Cluster | None) -> int:
    """The signal to stop for after this step, 0 for none; agreed between processes."""
    first = received[0] if received else 0
    return first if cluster is None else cluster.agreed(first, step)
