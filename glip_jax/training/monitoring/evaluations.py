"""Evaluations while training: after which steps, by all processes, recorded by the first; one that was cut short is made again."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from glip_jax.config import Config, ConfigError
from glip_jax.distributed.cluster import Cluster
from glip_jax.io.checkpoint_reader import note_on_averages
from glip_jax.training.monitoring.metrics import read
from glip_jax.training.monitoring.signals import EvaluationLeft, StopSignals
from glip_jax.training.monitoring.writer import Writer
from glip_jax.training.state import State, evaluation_parameters

__all__ = ["Evaluate", "Evaluations", "Meet"]

Meet = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes the context of a collective of all processes."""
Evaluate = Callable[[dict[str, Any], int, Meet], dict[str, float]]
"""(parameters, step, context of collectives) to the metrics to record, the same in all processes."""


class Evaluations:
    """The evaluations of one run; none where `evaluate` is None."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        evaluate: Evaluate | None,
        writer: Writer | None,
        log: Callable[[str], None],
        cluster: Cluster | None,
        signals: StopSignals,
    ) -> None:
        """`writer`: None on all processes but the first."""
        self._config, self._workdir, self._evaluate = config, workdir, evaluate
        self._writer, self._log, self._cluster, self._signals = writer, log, cluster, signals

    def due(self, step: int) -> bool:
        """Whether an evaluation follows `step`."""
        every = self._config.train.evaluate_every
        return self._evaluate is not None and (step == self._config.train.steps or (every > 0 and step % every == 0))

    def missing(self, step: int) -> bool:
        """Whether the run ended within the evaluation after `step`, so that it is to be made now; the same in all processes."""
        if not step or not self.due(step):
            return False
        lines = [line for line in read(self._workdir) if line["step"] == step and "loss" not in line]
        names = {name for line in lines for name in line if name != "step"}
        sets = (f"evaluation/{name}/" for name in self._config.evaluation.sets)
        missing = not names or not all(any(name.startswith(each) for name in names) for each in sets)
        return bool(multihost_utils.broadcast_one_to_all(np.int32(missing))) if jax.process_count() > 1 else missing

    def make(self, step: int, state: State) -> tuple[dict[str, float], float, bool]:
        """Evaluates the parameters of `state` and records the metrics. Returns (metrics, score, left), the same in all processes.

        The score is the metric `checkpoint.best_by`, NaN where that is empty. A signal, to whichever process, ends the evaluation
        at once, of several processes within seconds, without a record: then `left` is true, and the processes have agreed to stop
        where they are.

        Raises ConfigError if the metrics do not hold `checkpoint.best_by`.
        """
        parameters, several = evaluation_parameters(state, self._config), jax.process_count() > 1
        if several:
            parameters = multihost_utils.process_allgather(parameters, tiled=True)
        score, left = np.nan, False
        metrics: dict[str, float] = {}
        assert self._evaluate is not None
        try:
            with self._signals.leaving():
                metrics = self._evaluate(parameters, step, self._meeting)
        except EvaluationLeft:
            left = True
        if self._cluster is not None:
            # Processes wait for one another here, not in the next step, which would seem to hang.
            left = self._cluster.met(self._signals.number) != 0
        if not left:
            score = self._recorded(metrics, step)
            if several:
                # All processes keep the same checkpoints then.
                score = float(multihost_utils.broadcast_one_to_all(np.float32(score)))
        return metrics, score, left

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """The context of a collective: entered when all processes are there. Raises EvaluationLeft in all if one left for a signal."""
        with self._signals.held():
            if self._cluster is not None and self._cluster.met(self._signals.number):
                raise EvaluationLeft
            yield

    def _recorded(self, metrics: dict[str, float], step: int) -> float:
        """Logs and records, which the first process does; returns the score."""
        by_set: defaultdict[str, list[str]] = defaultdict(list)
        for name, value in metrics.items():
            dataset, _, metric = name.removeprefix("evaluation/").partition("/")
            by_set[dataset].append(f"{metric} {value:.4f}")
        for dataset, values in by_set.items():
            self._log(f"step {step}: {dataset}  " + "  ".join(values))
        if self._config.evaluation.parameters == "ema" and (note := note_on_averages(step, self._config.optimizer)):
            self._log(note)
        best_by = self._config.checkpoint.best_by
        if self._config.checkpoint.best and best_by not in metrics:
            raise ConfigError(f"checkpoint.best_by is {best_by!r}: the evaluation gave {', '.join(sorted(metrics))}")
        if self._writer is not None:
            self._writer.write(step, metrics)
            self._writer.flush()
        return metrics.get(best_by, np.nan)
