"""The processor cores that this process may use."""

import os

__all__ = ["available_cores"]


def available_cores() -> int:
    """Number of cores available to this process, which a container or `taskset` may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
