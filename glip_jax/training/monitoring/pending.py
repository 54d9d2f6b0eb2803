"""The metrics of the newest step, which are read while the devices work on the next one, and the lines that are made of them."""

import contextlib
from typing import Any

import jax
import numpy as np

from glip_jax import UserError
from glip_jax.config import Config
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.exit_codes import NOT_FINITE
from glip_jax.io.checkpoint import Checkpoints
from glip_jax.training.monitoring.goodput import StartTimes
from glip_jax.training.monitoring.metrics import Progress, Window, read
from glip_jax.training.monitoring.source_counts import SourceCounts
from glip_jax.training.monitoring.throughput import Throughput
from glip_jax.training.monitoring.writer import Writer

__all__ = ["NonFiniteLossError", "PendingMetrics"]

_PER_EXAMPLE = ("bad", "invalid", "source", "record")


class NonFiniteLossError(UserError, RuntimeError):
    """The loss or a gradient is NaN or infinite; the message names the step, the parts of the loss and the examples."""

    exit_code = NOT_FINITE


class PendingMetrics:
    """The metrics of the newest step, still on the devices, and the window of steps that the next line is about.

    A step's metrics are read when the next step was dispatched, or earlier for a hook (`drain`). Reading them checks them and,
    every `train.log_every` steps, writes the line.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        start: int,
        mixture: Mixture,
        throughput: Throughput,
        progress: Progress,
        writer: Writer | None,
        checkpoints: Checkpoints,
        times: StartTimes,
    ) -> None:
        """`times`: those of this start, of which the first line is made."""
        self._log_every, self._progress, self._writer, self._checkpoints = (
            config.train.log_every,
            progress,
            writer,
            checkpoints,
        )
        if writer is not None:
            writer.times(start, "start", times.line())
        self._throughput, self._window = throughput, Window()
        self._names, self._describe = tuple(mixture.source_names), mixture.describe
        self._counts = SourceCounts(self._names, mixture.records, config.data, mixture.describe)
        lines = read(workdir) if start else []
        self._counts.resume(lines, mixture.shares, start * config.train.batch_size)
        self._newest: tuple[int, dict[str, Any], float] | None = None
        self._step = start

    def __enter__(self) -> "PendingMetrics":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Waits for the last checkpoint, and writes where the time since the last line went."""
        if kind is None:
            self._checkpoints.wait()
        excluded, steps = self._throughput.take_excluded(), self._window.steps
        seconds = self._window.take()["seconds"]
        if not steps:  # nothing else is waited for after the last line
            excluded["checkpoint_seconds"] = round(
                seconds - sum(excluded.values()) + excluded.get("checkpoint_seconds", 0), 4
            )
        if self._writer is not None:
            with contextlib.suppress(OSError):  # which the writer raises when it is left
                self._writer.times(self._step, "end", {"seconds": seconds, **excluded})

    def push(self, step: int, metrics: dict[str, Any], wait: float) -> None:
        """Drains, then keeps the metrics of `step`, whose batch took `wait` seconds to come."""
        self.drain()
        self._newest = step, metrics, wait

    def drain(self) -> None:
        """Waits for the metrics that were pushed last, if they were not read yet.

        Raises NonFiniteLossError if loss or gradient is not finite, CorruptDataError past `data.max_corrupt_rate`.
        """
        if self._newest is None:
            return
        (step, metrics, wait), self._newest = self._newest, None
        metrics, self._step = jax.device_get(metrics), step
        if not metrics["finite"]:
            raise NonFiniteLossError(self._not_finite(step, metrics))
        self._counts.add(metrics["source"], metrics["record"], metrics["invalid"])
        scalars = {name: value for name, value in metrics.items() if name not in (*_PER_EXAMPLE, "finite")}
        self._window.add({**scalars, "wait_seconds": wait})
        self._progress.advance()
        if step % self._log_every == 0:
            self.report(step)

    def report(self, step: int) -> None:
        """Closes the window, unless it is empty, with a line for `step`, the last step that was read."""
        if not self._window.steps:
            return
        metrics = self._window.take()
        metrics |= self._throughput.take(metrics) | self._counts.metrics()
        self._progress.window(step, metrics, self._names)
        if self._writer is not None:
            self._writer.write(step, metrics)

    def _not_finite(self, step: int, metrics: dict[str, Any]) -> str:
        parts = {name: float(value) for name, value in metrics.items() if name == "loss" or name.startswith("loss/")}
        parts["gradient_norm"] = float(metrics["gradient_norm"])
        listed = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        bad = metrics["bad"]
        which = "examples with a non-finite loss" if bad.any() else "no single example's loss is; the batch was"
        chosen = np.flatnonzero(bad) if bad.any() else np.arange(len(bad))
        examples = "; ".join(self._describe(int(metrics["source"][i]), int(metrics["record"][i])) for i in chosen)
        latest = self._checkpoints.latest()
        return (
            f"step {step}: loss or gradient is not finite: {listed}\n{which}: {examples}\n"
            f"Newest checkpoint: {'none' if latest is None else f'step {latest}'}. Nothing was skipped or saved; look at "
            "those records, or lower optimizer.rate, lengthen optimizer.warmup_steps or lower optimizer.clip_norm."
        )
