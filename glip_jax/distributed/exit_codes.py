"""Exit codes of every job, for users and restart loops.

    0    done
    1    unexpected: a traceback was printed; please report it
    2    bad input: command, settings, files, checkpoint or environment; one line says what to correct
    3    the loss is not finite: nothing after the newest checkpoint was saved; the same command would fail again
    69   a storage (gs://) did not answer within the time for retries: the same command resumes
    74   what the job writes could not be written (disk full, quota): the newest checkpoint is intact; make room
    75   stopped by SIGTERM, state saved: give the same command again
    76   another process of the job (or a worker of data.workers) died: the newest checkpoint is intact; the same command resumes
    134  the same (SIGABRT), noticed by jax's heartbeat
    130  stopped by Ctrl-C, state saved as well: the same command resumes
    141  what reads the output has ended, as in `| head`: nothing is printed

A loop that survives preemptions:  until python -m glip_jax train ...; do [ $? = 75 ] || break; done
"""

__all__ = [
    "BAD_INPUT",
    "CANCELLED",
    "DONE",
    "PEER_LOST",
    "NOT_FINITE",
    "NOT_WRITTEN",
    "OUTPUT_CLOSED",
    "PREEMPTED",
    "SHORT",
    "STORAGE_UNAVAILABLE",
    "UNEXPECTED",
]

DONE = 0
UNEXPECTED = 1
BAD_INPUT = 2
NOT_FINITE = 3
STORAGE_UNAVAILABLE = 69
"""EX_UNAVAILABLE of sysexits.h."""
NOT_WRITTEN = 74
"""EX_IOERR of sysexits.h."""
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h."""
PEER_LOST = 76
"""EX_PROTOCOL of sysexits.h."""
CANCELLED = 130
"""128 + SIGINT, as in shells."""
OUTPUT_CLOSED = 141
"""128 + SIGPIPE."""

SHORT = (
    "exit codes: 0 done, 2 bad input, 3 loss not finite, 69 storage does not answer, 74 cannot write (disk full), "
    "75 stopped by SIGTERM (saved: run again), 76 (or 134, SIGABRT) another process died (run all again), 130 stopped by Ctrl-C (saved), 141 output not read (| head), 1 unexpected"
)
"""The table in one line, for --help."""
