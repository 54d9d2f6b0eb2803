"""The one door: `python -m glip_jax JOB --config=configs/NAME.py --config.section.field=value --workdir=DIR`."""

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from glip_jax.cli import environment
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import libtpu_arguments
from glip_jax.io.errors import full_disk

__all__ = ["JOBS", "main"]

JOBS = {
    "data": "import annotations into shards, and check shards",
    "upload": "send a finished folder of shards to a bucket",
    "verify": "compare shards with their manifest, checkpoints with their checksums",
    "label": "find the phrases of captions in their images: captions become grounding data",
    "inspect": "draw a page of the records in shards and the examples that training makes of them",
    "plan": "say before a launch whether a step fits chips, what bounds it and how long training takes",
    "train": "train, or go on training, in a working folder",
    "evaluate": "evaluate a checkpoint on COCO-style sets",
    "predict": "find in images what a text or a list of names asks for",
    "report": "draw the page of a run again from what it recorded",
    "compare": "set evaluated runs side by side, seeds as replicas, with a table and a plot",
    "scenes": "make the picture scenes of the demo",
    "import": "read released or foreign weights into a checkpoint",
    "export": "write a checkpoint for PyTorch, Hugging Face or ONNX; checks itself",
}
_MODULES = {"import": "import_weights", "export": "export_weights"}
"""Modules of jobs that are not called as the job is (`import` is a word of Python)."""


def main(argv: list[str] | None = None) -> int:
    """Runs the job that `argv` (default: of the process) names and returns its exit code; a mistaken command gives one message and code 2."""
    argv = sys.argv[1:] if argv is None else argv
    listed = "\n".join(f"  {job:10} {what}" for job, what in JOBS.items())
    usage = (
        f"usage: python -m glip_jax JOB [options]\n\njobs:\n{listed}\n\n"
        f"python -m glip_jax JOB --help: its options and an example\n{exit_codes.SHORT}"
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if argv else sys.stderr)
        return exit_codes.DONE if argv else exit_codes.BAD_INPUT
    # Read when jax starts, by TPUs alone.
    os.environ["LIBTPU_INIT_ARGS"] = libtpu_arguments(os.environ.get("LIBTPU_INIT_ARGS", ""))
    job, *rest = argv
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(JOBS)}"
        print(f"unknown job {job!r}; {hint}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    fault = environment.fault()
    if fault:
        print(f"{job}: {fault}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    return _run(job, rest)


def _run(job: str, argv: list[str]) -> int:
    """The job's exit code; what may hit any job at any line (a signal, a full disk) ends in one line as well."""
    try:
        from glip_jax.io import fsspec_gcs  # only now: its libraries take time to load

        fsspec_gcs.install()
        with _sigterm_exits(job):
            return importlib.import_module(f"glip_jax.cli.{_MODULES.get(job, job)}").main(argv)
    except KeyboardInterrupt:
        print(f"{job}: stopped by Ctrl-C; nothing is half-made, the same command goes on", file=sys.stderr)
        return exit_codes.CANCELLED
    except OSError as error:
        reason = full_disk(error)
        from glip_jax.io import gcs  # only now: its libraries take time to load

        if isinstance(error, gcs.StorageError):
            print(f"{job}: {gcs.describe(error)}", file=sys.stderr)
            return exit_codes.STORAGE_UNAVAILABLE if error.errno == errno.ETIMEDOUT else exit_codes.BAD_INPUT
        if not reason:
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(f"{job}: {reason}{place}: make room, then give the same command again", file=sys.stderr)
        return exit_codes.NOT_WRITTEN


@contextlib.contextmanager
def _sigterm_exits(job: str) -> Iterator[None]:
    """SIGTERM unwinds the job, which removes what is half-made, instead of ending the process on the spot.

    Training saves first: within its steps it has a handler of its own.
    """
    own = os.getpid()

    def leave(number: int, _: FrameType | None) -> None:
        if os.getpid() != own:  # a forked worker, which its pool ends so
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        print(f"{job}: stopped by SIGTERM; nothing is half-made, give the same command again", file=sys.stderr)
        raise SystemExit(exit_codes.PREEMPTED)

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: signals are someone else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
