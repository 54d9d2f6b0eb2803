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

_FIRST_PAUSE, _MAX_PAUSE = 0.1, 30.0
"""Seconds between two attempts, at most: after the first one, and ever."""


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

    Pauses (google.api_core.retry) grow to 30 s and are randomised, so that many hosts do not ask at the same moment.

    Raises:
        FileNotFoundError: the storage answered that the file does not exist.
        StorageError: the storage refuses, or GLIP_JAX_STORAGE_RETRY_SECONDS are over.
        Exception: any other error of `attempt` that does not come from the storage.
    """
    first: list[Exception] = []
    try:
        return attempt()
    except StorageError:
        raise
    except Exception as error:
        first.append(error)
    from google.api_core import exceptions, retry  # only now: most requests succeed

    def again() -> _T:
        if first:
            raise first.pop()
        return attempt()

    faults: list[Exception] = []
    # Made only now: the time for retries begins with the first error, however long that attempt took.
    policy = retry.Retry(_is_transient, _FIRST_PAUSE, _MAX_PAUSE, timeout=retry_seconds(), on_error=faults.append)
    try:
        return policy(again)()
    except exceptions.RetryError as error:
        raise StorageError(
            errno.ETIMEDOUT,
            f"the storage failed {len(faults)} times in a row, then the time for retries was over (last: {_line(faults[-1])}); "
            "give the same command again when it answers, or raise GLIP_JAX_STORAGE_RETRY_SECONDS",
            place,
        ) from error
    except StorageError:
        raise
    except Exception as error:
        _raise_named(error, place)
        raise


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may mend it."""
    if isinstance(error, StorageError):
        return False
    transient = (ConnectionError, TimeoutError, http.client.HTTPException)
    return (
        isinstance(error, transient)
        or getattr(error, "code", None) in _TRANSIENT_CODES
        or bool(_kinds(error) & _TRANSIENT_ERRORS)
    )


def _raise_named(error: Exception, place: str) -> None:
    """Raises what no retry can mend under the name of the file, if it comes from the storage."""
    code, kinds = getattr(error, "code", None), _kinds(error)
    if code == 404:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from None
    if code in (401, 403):
        raise StorageError(errno.EACCES, f"the storage refuses ({_line(error)}): check account and bucket", place)
    if "google.DefaultCredentialsError" in kinds:
        reason = (
            "no credentials of Google were found: `gcloud auth application-default login`, or a machine with an account"
        )
        raise StorageError(errno.EACCES, reason, place) from error
    if isinstance(code, int) or isinstance(error, OSError) or "google.GoogleAPIError" in kinds:
        raise StorageError(getattr(error, "errno", None) or errno.EIO, _line(error), place) from error


def _kinds(error: Exception) -> set[str]:
    """The classes of an error, by package and name."""
    return {kind.__module__.partition(".")[0] + "." + kind.__name__ for kind in type(error).__mro__}


def _line(error: BaseException) -> str:
    """The text of an error in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
