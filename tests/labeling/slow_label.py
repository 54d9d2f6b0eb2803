"""Runs the job `label` with a slow outside teacher, in processes that tests may kill.

The processes are forked from a server that has imported everything once; importing takes longer than their work.
"""

import multiprocessing
import multiprocessing.process
import os
import sys
import time
from pathlib import Path
from typing import Any

from glip_jax.labeling.outside import OutsideTeacher
from tests.run_job import run_job

__all__ = ["start"]


def start(arguments: list[str], output: Path) -> multiprocessing.process.BaseProcess:
    """Starts a process of the job; its stdout and stderr go to the file `output`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_label, args=(arguments, output, dict(os.environ)), daemon=True)
    process.start()
    return process


def _label(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    os.environ.clear()  # the server has the environment of its start
    os.environ.update(environment)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    detect_async = OutsideTeacher.detect_async

    def delayed(*args: Any) -> Any:
        time.sleep(0.05)
        return detect_async(*args)

    OutsideTeacher.detect_async = delayed  # type: ignore[method-assign]
    sys.exit(run_job("label", arguments))
