"""Results of tasks in a bucket: exactly one process succeeds, also if responses of the storage are lost.

The emulator honours the condition of an upload in one request (412 where it fails; `test_the_emulator_honours_the_condition_of_an_upload`). It ignores
conditions of removals, copies and uploads in parts, and a patch does not move `updated`: no test here depends on these.
"""

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from glip_jax.io import gcs
from glip_jax.io.task_results import TaskError, TaskResults, sweep
from tests.io.faulty_storage import FAULTS

pytestmark = pytest.mark.processes

NAMES = ["a", "b", "c"]
UPLOADS = "ifGenerationMatch"
"""In the URL of a request that creates."""


@pytest.fixture
def out(running, tmp_path, monkeypatch) -> str:
    return f"{running.fresh(monkeypatch, tmp_path / 'cache', timeout=1, retry_seconds=30)}/some/folder"


@pytest.fixture
def begin(tmp_path):
    """Joins or starts the work in a folder."""

    def begun(out, names=NAMES, settings=None):
        return TaskResults(out, names, settings or {}, tmp_path / "cache" / "sharing")

    return begun


def _result(results, name, words):
    results.writing(name).write_text(words)
    return results.publish(name, {"words": words})


def _work(out):
    return set(gcs.list_files(f"{out}/.partial"))


def _together(count, what):
    """The results of `what(0)`, `what(1)`..., started at the same moment."""
    barrier = threading.Barrier(count)

    def one(number):
        barrier.wait()
        return what(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_the_emulator_honours_the_condition_of_an_upload(out, running):
    for number in range(5):
        made = _together(6, lambda own, number=number: gcs.put(f"{out}/{number}", str(own).encode(), over=0))
        (winner,) = [own for own, stamp in enumerate(made) if stamp]
        assert gcs.read(f"{out}/{number}") == str(winner).encode()
        before = made[winner]
        assert before
        taken = _together(6, lambda own, n=number, g=before.generation: gcs.put(f"{out}/{n}", bytes([own]), over=g))
        (winner,) = [own for own, stamp in enumerate(taken) if stamp]
        assert gcs.read(f"{out}/{number}") == bytes([winner])
        after = taken[winner]
        assert after and gcs.stat(f"{out}/{number}") == after and after.updated > before.updated


@pytest.mark.parametrize("fault", ["lost", "late", "truncate"])
def test_the_creator_of_an_object_is_recognised_though_the_response_is_lost(out, running, fault):
    with running.arm(fault, share=0.0, only=UPLOADS) as came:
        first = gcs.put(f"{out}/x", b"same", over=0)
        assert first and came[fault] == 1
    # Equal bytes do not make another writer the creator.
    assert gcs.put(f"{out}/x", b"same", over=0) is None
    with running.arm(fault, share=0.0, only=UPLOADS) as came:
        second = gcs.put(f"{out}/x", b"same", over=first.generation)
        assert second and second.generation != first.generation and came[fault] == 1
    assert gcs.put(f"{out}/x", b"same", over=first.generation) is None
    with running.arm(fault, share=0.0) as came:
        gcs.remove(f"{out}/x")
        gcs.remove(f"{out}/x")
        assert came[fault] == 1 and gcs.put(f"{out}/x", b"more", over=second.generation) is None


def test_tasks_are_done_one_after_the_other(out, tmp_path, begin):
    results = begin(out, NAMES, {"k": 1})
    assert [name for name in results.names if _result(results, name, name.upper())] == NAMES
    assert [results.result_info(name) for name in NAMES] == [{"words": name.upper()} for name in NAMES]
    assert [gcs.read(f"{out}/{name}") for name in NAMES] == [b"A", b"B", b"C"]
    assert not results.finished and results.finish("{}") and results.finished and not results.finish("{}")
    results.clear()
    assert set(gcs.list_files(out)) == {*NAMES, "manifest.json"} and not _work(out)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_first_of_two_results_counts(out, begin):
    one, other = (begin(out) for _ in range(2))
    one.writing("a").write_text("slow")
    one.done = lambda _: False  # type: ignore[method-assign]  # it checked before the other was done
    assert _result(other, "a", "fast") and not one.publish("a", {"words": "slow"})
    assert one.result_info("a") == {"words": "fast"} and gcs.read(f"{out}/a") == b"fast"
    assert not [name for name in _work(out) if name.endswith(".result")]


def test_a_result_is_renamed_after_its_publisher_was_killed(out, monkeypatch, begin):
    results = begin(out)
    results._rename_result = lambda *_: None  # type: ignore[method-assign]
    assert _result(results, "a", "x") and not gcs.kind(f"{out}/a") and results.done("a")
    other = begin(out)
    assert _together(2, lambda _: other.result_info("a")) == [{"words": "x"}] * 2 and gcs.read(f"{out}/a") == b"x"
    # A process that checked first and then came second.
    real = gcs.copy
    monkeypatch.setattr(gcs, "copy", lambda *places: (real(*places), gcs.remove(places[0]), real(*places)))
    assert _result(results, "b", "y") and other.result_info("b") == {"words": "y"} and gcs.read(f"{out}/b") == b"y"


@pytest.mark.parametrize("kinds", [("lost", "late"), FAULTS])
def test_three_processes_do_each_task_once_despite_storage_faults(out, running, kinds, begin):
    names = [f"t{i}" for i in range(8)]
    sums = []

    def work(own):
        results, won = begin(out, names), []
        for name in results.names:
            if _result(results, name, f"{own}"):
                won.append(name)
        sums.append(results.finish("same"))
        return won

    creations = len(kinds) == 2
    with running.arm(*kinds, share=0.4 if creations else 0.1, only=UPLOADS if creations else "", stall=1.1) as came:
        won = _together(3, work)
    assert all(came[kind] for kind in kinds) and sorted(name for own in won for name in own) == names
    results = begin(out, names)
    assert all(results.result_info(n) == {"words": f"{k}"} for k, own in enumerate(won) for n in own)
    assert all(gcs.read(f"{out}/{n}") == f"{k}".encode() for k, own in enumerate(won) for n in own)
    assert sums.count(True) == 1
    sweep(out)
    assert not _work(out) and set(gcs.list_files(out)) == {*names, "manifest.json"}


def test_a_process_suspended_until_the_end_cannot_publish_again(out, begin):
    late, first = (begin(out, ["a"]) for _ in range(2))
    late.writing("a").write_text("late")
    late.done = lambda _: False  # type: ignore[method-assign]  # it checked before the end
    _result(first, "a", "first")
    first.finish("{}")
    first.clear()
    assert not late.publish("a", {"words": "late"}) and gcs.read(f"{out}/a") == b"first"
    late.refresh()
    assert late.finished and late.missing == [] and not _work(out)
    # Nor if another process joined at the end and created the work folder again.
    late.writing("a").parent.mkdir(exist_ok=True)
    late.writing("a").write_text("late")
    came = begin(out, ["a"])
    assert not late.publish("a", {"words": "late"}) and came.missing == []
    came.clear()
    assert not _work(out) and set(gcs.list_files(out)) == {"a", "manifest.json"}
    # Nor after the job was abandoned and another process has started it again.
    where = f"{out}/again"
    late, first = (begin(where, ["a"]) for _ in range(2))
    late.writing("a").write_text("late")
    first.abandon()
    new = begin(where, ["a"], {"other": 1})
    assert not late.publish("a", {"words": "late"}) and not new.done("a") and _work(where) == {"plan.json"}


def test_other_settings_and_other_folders_are_refused(out, tmp_path, begin):
    begin(out, NAMES, {"threshold": 0.5})
    begin(out, NAMES, {"threshold": 0.5})
    with pytest.raises(TaskError, match=r"some/folder was begun with other settings .*threshold: 0\.5 -> 0\.4\)"):
        begin(out, NAMES, {"threshold": 0.4})
    gcs.put(f"{out}/else/mine.txt", b"first")
    with pytest.raises(TaskError, match="not empty, without a manifest"):
        begin(f"{out}/else")
    with pytest.raises(TaskError, match="is a file"):
        begin(f"{out}/else/mine.txt")
    assert set(gcs.list_files(f"{out}/else")) == {"mine.txt"}


def test_a_dead_process_leaves_no_scratch_folder(out, tmp_path, begin):
    results = begin(out)
    results.writing("a").write_text("half")
    folder = results.writing("a").parent
    begin(out)
    assert folder.is_dir() and _work(out) == {"plan.json"}, "a live process keeps its folder"
    fcntl.flock(results._store._lock, fcntl.LOCK_UN)  # type: ignore[attr-defined]  # as the system does for a killed process
    begin(out)
    assert not folder.exists()
    results = begin(out)
    folder = results.writing("a").parent
    results.close()
    assert not folder.exists()
