"""The exit code and the message of whatever ends a job.

`glip_jax.__main__` handles the errors of every job with `report`; the processes of a cluster tell one another `exit_code_of`.
"""

import errno
import logging
import sys
import traceback

from glip_jax import UserError
from glip_jax.cli import log
from glip_jax.distributed import exit_codes
from glip_jax.io.errors import full_disk
from glip_jax.io.retry import StorageError, describe

__all__ = ["exit_code_of", "message_of", "report"]

logger = logging.getLogger(__name__)

_PATH_ERRORS = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EROFS,
    errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
"""What the system says of a path that cannot be used as the user wants it."""


def exit_code_of(error: BaseException) -> int:
    """The exit code (`glip_jax.distributed.exit_codes`) of a job that `error` ends."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else exit_codes.UNEXPECTED
        case KeyboardInterrupt():
            return exit_codes.CANCELLED
        case StorageError():
            return exit_codes.STORAGE_UNAVAILABLE if error.errno == errno.ETIMEDOUT else exit_codes.BAD_INPUT
        case UserError():
            return error.exit_code
        case BrokenPipeError() if log.is_unread():
            return exit_codes.OUTPUT_CLOSED
        case OSError() if full_disk(error):
            return exit_codes.NOT_WRITTEN
        case OSError() if error.filename and error.errno in _PATH_ERRORS:
            return exit_codes.BAD_INPUT
    return exit_codes.BAD_INPUT if _out_of_memory(error) else exit_codes.UNEXPECTED


def message_of(error: BaseException) -> str:
    """The error in one line: what is wrong and what to do."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C; nothing is half-made, the same command goes on"
    if _out_of_memory(error):
        return (
            f"the memory of a device is too small ({_one_line(error)[:200]}): give fewer images (train.batch_size, "
            "evaluation.batch_size), model.remat=blocks, or more of mesh.fsdp; `python -m glip_jax plan` says what fits"
        )
    if isinstance(error, StorageError):
        return describe(error)
    if isinstance(error, OSError) and not isinstance(error, UserError):
        path = f" ({error.filename})" if error.filename else ""
        if full := full_disk(error):
            return f"{full}{path}: make room, then give the same command again"
        return f"{error.strerror}{path}: expected a file or folder that can be used"
    return _one_line(error)


def report(job: str, error: BaseException) -> int:
    """Logs why `job` ends and returns its exit code.

    An error that is the user's to mend gives one line, `JOB: message`; under --debug, and of every other error, the
    traceback comes before it. Where nobody reads the output, nothing is printed.
    """
    code = exit_code_of(error)
    if code == exit_codes.OUTPUT_CLOSED:
        log.discard_unread()
        return code
    if code == exit_codes.UNEXPECTED or log.debugging():
        logger.error("".join(traceback.format_exception(error)).rstrip())
    if code != exit_codes.UNEXPECTED:
        logger.error(f"{job}: {message_of(error)}")
    return code


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was too small, for the program or as it ran."""
    jax = sys.modules.get("jax")  # without it there is no such error
    markers = ("RESOURCE_EXHAUSTED", "Ran out of memory")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and any(m in str(error) for m in markers)


def _one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines())
