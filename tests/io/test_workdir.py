"""What a run was trained on, recorded in its working folder."""

import dataclasses
import json
from pathlib import Path

import pytest

from glip_jax.config import Config, SourceConfig
from glip_jax.data import shards
from glip_jax.data.records import Record, boxes_array
from glip_jax.io.workdir import CheckpointError, check_sources


def _write(folder: Path, box: float, name: str = "one") -> None:
    record = Record(
        id="1", kind="detection", image=b"x", height=24, width=32, boxes=boxes_array([(1, 2, box, 9)]), categories=(0,)
    )
    shards.write([record], folder, name=name, names=("dog",))


def test_other_data_of_the_same_name_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", 9)
    _write(tmp_path / "again", 9, "another")
    _write(tmp_path / "b", 8)
    run = tmp_path / "run"
    run.mkdir()

    def check(source: str, step: int | None = 3, accept: bool = False) -> list[str]:
        data = dataclasses.replace(Config().data, sources={"boxes": SourceConfig(str(tmp_path / source))})
        return check_sources(str(run), step, dataclasses.replace(Config(), data=data), accept=accept)

    assert check("a") == [], "a run of an earlier version has recorded none"
    assert check("a") == check("again") == [], "the records count, not the command or the name"
    assert check("absent") == [], "a run that has finished needs no data"
    with pytest.raises(CheckpointError, match="holds step 3 of a run with other data .*data.sources.boxes: content"):
        check("b")
    assert len(check("b", accept=True)) == 1 and check("b") == []
    (phase,) = json.loads((run / "phases.json").read_text())
    assert phase["step"] == 3 and "data.sources.boxes" in phase["differences"][0]
    assert check("a", step=None) == [], "a run that begins"
