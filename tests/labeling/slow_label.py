"""The job `label` with an outside teacher that takes its time, in processes that tests may kill.

They are forked from a server that has imported everything once, which takes longer than what they do.
"""

import multiprocessing
import multiprocessing.process
import os
import sys
import time
from pathlib import Path
from typing import Any

from glip_jax.cli.label import main
from glip_jax.labeling.outside import OutsideTeacher

__all__ = ["start"]


def start(arguments: list[str], said: Path) -> multiprocessing.process.BaseProcess:
    """A process of the job; what it prints goes to the file `said`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_label, args=(arguments, said, dict(os.environ)), daemon=True)
    process.start()
    return process


def _label(arguments: list[str], said: Path, environment: dict[str, str]) -> None:
    os.environ.clear()  # of the day when the server began
    os.environ.update(environment)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    real = OutsideTeacher.detect_async

    def slowly(*given: Any) -> Any:
        time.sleep(0.05)
        return real(*given)

    OutsideTeacher.detect_async = slowly  # type: ignore[method-assign]
    sys.exit(main(arguments))
