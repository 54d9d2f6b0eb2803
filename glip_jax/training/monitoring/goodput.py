"""Where the wall time of a run went, over all its starts: the part in which it learned, and the rest by cause.

The buckets and their names are those of Google's ml-goodput-measurement (0.2.3, `GoodputType` and `BadputType`):

    TOTAL                                    steps that are in the result
    TPU_INITIALIZATION                       from the start of the job until it has its devices, other processes included
    TRAINING_PREP                            data opened, parameters made, the newest checkpoint looked for
    UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME     the checkpoint read
    PROGRAM_STARTUP                          steps that waited for the compiler, or for the compilation cache
    DATA_LOADING_SYNC                        steps that waited for their batch
    UNPRODUCTIVE_CHECKPOINT_SAVE_TIME        steps that waited for a checkpoint
    CUSTOM_BADPUT_EVENTS                     evaluations and profiles
    WASTED_PROGRESS_FROM_DISRUPTION          steps that were made again, because no checkpoint held them
    INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION  from the last sign of life of one start to the next start
    OTHER                                    what is left

All of it is in metrics.jsonl, whose lines have the `time` at which they were written. Three kinds of lines hold times alone (`goodput`): `start`,
where the time before the first step went; `end`, where that after the last line went, unless the process was killed; `lost`, what stood
in a line that a resume has removed. The last sign of life of a start that was killed is its last line: what it did after it counts as recovery.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from glip_jax.distributed import runtime
from glip_jax.training.monitoring.cached_programs import program_counts

__all__ = ["BUCKETS", "Goodput", "StartTimes", "goodput", "lost", "step_seconds"]

_PRODUCTIVE, _WASTED, _RECOVERY, _OTHER = (
    "TOTAL", "WASTED_PROGRESS_FROM_DISRUPTION", "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION", "OTHER",
)  # fmt: skip
_OF_SECONDS = {
    "initialization_seconds": "TPU_INITIALIZATION",
    "preparation_seconds": "TRAINING_PREP",
    "restore_seconds": "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME",
    "compile_seconds": "PROGRAM_STARTUP",
    "wait_seconds": "DATA_LOADING_SYNC",
    "checkpoint_seconds": "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME",
    "evaluation_seconds": "CUSTOM_BADPUT_EVENTS",
    "profile_seconds": "CUSTOM_BADPUT_EVENTS",
    "lost_seconds": _WASTED,
}
"""Keys of a line to the bucket of their seconds."""
BUCKETS = (_PRODUCTIVE, *dict.fromkeys(_OF_SECONDS.values()), _RECOVERY, _OTHER)


class Goodput(NamedTuple):
    """The wall time of a run by bucket."""

    seconds: float
    """From the begin of its first start to its last sign of life; the sum of `buckets`."""
    starts: int
    buckets: dict[str, float]
    """Seconds in each of `BUCKETS`."""

    @property
    def share(self) -> float:
        """The goodput: the productive part of the wall time."""
        return self.buckets[_PRODUCTIVE] / self.seconds

    def line(self) -> str:
        """In one line, largest first."""
        hours, rest = divmod(round(self.seconds), 3600)
        parts = sorted((item for item in self.buckets.items() if item[0] != _PRODUCTIVE), key=lambda item: -item[1])
        listed = ", ".join(
            f"{name} {value / self.seconds:.1%}" for name, value in parts if value / self.seconds >= 5e-4
        )
        return (
            f"goodput {self.share:.1%} of {hours} h {rest // 60:02d} min {rest % 60:02d} s in {self.starts} start{'s' if self.starts > 1 else ''}"
            f"{f'; badput: {listed}' if listed else ''}"
        )


class StartTimes:
    """The times of one start, from the begin of the job (of this object, outside of one) to the first step."""

    def __init__(self) -> None:
        program_counts()  # begins to count
        self._began, runtime.job_began = runtime.job_began or time.time(), None
        self._initialized = self._began
        self._restore = 0.0

    def initialized(self) -> None:
        """The devices are there."""
        self._initialized = time.time()

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Around the reading of a checkpoint."""
        begin = time.perf_counter()
        yield
        self._restore = time.perf_counter() - begin

    def line(self) -> dict[str, float]:
        """For the line `start`, when the first step comes next."""
        return {
            "began": round(self._began, 3),
            "initialization_seconds": round(self._initialized - self._began, 4),
            "preparation_seconds": round(time.time() - self._initialized - self._restore, 4),
            "restore_seconds": round(self._restore, 4),
        }


def goodput(lines: Sequence[Mapping[str, Any]]) -> Goodput | None:
    """The goodput of a run from all lines of its metrics.jsonl (`metrics.read(workdir, times=True)`).

    None where no start is recorded, as by earlier versions; what these ran before the first start that is, is not counted.
    """
    timed = sorted((line for line in lines if "time" in line), key=lambda line: line["time"])
    began = sorted(line["began"] for line in timed if line.get("goodput") == "start")
    if not began:
        return None
    buckets: defaultdict[str, float] = defaultdict(float)
    alive = first = began[0]
    for line in timed:
        if line["time"] < first:
            continue
        if line.get("goodput") == "start":
            buckets[_RECOVERY] += max(0.0, line["began"] - alive)
        alive = line["time"]
        for name, bucket in _OF_SECONDS.items():
            buckets[bucket] += line.get(name, 0.0)
        buckets[_PRODUCTIVE] += step_seconds(line)
    buckets[_OTHER] = alive - first - sum(buckets.values())
    return Goodput(alive - first, len(began), {name: buckets[name] for name in BUCKETS})


def step_seconds(line: Mapping[str, Any]) -> float:
    """The seconds of a line in which steps ran; 0 for a line that is of no steps."""
    if not line.get("steps"):
        return 0.0
    return line["seconds"] - sum(line.get(name, 0.0) for name in _OF_SECONDS)


def lost(line: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """What stays of the times of a line that a resume at `step` removes; None if it has none."""
    if "time" not in line:
        return None
    if "goodput" in line:
        return {**line, "step": step}
    kept = {name: line[name] for name in _OF_SECONDS if name in line}
    return {"step": step, "goodput": "lost", "time": line["time"], "lost_seconds": round(step_seconds(line), 4), **kept}
