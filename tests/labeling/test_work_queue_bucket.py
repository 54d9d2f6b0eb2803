"""The work queue in a bucket: exactly one process succeeds, also if responses of the storage are lost.

The emulator honours the condition of an upload in one request (412 where it fails; `test_the_emulator_honours_the_condition_of_an_upload`). It ignores
conditions of removals, copies and uploads in parts, and a patch does not move `updated`: no test here depends on these.
"""

import contextlib
import fcntl
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from glip_jax.io import gcs
from glip_jax.labeling.work_queue import TaskError, WorkQueue, sweep
from tests.io.faulty_storage import FAULTS

pytestmark = pytest.mark.processes

NAMES = ["a", "b", "c"]
UPLOADS = "ifGenerationMatch"
"""In the URL of a request that creates, takes over or renews."""


@pytest.fixture
def out(running, tmp_path, monkeypatch) -> str:
    return f"{running.fresh(monkeypatch, tmp_path / 'cache', timeout=1, retry_seconds=30)}/some/folder"


def _result(queue, name, words):
    queue.writing(name).write_text(words)
    return queue.publish(name, {"words": words})


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


def test_tasks_are_done_one_after_the_other(out, tmp_path):
    queue = WorkQueue(out, NAMES, {"k": 1})
    assert [name for name in queue.claim_tasks() if _result(queue, name, name.upper())] == NAMES
    assert [queue.result_info(name) for name in NAMES] == [{"words": name.upper()} for name in NAMES]
    assert [gcs.read(f"{out}/{name}") for name in NAMES] == [b"A", b"B", b"C"]
    assert not queue.finished and queue.finish("{}") and queue.finished and not queue.finish("{}")
    queue.clear()
    assert set(gcs.list_files(out)) == {*NAMES, "manifest.json"} and not _work(out)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] and list(queue.claim_tasks()) == []


def test_the_first_of_two_results_counts(out):
    one, other = (WorkQueue(out, NAMES, {}) for _ in range(2))
    one.writing("a").write_text("slow")
    one.done = lambda _: False  # type: ignore[method-assign]  # it checked before the other was done
    assert _result(other, "a", "fast") and not one.publish("a", {"words": "slow"})
    assert one.result_info("a") == {"words": "fast"} and gcs.read(f"{out}/a") == b"fast"
    assert not [name for name in _work(out) if name.endswith(".result")]


def test_a_result_is_renamed_after_its_publisher_was_killed(out, monkeypatch):
    queue = WorkQueue(out, NAMES, {})
    queue._rename_result = lambda *_: None  # type: ignore[method-assign]
    assert _result(queue, "a", "x") and not gcs.kind(f"{out}/a") and queue.done("a")
    other = WorkQueue(out, NAMES, {})
    assert _together(2, lambda _: other.result_info("a")) == [{"words": "x"}] * 2 and gcs.read(f"{out}/a") == b"x"
    # A process that checked first and then came second.
    real = gcs.copy
    monkeypatch.setattr(gcs, "copy", lambda *places: (real(*places), gcs.remove(places[0]), real(*places)))
    assert _result(queue, "b", "y") and other.result_info("b") == {"words": "y"} and gcs.read(f"{out}/b") == b"y"


def test_claims_are_aged_by_the_clock_of_the_storage(out, monkeypatch):
    one, other = (WorkQueue(out, NAMES, {}, lease=0.9) for _ in range(2))
    # A host with a wrong clock computes the same age.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with one.claim("a") as first:
        time.sleep(1.5)
        with other.claim("a") as second, other.claim("b") as free:
            assert first and not second and free, "a heartbeat renews it"
    with other.claim("a") as second:
        assert second, "released"
    one._heartbeat = lambda *_: None  # type: ignore[method-assign]
    with one.claim("a") as first:
        one.writing("a").write_text("slow")
        with other.claim("a") as second:
            assert first and not second, "within its lease"
        time.sleep(1.0)
        third = WorkQueue(out, NAMES, {}, lease=0.9)
        with contextlib.ExitStack() as stack:
            taken = _together(2, lambda own: stack.enter_context((other, third)[own].claim("a")))
            assert sorted(taken) == [False, True], "one of two processes takes it over"
            assert one.publish("a", {"words": "slow"}), "a process whose lease expired may still publish first"
            assert other.done("a") and not _result(other, "a", "late") and not _result(third, "a", "late")
    assert not [name for name in _work(out) if name.endswith(".claim")]


@pytest.mark.parametrize("kinds", [("lost", "late"), FAULTS])
def test_three_processes_do_each_task_once_despite_storage_faults(out, running, kinds):
    names = [f"t{i}" for i in range(8)]
    sums = []

    def work(own):
        queue, won = WorkQueue(out, names, {}, lease=4.0), []
        for name in queue.claim_tasks():
            if _result(queue, name, f"{own}"):
                won.append(name)
        with queue.claim("end") as claimed:
            sums.append(claimed and queue.finish("same"))
        return won

    creations = len(kinds) == 2
    with running.arm(*kinds, share=0.4 if creations else 0.1, only=UPLOADS if creations else "", stall=1.1) as came:
        won = _together(3, work)
    assert all(came[kind] for kind in kinds) and sorted(name for own in won for name in own) == names
    queue = WorkQueue(out, names, {})
    assert all(queue.result_info(n) == {"words": f"{k}"} for k, own in enumerate(won) for n in own)
    assert all(gcs.read(f"{out}/{n}") == f"{k}".encode() for k, own in enumerate(won) for n in own)
    assert sums.count(True) == 1
    sweep(out)
    assert not _work(out) and set(gcs.list_files(out)) == {*names, "manifest.json"}


def test_a_process_suspended_until_the_end_cannot_publish_again(out):
    late, first = (WorkQueue(out, ["a"], {}) for _ in range(2))
    late.writing("a").write_text("late")
    late.done = lambda _: False  # type: ignore[method-assign]  # it checked before the end
    for name in first.claim_tasks():
        _result(first, name, "first")
    first.finish("{}")
    first.clear()
    assert not late.publish("a", {"words": "late"}) and gcs.read(f"{out}/a") == b"first"
    with late.claim("end") as claimed:
        assert late.finished or not claimed
    assert list(late.claim_tasks()) == [] and not _work(out)
    # Nor if another process joined at the end and created the work folder again.
    late.writing("a").parent.mkdir(exist_ok=True)
    late.writing("a").write_text("late")
    came = WorkQueue(out, ["a"], {})
    assert not late.publish("a", {"words": "late"}) and list(came.claim_tasks()) == []
    came.clear()
    assert not _work(out) and set(gcs.list_files(out)) == {"a", "manifest.json"}
    # Nor after the job was abandoned and another process has started it again.
    where = f"{out}/again"
    late, first = (WorkQueue(where, ["a"], {}) for _ in range(2))
    late.writing("a").write_text("late")
    first.abandon()
    new = WorkQueue(where, ["a"], {"other": 1})
    assert not late.publish("a", {"words": "late"}) and not new.done("a") and _work(where) == {"plan.json"}


def test_other_settings_and_other_folders_are_refused(out, tmp_path):
    WorkQueue(out, NAMES, {"threshold": 0.5})
    WorkQueue(out, NAMES, {"threshold": 0.5})
    with pytest.raises(TaskError, match=r"some/folder was begun with other settings .*threshold: 0\.5 -> 0\.4\)"):
        WorkQueue(out, NAMES, {"threshold": 0.4})
    gcs.put(f"{out}/else/mine.txt", b"first")
    with pytest.raises(TaskError, match="not empty, without a manifest"):
        WorkQueue(f"{out}/else", NAMES, {})
    with pytest.raises(TaskError, match="is a file"):
        WorkQueue(f"{out}/else/mine.txt", NAMES, {})
    assert set(gcs.list_files(f"{out}/else")) == {"mine.txt"}


def test_a_failure_leaves_no_claim_and_a_dead_process_no_scratch_folder(out, tmp_path):
    queue = WorkQueue(out, NAMES, {})
    with contextlib.suppress(OSError), queue.claim("a"):
        queue.writing("a").write_text("half")
        raise OSError("full")
    assert _work(out) == {"plan.json"} and not queue.writing("a").exists()
    folder = queue.writing("a").parent
    WorkQueue(out, NAMES, {})
    assert folder.is_dir(), "a live process keeps its folder"
    fcntl.flock(queue._store._lock, fcntl.LOCK_UN)  # type: ignore[attr-defined]  # as the system does for a killed process
    WorkQueue(out, NAMES, {})
    assert not folder.exists()
    # A killed process of this machine is detected at once, whatever its lease.
    dead = json.dumps(json.loads(queue._claim_text) | {"pid": 2**22 + 1, "owner": "dead"})
    gcs.put(f"{out}/.partial/b.claim", dead.encode())
    with queue.claim("b") as claimed:
        assert claimed
