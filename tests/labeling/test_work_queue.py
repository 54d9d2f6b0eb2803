"""The work queue in a folder: claims and their expiry, and exactly one result per task."""

import json
import os
import subprocess
import sys
import time

import pytest

from glip_jax.labeling.work_queue import TaskError, WorkQueue

NAMES = ["a", "b", "c"]


def _result(queue, name, words):
    queue.writing(name).write_text(words)
    return queue.publish(name, {"words": words})


def test_tasks_are_done_one_after_the_other(tmp_path):
    queue = WorkQueue(tmp_path / "out", NAMES, {"k": 1})
    seen = []
    for name in queue.claim_tasks():
        seen.append(name)
        assert _result(queue, name, name.upper())
    assert seen == NAMES and [queue.result_info(name) for name in NAMES] == [{"words": name.upper()} for name in NAMES]
    assert [(tmp_path / "out" / name).read_text() for name in NAMES] == ["A", "B", "C"]
    assert not queue.finished and queue.finish("{}") and queue.finished and not queue.finish("other")
    queue.clear()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*NAMES, "manifest.json"}
    assert (tmp_path / "out" / "manifest.json").read_text() == "{}" and list(queue.claim_tasks()) == []


def test_a_claimed_task_cannot_be_claimed_again(tmp_path):
    one, other = (WorkQueue(tmp_path, NAMES, {}, lease=60.0) for _ in range(2))
    with one.claim("a") as first, other.claim("a") as second, other.claim("b") as free:
        assert first and not second and free
    with other.claim("a") as second:
        assert second, "released"


def test_the_first_of_two_results_counts(tmp_path):
    one, other = (WorkQueue(tmp_path, NAMES, {}) for _ in range(2))
    one.writing("a").write_text("slow")
    assert _result(other, "a", "fast")
    assert not one.publish("a", {"words": "slow"})
    assert one.result_info("a") == {"words": "fast"} and (tmp_path / "a").read_text() == "fast"
    assert not list((tmp_path / ".partial").glob("*.writing")) and not list((tmp_path / ".partial").glob("*.temporary"))


def test_a_result_is_renamed_after_its_publisher_was_killed(tmp_path):
    queue = WorkQueue(tmp_path, NAMES, {})
    queue._rename_result = lambda *_: None  # type: ignore[method-assign]
    assert _result(queue, "a", "x") and not (tmp_path / "a").exists() and queue.done("a")
    assert WorkQueue(tmp_path, NAMES, {}).result_info("a") == {"words": "x"} and (tmp_path / "a").read_text() == "x"


def test_a_published_result_of_a_killed_process_is_complete(tmp_path):
    one, other = (WorkQueue(tmp_path, NAMES, {}) for _ in range(2))
    one._rename_result = lambda *_: None  # type: ignore[method-assign]
    assert _result(one, "a", "x")
    dead = json.loads(one._claim_text) | {"pid": 2**22 + 1}  # no process has this number
    (tmp_path / ".partial" / "a.claim").write_text(json.dumps(dead))
    with other.claim("a") as claimed:  # by a process that checked before the result was published
        assert claimed and other.done("a")
    assert other.result_info("a") == {"words": "x"} and (tmp_path / "a").read_text() == "x"


def test_a_process_without_heartbeat_loses_its_claim_but_may_still_publish_first(tmp_path):
    one, other = (WorkQueue(tmp_path, NAMES, {}, lease=60.0) for _ in range(2))
    with one.claim("a") as first:
        assert first
        one.writing("a").write_text("slow")
        claim = tmp_path / ".partial" / "a.claim"
        os.utime(claim, (time.time() - 59, time.time() - 59))
        with other.claim("a") as second:
            assert not second, "within its lease"
        os.utime(claim, (time.time() - 61, time.time() - 61))
        with other.claim("a") as second:
            assert second and one.publish("a", {"words": "slow"}) and other.done("a")
            assert not _result(other, "a", "late")
    assert one.result_info("a") == {"words": "slow"}


def test_a_heartbeat_renews_a_claim(tmp_path):
    one, other = (WorkQueue(tmp_path, NAMES, {}, lease=0.6) for _ in range(2))
    with one.claim("a") as first:
        time.sleep(1.5)
        with other.claim("a") as second:
            assert first and not second


_DIES = """
import os, sys
from pathlib import Path
from glip_jax.labeling.work_queue import WorkQueue
queue = WorkQueue(Path(sys.argv[1]), ["a", "b", "c"], {})
for name in queue.claim_tasks():
    queue.writing(name).write_text("half")
    if name == "b":
        os.kill(os.getpid(), 9)
    queue.publish(name, {"words": "dead"})
"""


@pytest.mark.processes
def test_the_task_of_a_killed_process_is_taken_over_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", _DIES, str(tmp_path)])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # dead, but its process id is still in use (zombie)
    assert len(list((tmp_path / ".partial").glob("*.writing"))) == 1
    queue, begin = WorkQueue(tmp_path, NAMES, {}), time.monotonic()
    for name in queue.claim_tasks():
        assert not list((tmp_path / ".partial").glob("*.writing")), "the partial result of the dead process is removed"
        _result(queue, name, "alive")
    assert time.monotonic() - begin < 2, "the lease of a dead process is not waited for"
    assert [queue.result_info(name)["words"] for name in NAMES] == ["dead", "alive", "alive"] and ended.wait() == -9


_WORKS = """
import json, os, sys, time
from pathlib import Path
from glip_jax.labeling.work_queue import WorkQueue
names = [f"t{i}" for i in range(40)]
queue = WorkQueue(Path(sys.argv[1]), names, {}, lease=5)
won = []
for name in queue.claim_tasks():
    queue.writing(name).write_text(str(os.getpid()))
    time.sleep(0.005)
    if queue.publish(name, {"by": os.getpid()}):
        won.append(name)
print(json.dumps(won))
"""


@pytest.mark.processes
def test_three_processes_do_each_task_once(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", _WORKS, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)
    ]
    won = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    assert sorted(name for own in won for name in own) == sorted(f"t{i}" for i in range(40))
    queue = WorkQueue(tmp_path, [f"t{i}" for i in range(40)], {})
    for own, process in zip(won, started, strict=True):
        assert all(queue.result_info(name)["by"] == process.pid == int((tmp_path / name).read_text()) for name in own)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    WorkQueue(tmp_path, NAMES, {"threshold": 0.5, "teacher": "aa"})
    WorkQueue(tmp_path, NAMES, {"teacher": "aa", "threshold": 0.5})
    with pytest.raises(TaskError, match=r'existing -> given: teacher: "aa" -> "bb"; threshold: 0\.5 -> 0\.4\)'):
        WorkQueue(tmp_path, NAMES, {"threshold": 0.4, "teacher": "bb"})
    with pytest.raises(TaskError, match='tasks: .*"c".* -> .*"d"'):
        WorkQueue(tmp_path, ["a", "b", "d"], {"threshold": 0.5, "teacher": "aa"})


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(TaskError, match="not empty, without a manifest"):
        WorkQueue(tmp_path, NAMES, {})
    with pytest.raises(TaskError, match="is a file"):
        WorkQueue(tmp_path / "mine.txt", NAMES, {})


def test_a_failure_leaves_neither_a_claim_nor_a_partial_result(tmp_path):
    queue = WorkQueue(tmp_path, NAMES, {})

    def fail():
        with queue.claim("a"):
            queue.writing("a").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert {path.name for path in (tmp_path / ".partial").iterdir()} == {"plan.json"}


def test_a_job_that_other_processes_completed_is_no_error(tmp_path):
    late, first = (WorkQueue(tmp_path, ["a"], {}) for _ in range(2))
    for name in first.claim_tasks():
        _result(first, name, "x")
    first.finish("{}")
    first.clear()
    assert list(late.claim_tasks()) == []
    with late.claim("end") as claimed:
        assert not claimed
