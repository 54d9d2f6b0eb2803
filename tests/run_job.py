"""Runs a job as `python -m glip_jax` does.

`run_job`: in this process; its errors become an exit code and a line on stderr. `two_processes`: as two that work together.
"""

import os
import re
import socket
import subprocess
import sys

from glip_jax import __main__

__all__ = ["run_job", "two_processes"]


def run_job(job, argv):
    return __main__.main([job, *map(str, argv)])


def two_processes(job, *arguments, devices=2):
    """Exit codes and outputs of a job in two processes on loopback, each with `devices` fake devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "glip_jax", job, *map(str, arguments), where, "--processes=2", f"--index={index}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "XLA_FLAGS": flags},
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in started]
    return [process.returncode for process in started], outputs
