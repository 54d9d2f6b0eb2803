"""Sums over the collectives of a program, for tests that compare them with a table."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from glip_jax.collectives import Collective, Kind

__all__ = ["Total", "totals"]


class Total(NamedTuple):
    """Sums over the collectives of one kind that span the same axes, per run of the program and device."""

    instructions: int
    executions: int
    bytes: int
    """Of `Collective.bytes`, times executions."""
    sent_bytes: float
    """Of `Collective.sent_bytes`, times executions."""
    known: bool
    """False where a trip count was not known, so that more may be sent."""


def totals(found: Iterable[Collective], mesh: Mapping[str, int]) -> dict[tuple[Kind, tuple[str, ...]], Total]:
    """Sums by (kind, mesh axes), most bytes sent first; `mesh` as in `Collective.axes`."""
    sums: dict[tuple[Kind, tuple[str, ...]], Total] = {}
    for each in found:
        key = (each.kind, each.axes(mesh))
        old = sums.get(key, Total(0, 0, 0, 0.0, True))
        sums[key] = Total(
            old.instructions + 1,
            old.executions + each.times,
            old.bytes + each.times * each.bytes,
            old.sent_bytes + each.times * each.sent_bytes,
            old.known and each.times_known,
        )
    return dict(sorted(sums.items(), key=lambda item: -item[1].sent_bytes))
