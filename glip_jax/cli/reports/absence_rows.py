"""What the report and the terminal show of absent names: rows of text, the first of each table its head."""

from collections.abc import Mapping
from typing import Any

from glip_jax.cli.reports.html import number
from glip_jax.evaluation.metrics.absence import RATES, rate_key

__all__ = ["SHOWN", "alarm_rows", "threshold_rows"]

SHOWN = ("0.3", "0.5")
"""Thresholds whose measures are shown."""

_COLUMNS = {"alarms": "false_alarms", "alarmed": "alarmed_pairs", "found": "found_pairs", "MCC": "presence_MCC"}


def alarm_rows(measured: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A line for each set (`metrics.absence.measure` by set), its look-alikes, and both asked alone; [] without sets."""
    rows = [["absent names", "pairs", *(f"{title} {t}" for t in SHOWN for title in _COLUMNS)]] if measured else []
    for name, every in measured.items():
        parts = {name: every, "  look-alikes": every.get("look_alikes")}
        if alone := every.get("alone"):
            parts |= {"  one name a prompt": alone, "  look-alikes, one a prompt": alone.get("look_alikes")}
        for title, own in parts.items():
            if own is not None:
                cells = [_cell(own["thresholds"][t].get(key)) for t in SHOWN for key in _COLUMNS.values()]
                rows.append([title, str(own["absent_pairs"]), *cells])
    return rows


def threshold_rows(measured: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A line for each set: AP, and for each of RATES the threshold, AP from there on, and cgF1."""
    head = ["false alarms at most", "AP"]
    for rate in map(rate_key, RATES):
        head += [f"{rate}: from", "AP", "cgF1"]
    rows = [head] if measured else []
    for name, every in measured.items():
        cells = [name, number(every["AP"])]
        for rate in map(rate_key, RATES):
            own = every["rates"][rate]
            cells += [f"{own['threshold']:.3f}", number(own["AP"]), _cell(own["cgF1"])]
        rows.append(cells)
    return rows


def _cell(value: float | None) -> str:
    # Not `number`: a correlation may be negative.
    return "-" if value is None else f"{value:.4f}"
