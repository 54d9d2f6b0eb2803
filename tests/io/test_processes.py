"""Workers end with the process that started them, and leave signals to it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

_PARENT = """
import multiprocessing, sys, time
from glip_jax.io.processes import end_with_parent, stop_signals_blocked

def work():
    end_with_parent()
    time.sleep(600)

if __name__ == "__main__":
    with stop_signals_blocked():
        worker = multiprocessing.get_context("spawn").Process(target=work)
        worker.start()
    print(worker.pid, flush=True)
    time.sleep(600)
"""


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def test_a_worker_gets_no_signal_of_the_group_and_ends_with_its_parent(tmp_path):
    (tmp_path / "parent.py").write_text(_PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        os.kill(worker, signal.SIGTERM)  # before its first instruction
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGHUP)
        time.sleep(0.5)
        assert _state(worker) not in ("", "Z"), "signals are the parent's"
        process.kill()
        end = time.monotonic() + 60
        while _state(worker) not in ("", "Z") and time.monotonic() < end:
            time.sleep(0.05)
        assert _state(worker) in ("", "Z")
    finally:
        process.kill()
        process.communicate()
