"""Results of tasks in a folder: exactly one per task, whoever is killed, late or second."""

import json
import os
import subprocess
import sys

import pytest

from glip_jax.io.sharing import Part, without_sharing
from glip_jax.io.task_results import TaskError, TaskResults, is_begun

NAMES = ["a", "b", "c"]


@pytest.fixture
def begin(tmp_path):
    """Joins or starts the work in a folder."""

    def begun(out, names=NAMES, settings=None, join=False):
        return TaskResults(out, names, settings or {}, tmp_path / "scratch", join)

    return begun


def _result(results, name, words):
    results.writing(name).write_text(words)
    return results.publish(name, {"words": words})


def test_tasks_are_done_one_after_the_other(tmp_path, begin):
    results = begin(tmp_path / "out", settings={"k": 1})
    assert results.missing == NAMES and is_begun(tmp_path / "out")
    for name in results.names:
        assert not results.done(name) and _result(results, name, name.upper()) and results.done(name)
    assert results.missing == [] and begin(tmp_path / "out", settings={"k": 1}).missing == []
    assert [results.result_info(name) for name in NAMES] == [{"words": name.upper()} for name in NAMES]
    assert [(tmp_path / "out" / name).read_text() for name in NAMES] == ["A", "B", "C"]
    assert not results.finished and results.finish("{}") and results.finished and not results.finish("other")
    assert not is_begun(tmp_path / "out")
    results.clear()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*NAMES, "manifest.json"}
    assert (tmp_path / "out" / "manifest.json").read_text() == "{}"


def test_the_first_of_two_results_counts(tmp_path, begin):
    one, other = (begin(tmp_path / "out") for _ in range(2))
    one.writing("a").write_text("slow")
    one.done = lambda _: False  # type: ignore[method-assign]  # it checked before the other was done
    assert _result(other, "a", "fast") and not one.publish("a", {"words": "slow"})
    assert one.result_info("a") == {"words": "fast"} and (tmp_path / "out" / "a").read_text() == "fast"
    assert {path.name for path in (tmp_path / "out" / ".partial").iterdir()} == {"plan.json", "a.json"}


def test_a_result_is_renamed_after_its_publisher_was_killed(tmp_path, begin):
    results = begin(tmp_path / "out")
    results._rename_result = lambda *_: None  # type: ignore[method-assign]
    assert _result(results, "a", "x") and not (tmp_path / "out" / "a").exists() and results.done("a")
    other = begin(tmp_path / "out")
    assert other.missing == ["b", "c"], "it is complete"
    assert other.result_info("a") == {"words": "x"} and (tmp_path / "out" / "a").read_text() == "x"


_DIES = """
import os, sys
from pathlib import Path
from glip_jax.io.task_results import TaskResults
results = TaskResults(Path(sys.argv[1]), ["a", "b", "c"], {}, Path(sys.argv[2]))
for name in results.names:
    results.writing(name).write_text("half")
    if name == "b":
        os.kill(os.getpid(), 9)
    results.publish(name, {"words": "dead"})
"""


@pytest.mark.processes
def test_what_a_killed_process_has_done_counts_and_no_more(tmp_path, begin):
    assert subprocess.run([sys.executable, "-c", _DIES, str(tmp_path / "out"), str(tmp_path)]).returncode == -9
    results = begin(tmp_path / "out")
    assert results.missing == ["b", "c"] and not (tmp_path / "out" / "b").exists()
    assert all(_result(results, name, "alive") for name in results.missing)
    assert [results.result_info(name)["words"] for name in NAMES] == ["dead", "alive", "alive"]
    results.finish("{}")
    results.clear()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*NAMES, "manifest.json"}, "nor is the half one left"


_WORKS = """
import json, os, sys
from pathlib import Path
from glip_jax.io.task_results import TaskResults
results = TaskResults(Path(sys.argv[1]), [f"t{i}" for i in range(40)], {}, Path(sys.argv[2]))
won = []
sys.stdin.readline()
for name in results.names:
    results.writing(name).write_text(str(os.getpid()))
    if results.publish(name, {"by": os.getpid()}):
        won.append(name)
print(json.dumps(won))
"""


@pytest.mark.processes
def test_three_processes_that_do_the_same_tasks_leave_one_result_each(tmp_path, begin):
    command = [sys.executable, "-c", _WORKS, str(tmp_path / "out"), str(tmp_path)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for process in started:
        assert process.stdin
        process.stdin.write(b"go\n")
        process.stdin.flush()
    won = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    assert sorted(name for own in won for name in own) == sorted(f"t{i}" for i in range(40))
    results = begin(tmp_path / "out", [f"t{i}" for i in range(40)])
    for own, process in zip(won, started, strict=True):
        for name in own:
            assert results.result_info(name)["by"] == process.pid == int((tmp_path / "out" / name).read_text())


def test_other_settings_are_refused_with_the_difference(tmp_path, begin):
    begin(tmp_path / "out", settings={"threshold": 0.5, "teacher": "aa"})
    begin(tmp_path / "out", settings={"teacher": "aa", "threshold": 0.5}, join=True)
    with pytest.raises(TaskError, match=r'existing -> given: teacher: "aa" -> "bb"; threshold: 0\.5 -> 0\.4\)'):
        begin(tmp_path / "out", settings={"threshold": 0.4, "teacher": "bb"})
    with pytest.raises(TaskError, match='tasks: .*"c".* -> .*"d"'):
        begin(tmp_path / "out", ["a", "b", "d"], {"threshold": 0.5, "teacher": "aa"})


def test_a_folder_with_other_content_is_refused(tmp_path, begin):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(TaskError, match="not empty, without a manifest"):
        begin(tmp_path)
    with pytest.raises(TaskError, match="is a file"):
        begin(tmp_path / "mine.txt")
    with pytest.raises(TaskError, match=r"is not the folder of this job on .* give an --out that all nodes see"):
        begin(tmp_path / "elsewhere", join=True)
    assert not (tmp_path / "elsewhere").exists()


def test_a_result_of_another_file_system_is_complete_when_it_appears(tmp_path, begin, monkeypatch):
    """As of an import, whose shards are written in the cache of a machine."""
    results, local = begin(tmp_path / "out"), tmp_path / "local"
    local.write_text("x")
    moved = []
    monkeypatch.setattr("shutil.move", lambda a, b: (moved.append(b), os.rename(a, b))[1] or b)
    stat = type(local).stat
    monkeypatch.setattr(
        type(local),
        "stat",
        lambda self, **more: (
            os.stat_result((*stat(self, **more)[:2], 7, *stat(self, **more)[3:]))
            if self == local
            else stat(self, **more)
        ),
    )
    assert results.publish("a", {}, local) and (tmp_path / "out" / "a").read_text() == "x" and len(moved) == 1
    assert moved[0].parent == tmp_path / "out" / ".partial"


def test_a_job_that_other_processes_completed_is_no_error(tmp_path, begin):
    late, first = (begin(tmp_path / "out", ["a"]) for _ in range(2))
    late.writing("a").write_text("late")
    late.done = lambda _: False  # type: ignore[method-assign]  # it checked before the end
    _result(first, "a", "x")
    first.finish("{}")
    with pytest.MonkeyPatch.context() as patch:
        # In between of the two creations: the job is completed, and its work folder made again.
        patch.setattr(late, "_plan_unchanged", lambda: False)
        first._store.remove(".partial/a.json")
        assert not late.publish("a", {"words": "late"}) and (tmp_path / "out" / "a").read_text() == "x"
    first.clear()
    late.refresh()
    assert late.missing == [] and late.finished


def test_parts_and_the_command_that_is_recorded():
    assert [Part(i, 3).of(NAMES + ["d"]) for i in (1, 2, 3)] == [["a", "d"], ["b"], ["c"]] and Part(9, 16).of(
        NAMES
    ) == []
    given = ["x", "--part", "1/2", "--out=y", "--ray=auto", "--ray_workers=3", "--partial=1", "--processes", "4"]
    assert without_sharing(given, ("--processes",)) == ["x", "--out=y", "--partial=1"]
