"""Decisions that follow the evaluations of a run: whether it stops, how far the learning rate is cut, which checkpoint is the best.

A decision depends on the recorded evaluations alone. After a resume the decisions are made again from metrics.jsonl, so that a run
that was killed takes the same steps as one that was not. `glip_jax.training.finetuning.schedule` has rules to decide by.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from glip_jax.config import current_names
from glip_jax.distributed.mesh import replicated

__all__ = ["Decide", "Decision", "Decisions"]


class Decision(NamedTuple):
    """What follows an evaluation."""

    stop: bool = False
    """The run ends here."""
    rate_factor: float = 1.0
    """Factor on the learning rates of all groups, relative to those of the schedule of `optimizer`."""
    rate_floor: float = 0.0
    """Rates are not cut below this; a rate that is lower without a cut stays as it is."""
    best: bool = False
    """The evaluated parameters are the best so far; `checkpoint.best` keeps them."""
    note: str = ""
    """For the log: what was decided and why; empty where nothing changes."""


Decide = Callable[[int, Mapping[str, float]], Decision]
"""(step, metrics of its evaluation) to a decision. Called once per evaluation, in order, from the first evaluation of the run."""


class Decisions:
    """The decisions of one run; without `decide` there are none, and the step takes no factor."""

    def __init__(self, decide: Decide | None, mesh: Mesh, log: Callable[[str], None]) -> None:
        self._decide, self._mesh, self._log = decide, mesh, log
        self._now = Decision()

    @property
    def made(self) -> bool:
        """Whether decisions are made at all."""
        return self._decide is not None

    @property
    def stop(self) -> bool:
        """Whether the run has ended by a decision."""
        return self._now.stop

    def scale(self, factor: float = 1.0) -> Float32[Array, "2"]:
        """Factor and floor of the learning rates after the latest decision, times another `factor`: an argument of the step."""
        values = np.array([factor * self._now.rate_factor, self._now.rate_floor], np.float32)
        return jax.device_put(values, replicated(self._mesh))

    def replay(self, lines: Iterable[Mapping[str, Any] | str], step: int) -> list[int]:
        """Decides again on the evaluations up to `step`; returns the steps that became the best, in order.

        `lines`: those of metrics.jsonl, parsed or not, in any order; of evaluations that were recorded twice the later one counts.
        """
        evaluations: dict[int, dict[str, float]] = {}
        for line in lines:
            entry = current_names(json.loads(line)) if isinstance(line, str) else dict(line)
            if (at := entry.pop("step")) <= step and "loss" not in entry:
                # Values that are not finite are recorded as text.
                evaluations.setdefault(at, {}).update({name: float(value) for name, value in entry.items()})
        best = [at for at in sorted(evaluations) if self._made(at, evaluations[at]).best]
        if self._now.note:
            self._log(f"step {max(evaluations)}: {self._now.note}")
        return best

    def make(self, step: int, metrics: Mapping[str, float]) -> Decision:
        """Decides on the evaluation of `step` and logs what changes; the same in all processes."""
        decision = self._made(step, metrics)
        if decision.note:
            self._log(f"step {step}: {decision.note}")
        return decision

    def _made(self, step: int, metrics: Mapping[str, float]) -> Decision:
        if self._decide is not None:
            decision = self._decide(step, metrics)
            if jax.process_count() > 1:
                numbers = np.array(
                    [decision.stop, decision.rate_factor, decision.rate_floor, decision.best], np.float32
                )
                stop, factor, floor, best = np.asarray(multihost_utils.broadcast_one_to_all(numbers)).tolist()
                decision = Decision(bool(stop), factor, floor, bool(best), decision.note)
            self._now = decision
        return self._now
