"""Retries of storage requests: a request is repeated until it succeeds, cannot succeed, or the time for retries is over.

    GLIP_JAX_STORAGE_RETRY_SECONDS  seconds from the first error of a request until it is given up; 600
    GLIP_JAX_STORAGE_TIMEOUT        seconds without a byte after which a connection counts as dead; 30

Both have an older name that is read until version 1.0: GLIP_JAX_STORAGE_PATIENCE, GLIP_JAX_STORAGE_SILENCE. Every request to a
bucket goes through `with_retries` (see `glip_jax.io.gcs`).
"""

import contextlib
import errno
import http.client
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from glip_jax import UserError

__all__ = ["StorageError", "describe", "environment_number", "retry_seconds", "timeout", "with_retries"]

_T = TypeVar("_T")

_OLD_NAMES = {
    "GLIP_JAX_STORAGE_RETRY_SECONDS": "GLIP_JAX_STORAGE_PATIENCE",
    "GLIP_JAX_STORAGE_TIMEOUT": "GLIP_JAX_STORAGE_SILENCE",
}

_TRANSIENT_CODES = (408, 425, 429, 500, 502, 503, 504)
"""HTTP codes that Google asks to retry (cloud.google.com/storage/docs/retry-strategy); 425 is from RFC 8470."""

_TRANSIENT_ERRORS = {
    "google.DataCorruption",  # the bytes do not have the checksum of the storage
    "google.RetryError",
    "google.TransportError",  # on the way to the token server
    "google.RefreshError",
    "requests.RequestException",
    "urllib3.HTTPError",
}
"""Base classes of transient errors, by package and name; their modules are not imported for this."""

_MAX_PAUSE = 30.0
"""Seconds between two attempts, at most."""


class StorageError(UserError, OSError):
    """The storage did not answer in time, or refuses; `strerror` is its last message, `filename` the file."""


def describe(error: StorageError) -> str:
    """The error in one line: file and message."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def retry_seconds() -> float:
    """GLIP_JAX_STORAGE_RETRY_SECONDS."""
    return environment_number("GLIP_JAX_STORAGE_RETRY_SECONDS", 600.0)


def timeout() -> float:
    """GLIP_JAX_STORAGE_TIMEOUT, in seconds."""
    return environment_number("GLIP_JAX_STORAGE_TIMEOUT", 30.0)


def environment_number(name: str, default: float) -> float:
    """The positive number in the environment variable `name` (or its older name); StorageError for any other text."""
    if name not in os.environ and _OLD_NAMES.get(name, "") in os.environ:
        name = _OLD_NAMES[name]
    text = os.environ.get(name, "")
    with contextlib.suppress(ValueError):
        value = float(text) if text else default
        if 0 < value < float("inf"):
            return value
    raise StorageError(errno.EINVAL, f"the environment variable {name} is {text!r}: expected a positive number")


def with_retries(place: str, attempt: Callable[[], _T]) -> _T:
    """Calls `attempt` until it succeeds, and returns its result; `place` is the file or folder, for messages.

    Pauses grow from 0.1 to 30 s and are randomised, so that many hosts do not ask at the same moment.

    Raises:
        FileNotFoundError: the storage answered that the file does not exist.
        StorageError: the storage refuses, or GLIP_JAX_STORAGE_RETRY_SECONDS are over.
        Exception: any other error of `attempt` that does not come from the storage.
    """
    pause, attempts, deadline = 0.1, 0, 0.0
    while True:
        attempts += 1
        try:
            return attempt()
        except StorageError:
            raise
        except Exception as error:
            _raise_unless_transient(error, place)
            now = time.monotonic()
            deadline = deadline or now + retry_seconds()
            if now + pause > deadline:
                raise StorageError(
                    errno.ETIMEDOUT,
                    f"the storage failed {attempts} times in a row, then the time for retries was over (last: {_line(error)}); "
                    "give the same command again when it answers, or raise GLIP_JAX_STORAGE_RETRY_SECONDS",
                    place,
                ) from error
        time.sleep(pause * random.uniform(0.5, 1))  # affects no result
        pause = min(pause * 2, _MAX_PAUSE)


def _raise_unless_transient(error: Exception, place: str) -> None:
    """Raises what a retry cannot mend."""
    code = getattr(error, "code", None)
    kinds = {kind.__module__.partition(".")[0] + "." + kind.__name__ for kind in type(error).__mro__}
    if code == 404:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from None
    if code in (401, 403):
        raise StorageError(errno.EACCES, f"the storage refuses ({_line(error)}): check account and bucket", place)
    if "google.DefaultCredentialsError" in kinds:
        reason = (
            "no credentials of Google were found: `gcloud auth application-default login`, or a machine with an account"
        )
        raise StorageError(errno.EACCES, reason, place) from error
    transient = (ConnectionError, TimeoutError, http.client.HTTPException)
    if isinstance(error, transient) or code in _TRANSIENT_CODES or kinds & _TRANSIENT_ERRORS:
        return
    if isinstance(code, int) or isinstance(error, OSError) or "google.GoogleAPIError" in kinds:
        raise StorageError(getattr(error, "errno", None) or errno.EIO, _line(error), place) from error
    raise error


def _line(error: BaseException) -> str:
    """The text of an error in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
