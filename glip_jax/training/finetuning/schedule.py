"""Early stopping and cuts of the learning rate on a plateau, decided from the evaluations of a run.

Two sets of rules: `Rules.ties` False is the default of fine-tuning, True are the rules of the original code, which `--as-glip`
follows: maskrcnn_benchmark/engine/trainer.py and solver/lr_scheduler.py of github.com/microsoft/GLIP.

| | default | original |
|---|---|---|
| an evaluation is better | strictly greater than the best | stop: not less than the best; plateau: more than 1.0001 times the best |
| an equal one | does not count | is the new best: resets the patience, its checkpoint replaces the best |
| AP of 0.0 | counts | stop: counts, as the best starts at 0.0; plateau: the evaluation is skipped |
| the best before training | the zero-shot result, where it is given | 0.0 |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from glip_jax.config import ConfigError
from glip_jax.training.monitoring.decisions import Decision

__all__ = ["Plateau", "Rules", "Schedule"]

_THRESHOLD = 1e-4
"""Relative gain that torch's ReduceLROnPlateau takes for an improvement, by default."""


@dataclass(frozen=True)
class Rules:
    """When to stop and when to cut."""

    metric: str
    """The metric to decide by, as in metrics.jsonl: evaluation/SET/AP. Higher is better."""
    patience: int = 8
    """Evaluations in a row without a better one after which the run stops; 0: it never does."""
    plateau: int = 3
    """Evaluations in a row without a better one that are tolerated: the next one cuts the rates, and the count begins anew."""
    factor: float = 0.1
    """Factor on the rates at a cut; 1: no cuts."""
    floor: float = 1e-6
    """Rate of a parameter group below which it is not cut."""
    ties: bool = False
    """The original's rules; see the module."""


class Plateau:
    """Counts the cuts of the learning rate, as torch's ReduceLROnPlateau with mode max does; without a cooldown."""

    def __init__(self, rules: Rules, best: float = -math.inf) -> None:
        self._rules, self._best, self._bad = rules, best, 0
        self.cuts = 0

    def add(self, value: float) -> bool:
        """Takes the next evaluation; returns whether it cuts the rates."""
        if self._rules.ties and value == 0:
            return False
        if value > self._best * (1 + _THRESHOLD if self._rules.ties else 1):
            self._best, self._bad = value, 0
        else:
            self._bad += 1
        if self._bad <= self._rules.plateau or self._rules.factor == 1:
            return False
        self._bad = 0
        self.cuts += 1
        return True


class Schedule:
    """Decides after each evaluation; the `decide` of `training.loop.train`. One object serves one call of it."""

    def __init__(self, rules: Rules, start: float | None = None) -> None:
        """`start`: the metric before training, at step 0; the original's rules do not use it."""
        self.rules = rules
        self.best_step = 0
        """Step of the best evaluation; 0: none is better than `start`."""
        self.best = 0.0 if rules.ties else -math.inf if start is None or math.isnan(start) else start
        self._bad = 0
        self._plateau = Plateau(rules, -math.inf if rules.ties else self.best)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Decision:
        """The decision after `step`. A metric that is not a number is never better.

        Raises ConfigError if `metrics` do not hold that of the rules.
        """
        rules = self.rules
        if rules.metric not in metrics:
            raise ConfigError(
                f"fine-tuning decides by {rules.metric!r}: the evaluation gave {', '.join(sorted(metrics))}"
            )
        value = float(metrics[rules.metric])
        better = value >= self.best if rules.ties else value > self.best
        self._bad = 0 if better else self._bad + 1
        if better:
            self.best, self.best_step = value, step
        cut = self._plateau.add(value)
        factor = rules.factor**self._plateau.cuts
        stop = bool(rules.patience) and self._bad >= rules.patience
        note = (
            f"{rules.metric} did not rise: the learning rates are cut to {factor:g} of those of the schedule"
            if cut
            else ""
        )
        if stop:
            since = f"since step {self.best_step}" if self.best_step else "over the one before training"
            note = f"stops early: no better {rules.metric} {since} ({self.best:.4f}) in {self._bad} evaluations"
        return Decision(stop, factor, rules.floor, better, note)
