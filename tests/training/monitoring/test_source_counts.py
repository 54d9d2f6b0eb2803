"""Counts of each source over resumes, and the corrupt records that stop a run."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glip_jax.config import DataConfig, SourceConfig
from glip_jax.data.mixture import Mixture
from glip_jax.data.records import Record, boxes_array
from glip_jax.data.shards import write
from glip_jax.training.monitoring.source_counts import CorruptDataError, SourceCounts, reduced_records
from tests.data.test_mixture import config, draw

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


def test_records_that_no_canvas_holds_at_the_size_that_is_said_are_noted(tmp_path: Path) -> None:
    def mixture(name: str, height: int, width: int, aspects: tuple[float, ...]) -> Mixture:
        stream = io.BytesIO()
        Image.new("RGB", (width, height)).save(stream, "PNG")
        record = Record("1", "detection", stream.getvalue(), height, width, boxes_array([[1, 1, 50, 50]]), (0,))
        write([record], tmp_path / name, name=name, names=("cat",))
        sources = {name: SourceConfig(str(tmp_path / name))}
        return Mixture(config(sources, short_sides=(60, 80), long_side=133, aspects=aspects))

    wide = mixture("wide", 108, 192, (0.666667, 1.0))
    (note,) = reduced_records(wide)
    assert "data.sources.wide: 1 of 1 records are trained smaller than data.short_sides and data.long_side say" in note
    assert "record 0 (108 x 192) by 10%: 0.562500 in data.aspects would hold it" in note
    assert {tuple(size) for batch in draw(wide, 2) for size in batch.size.tolist()} == {(54, 96), (72, 128)}
    held = mixture("held", 108, 192, (0.5625, 0.666667, 1.0))
    assert not reduced_records(held)
    assert {tuple(size) for batch in draw(held, 2) for size in batch.size.tolist()} == {(60, 106), (75, 133)}
    assert not reduced_records(mixture("square", 100, 100, (0.666667, 1.0)))
