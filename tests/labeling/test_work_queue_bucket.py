"""Sharing tasks through a folder in a bucket: of all who try one is first, also where the storage's answers are lost.

The emulator keeps the condition of an upload in one request (412 where it fails; `test_the_emulator_keeps_its_word`). It ignores
conditions of removals, copies and uploads in parts, and a patch does not move `updated`: nothing here rests on these.
"""

import contextlib
import fcntl
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from glip_jax.io import gcs
from glip_jax.labeling.work_queue import TaskError, Tasks, sweep
from tests.io.faulty_storage import FAULTS

NAMES = ["a", "b", "c"]
UPLOADS = "ifGenerationMatch"
"""In the address of a request that creates, takes over or beats."""


@pytest.fixture
def out(running, tmp_path, monkeypatch) -> str:
    return f"{running.fresh(monkeypatch, tmp_path / 'cache', silence=1, patience=30)}/some/folder"


def _result(tasks, name, words):
    tasks.writing(name).write_text(words)
    return tasks.publish(name, {"words": words})


def _work(out):
    return set(gcs.listing(f"{out}/.partial"))


def _together(count, what):
    """The results of `what(0)`, `what(1)`..., begun at one moment."""
    barrier = threading.Barrier(count)

    def one(number):
        barrier.wait()
        return what(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_the_emulator_keeps_its_word(out, running):
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
        assert after and gcs.stamp(f"{out}/{number}") == after and after.updated > before.updated


@pytest.mark.parametrize("fault", ["lost", "late", "truncate"])
def test_who_made_a_file_knows_it_though_the_answer_is_lost(out, running, fault):
    with running.arm(fault, share=0.0, only=UPLOADS) as came:
        first = gcs.put(f"{out}/x", b"same", over=0)
        assert first and came[fault] == 1
    # Equal bytes are no proof: the other one is another one.
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
    tasks = Tasks(out, NAMES, {"k": 1})
    assert [name for name in tasks.mine() if _result(tasks, name, name.upper())] == NAMES
    assert [tasks.side(name) for name in NAMES] == [{"words": name.upper()} for name in NAMES]
    assert [gcs.read(f"{out}/{name}") for name in NAMES] == [b"A", b"B", b"C"]
    assert not tasks.finished and tasks.finish("{}") and tasks.finished and not tasks.finish("{}")
    tasks.clear()
    assert set(gcs.listing(out)) == {*NAMES, "manifest.json"} and not _work(out)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] and list(tasks.mine()) == []


def test_of_two_results_the_first_counts(out):
    one, other = (Tasks(out, NAMES, {}) for _ in range(2))
    one.writing("a").write_text("slow")
    one.done = lambda _: False  # type: ignore[method-assign]  # it looked before the other was done
    assert _result(other, "a", "fast") and not one.publish("a", {"words": "slow"})
    assert one.side("a") == {"words": "fast"} and gcs.read(f"{out}/a") == b"fast"
    assert not [name for name in _work(out) if name.endswith(".result")]


def test_a_result_published_by_one_who_was_killed_before_it_had_its_name(out, monkeypatch):
    tasks = Tasks(out, NAMES, {})
    tasks._settle = lambda *_: None  # type: ignore[method-assign]
    assert _result(tasks, "a", "x") and not gcs.kind(f"{out}/a") and tasks.done("a")
    other = Tasks(out, NAMES, {})
    assert _together(2, lambda _: other.side("a")) == [{"words": "x"}] * 2 and gcs.read(f"{out}/a") == b"x"
    # One who looked, and then came second.
    real = gcs.copy
    monkeypatch.setattr(gcs, "copy", lambda *places: (real(*places), gcs.remove(places[0]), real(*places)))
    assert _result(tasks, "b", "y") and other.side("b") == {"words": "y"} and gcs.read(f"{out}/b") == b"y"


def test_claims_by_the_clock_of_the_storage(out, monkeypatch):
    one, other = (Tasks(out, NAMES, {}, lease=0.9) for _ in range(2))
    # A host whose clock is wrong judges as the others.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with one.claim("a") as mine:
        time.sleep(1.5)
        with other.claim("a") as theirs, other.claim("b") as free:
            assert mine and not theirs and free, "a heartbeat keeps it"
    with other.claim("a") as theirs:
        assert theirs, "given back"
    one._beat = lambda *_: None  # type: ignore[method-assign]
    with one.claim("a") as mine:
        one.writing("a").write_text("slow")
        with other.claim("a") as theirs:
            assert mine and not theirs, "within its lease"
        time.sleep(1.0)
        third = Tasks(out, NAMES, {}, lease=0.9)
        with contextlib.ExitStack() as stack:
            taken = _together(2, lambda own: stack.enter_context((other, third)[own].claim("a")))
            assert sorted(taken) == [False, True], "of two that take over, one has it"
            assert one.publish("a", {"words": "slow"}), "who sleeps may still be first"
            assert other.done("a") and not _result(other, "a", "late") and not _result(third, "a", "late")
    assert not [name for name in _work(out) if name.endswith(".claim")]


@pytest.mark.parametrize("kinds", [("lost", "late"), FAULTS])
def test_three_at_once_do_each_task_once_whatever_the_storage_does(out, running, kinds):
    names = [f"t{i}" for i in range(8)]
    sums = []

    def work(own):
        tasks, won = Tasks(out, names, {}, lease=4.0), []
        for name in tasks.mine():
            if _result(tasks, name, f"{own}"):
                won.append(name)
        with tasks.claim("end") as claimed:
            sums.append(claimed and tasks.finish("same"))
        return won

    creations = len(kinds) == 2
    with running.arm(*kinds, share=0.4 if creations else 0.1, only=UPLOADS if creations else "", stall=1.1) as came:
        won = _together(3, work)
    assert all(came[kind] for kind in kinds) and sorted(name for own in won for name in own) == names
    tasks = Tasks(out, names, {})
    assert all(tasks.side(n) == {"words": f"{k}"} for k, own in enumerate(won) for n in own)
    assert all(gcs.read(f"{out}/{n}") == f"{k}".encode() for k, own in enumerate(won) for n in own)
    assert sums.count(True) == 1
    sweep(out)
    assert not _work(out) and set(gcs.listing(out)) == {*names, "manifest.json"}


def test_who_slept_through_the_end_is_not_first_again(out):
    late, first = (Tasks(out, ["a"], {}) for _ in range(2))
    late.writing("a").write_text("late")
    late.done = lambda _: False  # type: ignore[method-assign]  # it looked before the end
    for name in first.mine():
        _result(first, name, "first")
    first.finish("{}")
    first.clear()
    assert not late.publish("a", {"words": "late"}) and gcs.read(f"{out}/a") == b"first"
    with late.claim("end") as claimed:
        assert late.finished or not claimed
    assert list(late.mine()) == [] and not _work(out)
    # Nor where somebody came as it ended, and began the folder of the work anew.
    late.writing("a").parent.mkdir(exist_ok=True)
    late.writing("a").write_text("late")
    came = Tasks(out, ["a"], {})
    assert not late.publish("a", {"words": "late"}) and list(came.mine()) == []
    came.clear()
    assert not _work(out) and set(gcs.listing(out)) == {"a", "manifest.json"}
    # Nor after the work was given up and another has begun it anew.
    where = f"{out}/again"
    late, first = (Tasks(where, ["a"], {}) for _ in range(2))
    late.writing("a").write_text("late")
    first.abandon()
    new = Tasks(where, ["a"], {"other": 1})
    assert not late.publish("a", {"words": "late"}) and not new.done("a") and _work(where) == {"plan.json"}


def test_other_settings_and_other_folders_are_refused(out, tmp_path):
    Tasks(out, NAMES, {"threshold": 0.5})
    Tasks(out, NAMES, {"threshold": 0.5})
    with pytest.raises(TaskError, match=r"some/folder was begun with other settings .*threshold: 0\.5 -> 0\.4\)"):
        Tasks(out, NAMES, {"threshold": 0.4})
    gcs.put(f"{out}/else/mine.txt", b"mine")
    with pytest.raises(TaskError, match="not empty, without a manifest"):
        Tasks(f"{out}/else", NAMES, {})
    with pytest.raises(TaskError, match="is a file"):
        Tasks(f"{out}/else/mine.txt", NAMES, {})
    assert set(gcs.listing(f"{out}/else")) == {"mine.txt"}


def test_a_failure_leaves_no_claim_and_the_dead_no_scratch(out, tmp_path):
    tasks = Tasks(out, NAMES, {})
    with contextlib.suppress(OSError), tasks.claim("a"):
        tasks.writing("a").write_text("half")
        raise OSError("full")
    assert _work(out) == {"plan.json"} and not tasks.writing("a").exists()
    folder = tasks.writing("a").parent
    Tasks(out, NAMES, {})
    assert folder.is_dir(), "the living keep theirs"
    fcntl.flock(tasks._place._lock, fcntl.LOCK_UN)  # type: ignore[attr-defined]  # as the system does for the killed
    Tasks(out, NAMES, {})
    assert not folder.exists()
    # One of this machine that was killed is noticed at once, whatever its lease.
    dead = json.dumps(json.loads(tasks._me) | {"pid": 2**22 + 1, "owner": "dead"})
    gcs.put(f"{out}/.partial/b.claim", dead.encode())
    with tasks.claim("b") as claimed:
        assert claimed
