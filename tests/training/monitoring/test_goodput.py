"""Goodput: the wall time of a run over its starts, by bucket."""

import time

import pytest

from glip_jax.training.monitoring.goodput import BUCKETS, goodput
from glip_jax.training.monitoring.metrics import cut_back, read
from glip_jax.training.monitoring.writer import Writer
from tests import tiny_run
from tests.training.test_resume import _finish, _start


def _window(step, time, seconds, **more):
    return {"step": step, "time": time, "steps": 2, "seconds": seconds, "loss": 1.0, **more}


def _begin(step, began, time, **more):
    return {"step": step, "goodput": "start", "began": began, "time": time, **more}


FIRST = _begin(0, 100.0, 110.0, initialization_seconds=4.0, preparation_seconds=6.0, restore_seconds=0.0)
AGAIN = _begin(2, 150.0, 159.0, initialization_seconds=4.0, preparation_seconds=2.0, restore_seconds=3.0)


def test_every_second_is_in_one_bucket():
    lines = [
        FIRST,
        _window(2, 130.0, 20.0, compile_seconds=12.0, wait_seconds=1.0),
        {"step": 2, "goodput": "lost", "time": 140.0, "lost_seconds": 7.0, "checkpoint_seconds": 2.0},
        AGAIN,
        _window(4, 170.0, 10.0, evaluation_seconds=3.0),
        {"step": 4, "goodput": "end", "time": 175.0, "seconds": 5.0, "checkpoint_seconds": 4.5},
    ]
    found = goodput(lines)
    assert found is not None and found.seconds == 75.0 and found.starts == 2
    assert {name: round(value, 6) for name, value in found.buckets.items()} == {
        "TOTAL": 14.0, "TPU_INITIALIZATION": 8.0, "TRAINING_PREP": 8.0, "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME": 3.0,
        "PROGRAM_STARTUP": 12.0, "DATA_LOADING_SYNC": 1.0, "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME": 6.5, "CUSTOM_BADPUT_EVENTS": 3.0,
        "WASTED_PROGRESS_FROM_DISRUPTION": 7.0, "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION": 10.0, "OTHER": 2.5,
    }  # fmt: skip
    assert tuple(found.buckets) == BUCKETS and sum(found.buckets.values()) == pytest.approx(75.0)
    assert found.line().startswith("goodput 18.7% of 0 h 01 min 15 s in 2 starts; badput: PROGRAM_STARTUP 16.0%, INFRA")
    assert goodput([{"step": 2, "loss": 1.0}, {"step": 4, "time": 5.0, "loss": 1.0}]) is None, "of an earlier version"


def test_times_of_removed_lines_stay_also_when_they_are_removed_twice(tmp_path):
    with Writer(str(tmp_path), 0) as writer:
        began = time.time() - 1
        writer.times(0, "start", {"began": began, "initialization_seconds": 1.0})
        for step in (2, 4, 6):
            writer.write(step, {"loss": 1.0, "steps": 2, "seconds": 3.0, "compile_seconds": 1.0})
    with Writer(str(tmp_path), 4) as writer:
        writer.times(4, "start", {"began": time.time(), "restore_seconds": 0.5})
    cut_back(str(tmp_path), 2)
    assert [line["step"] for line in read(str(tmp_path))] == [2]
    lines = read(str(tmp_path), times=True)
    assert [(line["step"], line.get("goodput")) for line in lines] == [
        (0, "start"), (2, None), (2, "lost"), (2, "lost"), (2, "start")
    ]  # fmt: skip
    found = goodput(lines)
    assert found is not None and found.starts == 2
    assert found.buckets["TOTAL"] == 2.0 and found.buckets["WASTED_PROGRESS_FROM_DISRUPTION"] == 4.0
    assert found.buckets["PROGRAM_STARTUP"] == 3.0 and found.buckets["UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"] == 0.5


@pytest.mark.slow
def test_the_goodput_of_a_run_that_was_killed_three_times_adds_up_to_its_wall_time(tmp_path):
    config = tiny_run.config_file(tmp_path, tiny_run.write_sources(tmp_path))
    workdir = tmp_path / "run"
    began = time.time()
    for number in range(3):
        process = _start(config, workdir, "--config.train.steps=12")
        for line in process.stdout or ():
            if line.startswith(f"step {3 * number + 3}/12"):
                process.kill()
                break
        process.communicate()
        time.sleep(1.5)
    code, _, err = _finish(config, workdir, "--config.train.steps=12")
    assert code == 0, err
    wall = time.time() - began
    lines = read(str(workdir), times=True)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 13)]
    found = goodput(lines)
    assert found is not None and found.starts == 4
    # Before the first line of Python's own and after the last one: interpreter and libraries.
    first, last = lines[0]["began"] - began, began + wall - max(line["time"] for line in lines)
    assert (
        found.seconds + first + last == pytest.approx(wall, abs=0.01) and 0 < first < wall / 4 and 0 < last < wall / 4
    )
    assert sum(found.buckets.values()) == pytest.approx(found.seconds, abs=0.01)
    buckets = found.buckets
    # Steps 3, 6 and 9 were made, no checkpoint held them, and they were made again; each pause takes 1.5 s and the start of Python.
    assert len([line for line in lines if line.get("goodput") == "lost"]) >= 2
    assert 0 < buckets["WASTED_PROGRESS_FROM_DISRUPTION"] < found.seconds and buckets["TOTAL"] > 0
    assert buckets["INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"] >= 4.5
    assert all(buckets[name] > 0 for name in ("TPU_INITIALIZATION", "TRAINING_PREP", "PROGRAM_STARTUP"))
    assert buckets["UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"] > 0
    assert abs(buckets["OTHER"]) < 0.2 * found.seconds
