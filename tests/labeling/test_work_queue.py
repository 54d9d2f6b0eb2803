"""Sharing tasks through a folder: claims, their end, and that of two results one counts."""

import json
import os
import subprocess
import sys
import time

import pytest

from glip_jax.labeling.work_queue import TaskError, Tasks

NAMES = ["a", "b", "c"]


def _result(tasks, name, words):
    tasks.writing(name).write_text(words)
    return tasks.publish(name, {"words": words})


def test_tasks_are_done_one_after_the_other(tmp_path):
    tasks = Tasks(tmp_path / "out", NAMES, {"k": 1})
    seen = []
    for name in tasks.mine():
        seen.append(name)
        assert _result(tasks, name, name.upper())
    assert seen == NAMES and [tasks.side(name) for name in NAMES] == [{"words": name.upper()} for name in NAMES]
    assert [(tmp_path / "out" / name).read_text() for name in NAMES] == ["A", "B", "C"]
    assert not tasks.finished and tasks.finish("{}") and tasks.finished and not tasks.finish("other")
    tasks.clear()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*NAMES, "manifest.json"}
    assert (tmp_path / "out" / "manifest.json").read_text() == "{}" and list(tasks.mine()) == []


def test_another_leaves_what_is_claimed(tmp_path):
    one, other = (Tasks(tmp_path, NAMES, {}, lease=60.0) for _ in range(2))
    with one.claim("a") as mine, other.claim("a") as theirs, other.claim("b") as free:
        assert mine and not theirs and free
    with other.claim("a") as theirs:
        assert theirs, "given back"


def test_of_two_results_the_first_counts(tmp_path):
    one, other = (Tasks(tmp_path, NAMES, {}) for _ in range(2))
    one.writing("a").write_text("slow")
    assert _result(other, "a", "fast")
    assert not one.publish("a", {"words": "slow"})
    assert one.side("a") == {"words": "fast"} and (tmp_path / "a").read_text() == "fast"
    assert not list((tmp_path / ".partial").glob("*.writing")) and not list((tmp_path / ".partial").glob("*.aside"))


def test_a_result_published_by_one_who_was_killed_before_it_had_its_name(tmp_path):
    tasks = Tasks(tmp_path, NAMES, {})
    tasks._settle = lambda *_: None  # type: ignore[method-assign]
    assert _result(tasks, "a", "x") and not (tmp_path / "a").exists() and tasks.done("a")
    assert Tasks(tmp_path, NAMES, {}).side("a") == {"words": "x"} and (tmp_path / "a").read_text() == "x"


def test_what_one_published_who_was_killed_then_is_not_taken_for_half_a_result(tmp_path):
    one, other = (Tasks(tmp_path, NAMES, {}) for _ in range(2))
    one._settle = lambda *_: None  # type: ignore[method-assign]
    assert _result(one, "a", "x")
    dead = json.loads(one._me) | {"pid": 2**22 + 1}  # no process has this number
    (tmp_path / ".partial" / "a.claim").write_text(json.dumps(dead))
    with other.claim("a") as claimed:  # as by one who looked before it was published
        assert claimed and other.done("a")
    assert other.side("a") == {"words": "x"} and (tmp_path / "a").read_text() == "x"


def test_a_silent_process_loses_its_claim_and_not_its_right_to_be_first(tmp_path):
    one, other = (Tasks(tmp_path, NAMES, {}, lease=60.0) for _ in range(2))
    with one.claim("a") as mine:
        assert mine
        one.writing("a").write_text("slow")
        claim = tmp_path / ".partial" / "a.claim"
        os.utime(claim, (time.time() - 59, time.time() - 59))
        with other.claim("a") as theirs:
            assert not theirs, "within its lease"
        os.utime(claim, (time.time() - 61, time.time() - 61))
        with other.claim("a") as theirs:
            assert theirs and one.publish("a", {"words": "slow"}) and other.done("a")
            assert not _result(other, "a", "late")
    assert one.side("a") == {"words": "slow"}


def test_a_heartbeat_keeps_a_claim(tmp_path):
    one, other = (Tasks(tmp_path, NAMES, {}, lease=0.6) for _ in range(2))
    with one.claim("a") as mine:
        time.sleep(1.5)
        with other.claim("a") as theirs:
            assert mine and not theirs


_DIES = """
import os, sys
from pathlib import Path
from glip_jax.labeling.work_queue import Tasks
tasks = Tasks(Path(sys.argv[1]), ["a", "b", "c"], {})
for name in tasks.mine():
    tasks.writing(name).write_text("half")
    if name == "b":
        os.kill(os.getpid(), 9)
    tasks.publish(name, {"words": "dead"})
"""


def test_what_a_killed_process_was_at_is_done_at_once_by_another(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", _DIES, str(tmp_path)])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # dead, but its number is still taken
    assert len(list((tmp_path / ".partial").glob("*.writing"))) == 1
    tasks, begin = Tasks(tmp_path, NAMES, {}), time.monotonic()
    for name in tasks.mine():
        assert not list((tmp_path / ".partial").glob("*.writing")), "what the dead left is gone"
        _result(tasks, name, "alive")
    assert time.monotonic() - begin < 2, "nobody waits for the lease of the dead"
    assert [tasks.side(name)["words"] for name in NAMES] == ["dead", "alive", "alive"] and ended.wait() == -9


_WORKS = """
import json, os, sys, time
from pathlib import Path
from glip_jax.labeling.work_queue import Tasks
names = [f"t{i}" for i in range(40)]
tasks = Tasks(Path(sys.argv[1]), names, {}, lease=5)
won = []
for name in tasks.mine():
    tasks.writing(name).write_text(str(os.getpid()))
    time.sleep(0.005)
    if tasks.publish(name, {"by": os.getpid()}):
        won.append(name)
print(json.dumps(won))
"""


def test_three_processes_do_each_task_once(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", _WORKS, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)
    ]
    won = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    assert sorted(name for own in won for name in own) == sorted(f"t{i}" for i in range(40))
    tasks = Tasks(tmp_path, [f"t{i}" for i in range(40)], {})
    for own, process in zip(won, started, strict=True):
        assert all(tasks.side(name)["by"] == process.pid == int((tmp_path / name).read_text()) for name in own)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    Tasks(tmp_path, NAMES, {"threshold": 0.5, "teacher": "aa"})
    Tasks(tmp_path, NAMES, {"teacher": "aa", "threshold": 0.5})
    with pytest.raises(TaskError, match=r'there -> given: teacher: "aa" -> "bb"; threshold: 0\.5 -> 0\.4\)'):
        Tasks(tmp_path, NAMES, {"threshold": 0.4, "teacher": "bb"})
    with pytest.raises(TaskError, match='tasks: .*"c".* -> .*"d"'):
        Tasks(tmp_path, ["a", "b", "d"], {"threshold": 0.5, "teacher": "aa"})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(TaskError, match="not empty, without a manifest"):
        Tasks(tmp_path, NAMES, {})
    with pytest.raises(TaskError, match="is a file"):
        Tasks(tmp_path / "mine.txt", NAMES, {})


def test_a_failure_leaves_neither_claim_nor_half_a_result(tmp_path):
    tasks = Tasks(tmp_path, NAMES, {})

    def fail():
        with tasks.claim("a"):
            tasks.writing("a").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert {path.name for path in (tmp_path / ".partial").iterdir()} == {"plan.json"}


def test_a_folder_that_others_have_ended_is_no_fault(tmp_path):
    late, first = (Tasks(tmp_path, ["a"], {}) for _ in range(2))
    for name in first.mine():
        _result(first, name, "x")
    first.finish("{}")
    first.clear()
    assert list(late.mine()) == []
    with late.claim("end") as claimed:
        assert not claimed
