"""What workers of the Ray cluster of tests do. It imports little, as every worker imports it."""

import os
import signal
import time
from pathlib import Path

__all__ = ["by_node", "slow_labels"]


def slow_labels(folder, real, *arguments):
    """The worker of `label`, `real`, but slow; it writes down its process id."""
    from glip_jax.labeling.outside import OutsideTeacher

    (Path(folder) / f"{os.getpid()}.pid").touch()
    detect_async = OutsideTeacher.detect_async

    def delayed(*args):
        time.sleep(0.03)
        return detect_async(*args)

    OutsideTeacher.detect_async = delayed  # type: ignore[method-assign]
    return real(*arguments)


def by_node(folder, stuck="", dies=""):
    """Does tasks that write a file; on the node `stuck` one never ends, for which the others wait, and at the task `dies` the worker is killed."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def one(task):
        name, value = task
        if node == stuck:
            (Path(folder) / "stuck").touch()
            time.sleep(600)
        while stuck and not (Path(folder) / "stuck").exists():
            time.sleep(0.01)
        if name == dies:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
        (Path(folder) / name).write_text(f"{value}")

    return one
