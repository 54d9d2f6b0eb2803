"""Counts of each source over resumes, and the corrupt records that stop a run."""

import numpy as np
import pytest

from glip_jax.config import DataConfig
from glip_jax.training.monitoring.source_counts import CorruptDataError, SourceCounts

NAMES, RECORDS = ("boxes", "captions"), (10, 40)


def counts(rate: float = 0.1, window: int = 20) -> SourceCounts:
    data = DataConfig(max_corrupt_rate=rate, corrupt_window=window)
    return SourceCounts(NAMES, RECORDS, data, lambda source, record: f"{NAMES[source]}[{record}] (corrupt)")


def step(counted: SourceCounts, source: list[int], corrupt: list[int] = [], first: int = 0) -> None:  # noqa: B006
    bad = np.isin(np.arange(len(source)), corrupt)
    counted.add(np.array(source), np.arange(first, first + len(source)), bad)


def test_examples_and_epochs_continue_after_a_resume() -> None:
    counted = counts()
    step(counted, [0, 0, 1, 1, 1, 1])
    step(counted, [0, 0, 1, 1, 1, 1])
    lines = [
        {"step": 1, "source/boxes/seen": 99},
        {"step": 2, **counted.metrics()},
        {"step": 2, "evaluation/a/AP": 0.1},
    ]
    assert counted.metrics() == {
        "source/boxes/seen": 4, "source/boxes/epochs": 0.4, "source/captions/seen": 8, "source/captions/epochs": 0.2,
    }  # fmt: skip
    again = counts()
    again.resume(lines, (0.5, 0.5), 12)
    step(again, [0, 1])
    assert again.metrics()["source/boxes/seen"] == 5 and again.metrics()["source/captions/seen"] == 9
    new = counts()
    new.resume([{"step": 2, "source/boxes/seen": 4}], (0.5, 0.5), 12)
    assert new.metrics()["source/captions/seen"] == 0, "a source that the phase before did not have"
    old = counts()
    old.resume([{"step": 2, "loss": 1.0}], (0.25, 0.75), 12)
    assert [old.metrics()[f"source/{name}/seen"] for name in NAMES] == [3, 9], "lines of an older version"


def test_a_source_beyond_the_rate_stops_the_run_with_its_first_records() -> None:
    counted = counts()
    step(counted, [1, 1, 1, 1], corrupt=[0, 2], first=30)
    with pytest.raises(CorruptDataError) as caught:
        step(counted, [1, 1, 0, 0], corrupt=[0, 2], first=7)
    message = str(caught.value)
    assert message.startswith("data.sources.captions: 3 of its last 6 examples are corrupt (50.0%)")
    assert "captions[30] (corrupt); captions[32] (corrupt); captions[7] (corrupt). " in message
    assert "data.max_corrupt_rate allows 10.0% of 20" in message and "\n" not in message


def test_below_the_rate_the_run_continues_and_each_window_starts_at_0() -> None:
    counted = counts()
    for _ in range(10):
        step(counted, [0] * 20, corrupt=[3, 5])
    late = counts()
    for _ in range(10):
        step(late, [0] * 20)
    with pytest.raises(CorruptDataError, match="3 of its last 6 examples"):
        step(late, [0] * 6, corrupt=[0, 1, 2])  # as when a mount disappears late in a run
    with pytest.raises(CorruptDataError, match="6 of its last 6 examples .* and 1 more"):
        step(counts(rate=0.25), [0] * 6, corrupt=[*range(6)])
    never = counts(rate=1.0)
    for _ in range(10):
        step(never, [0] * 15, corrupt=[*range(15)])
    with pytest.raises(CorruptDataError):
        step(counts(rate=0.0), [0] * 6, corrupt=[4])
