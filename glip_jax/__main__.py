"""The entry point: `python -m glip_jax JOB --config=configs/NAME.py --config.section.field=value --workdir=DIR`."""

import contextlib
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from glip_jax.cli import environment, errors, log
from glip_jax.distributed import exit_codes, runtime
from glip_jax.distributed.runtime import libtpu_arguments

__all__ = ["JOBS", "main"]

logger = logging.getLogger("glip_jax")  # not __name__, which is "__main__" where the module is run

JOBS = {
    "data": "import annotations into shards",
    "upload": "send a finished folder of shards to a bucket",
    "verify": "compare shards with their manifest, checkpoints with their checksums",
    "label": "label captions with boxes for their noun phrases (self-training)",
    "inspect": "write an HTML report of the records in shards and of the training examples made of them",
    "plan": "compile the training step for absent chips: whether it fits, what bounds it, how long training takes",
    "precompile": "compile the training step for every canvas ahead, into the cache that `train` reads",
    "train": "train, or resume training, in a working folder",
    "finetune": "fine-tune a detector on a folder of own data, with a table of before and after",
    "evaluate": "evaluate a checkpoint on COCO-style sets",
    "score": "score predictions of any detector as the official evaluators of the benchmarks do",
    "benchmark": "a checkpoint on the field's benchmarks: predictions, numbers with their protocol, tables",
    "predict": "detect in images what a text or a list of names describes",
    "serve": "answer over HTTP what is where in images, with a page to try it",
    "report": "write the HTML report of a run again from what the run recorded",
    "compare": "compare evaluated runs, seeds as replicas, in a table and a plot",
    "scenes": "make the synthetic scenes of the demo",
    "import": "read released or foreign weights into a checkpoint",
    "export": "write a checkpoint for PyTorch, Hugging Face or ONNX, and verify the result",
    "doctor": "check Python, libraries, devices, caches and disks of this machine",
}


class _Terminated(SystemExit):
    """SIGTERM came; its line is written."""


_SIGNALS: dict[type[BaseException], int] = {KeyboardInterrupt: signal.SIGINT, _Terminated: signal.SIGTERM}
"""Exceptions of signals."""
_AGAIN_SECONDS = 0.05
"""Until a signal comes again that was raised where no exception is heard."""
_EXIT_SECONDS = 2.0
"""Time for a process whose job has failed to end by itself."""

_MODULES = {"import": "import_weights", "export": "export_weights"}
"""Modules of jobs that are not named as the job is (`import` is a keyword of Python)."""


def main(argv: list[str] | None = None) -> int:
    """Runs the job that `argv` (default: the arguments of the process) names and returns its exit code."""
    alone = argv is None
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    log.install(debug)
    if alone:
        sys.unraisablehook = _heard_again
    listed = "\n".join(f"  {job:10} {what}" for job, what in JOBS.items())
    usage = (
        f"usage: python -m glip_jax JOB [options]\n\njobs:\n{listed}\n\n"
        "python -m glip_jax JOB --help: its options and an example\n"
        f"--debug, with any job: the traceback of every error, and more of the log\n{exit_codes.SHORT}"
    )
    if not argv or argv[0] in ("-h", "--help"):
        try:
            print(usage, file=sys.stdout if argv else sys.stderr, flush=True)
        except BrokenPipeError as error:
            return errors.report("glip_jax", error)
        return exit_codes.DONE if argv else exit_codes.BAD_INPUT
    # libtpu reads it when jax starts.
    os.environ["LIBTPU_INIT_ARGS"] = libtpu_arguments(os.environ.get("LIBTPU_INIT_ARGS", ""))
    job, *rest = argv
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(JOBS)}"
        logger.error(f"unknown job {job!r}; {hint}")
        return exit_codes.BAD_INPUT
    if job != "doctor":
        mismatches = environment.mismatches()
        if absent := environment.absent(mismatches):
            logger.error(f"{job}: {absent}")
            return exit_codes.BAD_INPUT
        if mismatches:
            logger.warning(environment.warning(mismatches))
    try:
        code = _run(job, rest)
    except Exception:
        if alone:
            _end_soon(exit_codes.UNEXPECTED)
        raise
    if alone and code != exit_codes.DONE:
        _end_soon(code)
    return code


def _end_soon(code: int) -> None:
    """Ends the process soon if it does not end by itself: threads of a library may wait, for minutes, for what failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    timer = threading.Timer(_EXIT_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _run(job: str, argv: list[str]) -> int:
    """The job's exit code. The one handler of errors: jobs raise, and `errors.report` says why they end."""
    runtime.job_began = time.time()
    try:
        if not {"-h", "--help"}.intersection(argv):  # help needs no storage, whose libraries take time to load
            from glip_jax.io import fsspec_gcs

            fsspec_gcs.install()
        with _sigterm_exits(job):
            try:
                return importlib.import_module(f"glip_jax.cli.{_MODULES.get(job, job)}").main(argv)
            finally:
                sys.stdout.flush()  # here, where an error is handled
    except (Exception, KeyboardInterrupt) as raised:
        error = _signal_in(raised) or raised
        if isinstance(error, _Terminated):
            raise error from None
        if errors.exit_code_of(error) == exit_codes.UNEXPECTED:
            raise
        return errors.report(job, error)
    finally:
        runtime.job_began = None


def _signal_in(error: BaseException | None) -> BaseException | None:
    """The exception of a signal that a library took for a fault of its own and raised another for."""
    while error is not None and type(error) not in _SIGNALS:
        error = error.__cause__ or error.__context__
    return error


def _heard_again(fault: "sys.UnraisableHookArgs") -> None:
    """What a signal raises in a callback of the garbage collector goes no further: the signal has to come once more."""
    number = _SIGNALS.get(fault.exc_type)
    if number is not None:
        again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    # Parts of a checkpoint that end after its event loop, which failed or was left: many tracebacks without information.
    elif str(fault.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(fault)


@contextlib.contextmanager
def _sigterm_exits(job: str) -> Iterator[None]:
    """SIGTERM raises SystemExit, so that the job removes what is half-made, instead of ending the process at once.

    Training has a handler of its own within its steps, which saves first.
    """
    own = os.getpid()

    def leave(number: int, _: FrameType | None) -> None:
        if os.getpid() != own:  # a forked worker, which its pool ends so
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        logger.error(f"{job}: stopped by SIGTERM; nothing is half-made, give the same command again")
        raise _Terminated(exit_codes.PREEMPTED)

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
