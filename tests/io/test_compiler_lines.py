"""XLA's alarms about slow compilation stay away from the terminal; what else a process writes passes."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

ALARM = (
    "2026-01-01 00:00:00.1: E external/xla/xla/service/slow_operation_alarm.cc:73] \n\n" + "*" * 32 + "\n"
    "[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo "
    "and attach the results.\n" + "*" * 32 + "\n"
)
PROGRAM = """
import os, sys, time
from glip_jax.io.compiler_lines import without_slow_compile_alarms
with without_slow_compile_alarms(0):
    time.sleep(0.5)
    os.write(2, sys.argv[1].encode())
    os.write(2, b"a true error\\n")
    print("of Python", file=sys.stderr)
    if sys.argv[2] == "dies":
        os.write(2, b"last words\\n")
        os.abort()
os.write(2, b"after\\n")
"""


@pytest.mark.parametrize(("end", "last"), [("ends", "after"), ("dies", "last words")])
def test_only_the_alarms_are_dropped(end: str, last: str) -> None:
    command = [sys.executable, "-c", PROGRAM, ALARM, end]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert [line for line in done.stderr.splitlines() if line] == ["a true error", "of Python", last]
