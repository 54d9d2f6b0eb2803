"""One training a working folder: the second is refused with host and pid of the first; what a killed one leaves blocks nobody."""

import json
import multiprocessing
import os
import socket
import threading
import time

import pytest

from glip_jax.io import claims, gcs
from glip_jax.io.claims import LOCK, BucketClaims, died, holder, owned_workdir
from glip_jax.io.workdir import CheckpointError


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(claims, "_RETRY_SECONDS", 0.2)


def test_a_folder_is_held_by_one_process(tmp_path):
    with owned_workdir(str(tmp_path)):
        line = f"in use: a training .pid {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(CheckpointError, match=line), owned_workdir(str(tmp_path)):
            pass
        assert (tmp_path / LOCK).exists(), "the one that is refused leaves it to its holder"
    assert not (tmp_path / LOCK).exists()
    # A killed process leaves the file, without a lock.
    (tmp_path / LOCK).write_text(holder("killed"))
    with owned_workdir(str(tmp_path)) as owned:
        owned.check()


def test_a_folder_of_another_host_is_waited_for(tmp_path, caplog, monkeypatch):
    with owned_workdir(str(tmp_path)):
        monkeypatch.setattr(claims.socket, "gethostname", lambda: "other")
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match="in use"), owned_workdir(str(tmp_path), lease=0.5):
            pass
        assert time.monotonic() - begin >= 0.5 and "in case that host was lost" in caplog.text


def test_a_process_is_known_by_host_boot_number_and_start():
    text = json.loads(holder("me"))
    assert died(json.dumps(text)) == (False, "me")
    assert died(json.dumps({**text, "started": "1"})) == (True, "me"), "another process has its number now"
    assert died(json.dumps({**text, "pid": 2**22 + 1})) == (True, "me")
    assert died(json.dumps({**text, "host": "other", "pid": 2**22 + 1})) == (False, "me")
    del text["started"]
    assert died(json.dumps(text)) == (False, "me"), "of an earlier version"
    assert died("") == (True, "")


def test_a_bucket_is_held_by_one_process(running, tmp_path, monkeypatch):
    place = running.fresh(monkeypatch, tmp_path / "cache", timeout=2.0) + "/runs/one"
    other = json.dumps({**json.loads(holder("other")), "host": "other"})
    store = BucketClaims(place, "clock")

    def refused(lease):
        with pytest.raises(CheckpointError, match="in use: a training"), owned_workdir(place, lease):
            pass

    with owned_workdir(place, lease=3.0):
        refused(3.0)
        assert multiprocessing.current_process().pid == json.loads(gcs.read(f"{place}/{LOCK}"))["pid"]
    assert LOCK not in gcs.list_files(place)
    # Of this machine, and dead.
    store.create(LOCK, json.dumps({**json.loads(holder("dead")), "pid": 2**22 + 1}))
    with owned_workdir(place):
        pass
    # Of another host: one that is alive is refused at its next heartbeat, one that is dead is waited for.
    store.create(LOCK, other)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.3):
            store.heartbeat(LOCK, other)

    thread = threading.Thread(target=beat)
    thread.start()
    refused(60.0)
    stop.set()
    thread.join()
    with owned_workdir(place, lease=1.0) as owned:
        # A suspended process finds itself replaced.
        gcs.put(f"{place}/{LOCK}", other.encode())
        end = time.monotonic() + 20
        while not owned.lost and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(CheckpointError, match="another process has taken over"):
            owned.check()
    assert gcs.read(f"{place}/{LOCK}").decode() == other, "and leaves the folder to the other"
