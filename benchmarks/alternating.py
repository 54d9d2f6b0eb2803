"""Times two implementations alternately in one run, each in a process of its own on the same cores.

A benchmark names its sides and what each can run. `main` parses the command line, starts a process per side, pins it to the first
cores, and alternates rounds between the sides, so that other load affects all. All use huge pages in the allocator, as
`scripts/` sets them. Every round begins with an uncounted run, as a training job's steps follow one another: a virtual machine may take back
memory that a side has freed before the other side's round, and giving it again costs a step of GLIP-T four seconds. Memory is the peak
resident memory after the first round: it includes parameters and gradients, but not compilation. A side whose runs take minutes has a
short run `warm MODE`, which then is the uncounted one; a side without a mode is left out of it.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from glip_jax.config import Remat

__all__ = ["Device", "Runs", "Settings", "Side", "Worker", "main", "work"]

Device = Literal["cpu", "gpu"]


class Settings(NamedTuple):
    """Settings of a side."""

    threads: int
    remat: Remat
    device: Device
    arguments: tuple[str, ...] = ()
    """Arguments of the benchmark itself."""


Runs = Mapping[str, Callable[[], int | None]]
"""For each mode a function that does one timed run; it returns when the result is available, on a GPU with the peak bytes of its memory."""
Side = Callable[[Settings], Runs]


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def work(side: str, runs: Runs) -> None:
    """For each line `mode` on stdin prints the seconds of a run and the peak memory since the first runs of the mode, or the error."""
    warm: set[str] = set()
    print("ready", flush=True)
    for line in sys.stdin:
        mode = line.strip()
        if mode not in runs:
            print("null", flush=True)
            continue
        uncounted = runs.get(f"warm {mode}", runs[mode])
        if mode not in warm:
            start = time.perf_counter()
            try:
                uncounted()
            except (RuntimeError, ValueError) as error:  # memory of a GPU; a kernel that it does not have
                print(json.dumps({"error": (str(error).splitlines() or [type(error).__name__])[0][:200]}), flush=True)
                continue
            print(f"{side}: first {mode} (with compilation) {time.perf_counter() - start:.1f} s", file=sys.stderr)
            ctypes.CDLL(None).malloc_trim(0)  # what compilation has freed
            Path("/proc/self/clear_refs").write_text("5")
            warm.add(mode)
        uncounted()
        start = time.perf_counter()
        peak = runs[mode]()
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak or _peak_bytes()}), flush=True)


class Worker:
    """A side in its own process, pinned to the first `threads` cores."""

    def __init__(self, module: str, side: str, settings: Settings) -> None:
        threads = settings.threads
        cores = sorted(os.sched_getaffinity(0))[:threads]
        if len(cores) < threads:
            raise SystemExit(f"--threads {threads}: this process may use {len(cores)} cores only")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        if settings.device == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        command = [sys.executable, "-m", module, "--worker", side, "--remat", settings.remat]
        command += ["--threads", str(threads), "--device", settings.device, *settings.arguments]
        self.process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}; its error stands above")
        return line

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()

    def measure(self, mode: str) -> dict | None:
        """One run after the uncounted first ones, or its `error`; None if the side does not have the mode."""
        assert self.process.stdin is not None
        print(mode, file=self.process.stdin, flush=True)
        return json.loads(self._answer())


def _compare(module: str, sides: list[str], settings: Settings, rounds: int, modes: list[str]) -> None:
    """Prints a table of medians for one number of threads; ratios are relative to the last side."""
    workers = {side: Worker(module, side, settings) for side in sides}
    for mode in modes:
        results: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                if (found := workers[side].measure(mode)) is not None:
                    if "error" in found:
                        raise SystemExit(f"{side}, {mode}: {found['error']}")
                    results[side].append(found)
        having = [side for side in sides if results[side]]
        medians = {side: statistics.median(r["seconds"] for r in results[side]) for side in having}
        for side in having:
            seconds = [r["seconds"] for r in results[side]]
            peak = max(r["peak"] for r in results[side]) / 2**30
            print(
                f"| {settings.threads} | {mode} | {side} | {medians[side]:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | "
                f"{peak:.2f} | {medians[side] / medians[having[-1]]:.2f} |",
                flush=True,
            )
    for worker in workers.values():
        worker.close()


def main(
    module: str, about: str, sides: Mapping[str, Side], modes: Sequence[str] = ("forward", "step"),
    before: Callable[[Sequence[str]], None] | None = None,
) -> None:  # fmt: skip
    """Parses the command line of the benchmark `module` and compares its sides; ratios are relative to the last one.

    `before`: checks the arguments of the benchmark itself, which the sides get, and prints what stands above the table. Without it
    there are none.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about.split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes))
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument("--device", choices=get_args(Device), default="cpu")
    parser.add_argument("--worker", choices=list(sides), help=argparse.SUPPRESS)
    arguments, own = parser.parse_known_args()
    if own and before is None:
        parser.error(f"unrecognized arguments: {' '.join(own)}")
    settings = [Settings(threads, arguments.remat, arguments.device, tuple(own)) for threads in arguments.threads]
    if arguments.worker:
        work(arguments.worker, sides[arguments.worker](settings[0]))
        return
    if before is not None:
        before(own)
    print(
        "| threads | mode | side | median s | range s | peak GiB | ratio |\n|---|---|---|---|---|---|---|", flush=True
    )
    for setting in settings:
        _compare(module, list(sides), setting, arguments.rounds, arguments.modes)
