"""Patience with a storage: a request is made again until it succeeds, would never succeed, or time is up.

    GLIP_JAX_STORAGE_PATIENCE  seconds from the first fault of a request until it is given up; 600
    GLIP_JAX_STORAGE_SILENCE   seconds without a byte after which a connection is taken for dead; 30

Everything in a bucket is asked for this way (`glip_jax.io.gcs`).
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

__all__ = ["StorageError", "number", "with_retries", "told"]

_T = TypeVar("_T")

_PASSES = (408, 425, 429, 500, 502, 503, 504)
"""Codes that Google asks to try again after (cloud.google.com/storage/docs/retry-strategy); 425 is RFC 8470's."""


class StorageError(UserError, OSError):
    """The storage did not answer in time, or refuses; `strerror` says what it said last, `filename` which file."""


def told(error: StorageError) -> str:
    """The error in a line: which file, what happened."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def number(name: str, default: float) -> float:
    """The positive number in the environment variable `name`; StorageError for anything else."""
    text = os.environ.get(name, "")
    with contextlib.suppress(ValueError):
        value = float(text) if text else default
        if 0 < value < float("inf"):
            return value
    raise StorageError(errno.EINVAL, f"the environment variable {name} is {text!r}: expected a positive number")


def with_retries(place: str, attempt: Callable[[], _T]) -> _T:
    """What an attempt returns, the first that succeeds; `place` is what it is about.

    Raises FileNotFoundError where the storage says so, StorageError for what no other attempt would mend and when
    GLIP_JAX_STORAGE_PATIENCE ends, and whatever is no fault of the storage.
    """
    pause, attempts, until = 0.1, 0, 0.0
    while True:
        attempts += 1
        try:
            return attempt()
        except StorageError:
            raise
        except Exception as error:
            _refused(error, place)
            now = time.monotonic()
            until = until or now + number("GLIP_JAX_STORAGE_PATIENCE", 600.0)
            if now + pause > until:
                raise StorageError(
                    errno.ETIMEDOUT,
                    f"the storage failed {attempts} times in a row, then patience ended (last: {_said(error)}); give the "
                    "same command again when it answers, or raise GLIP_JAX_STORAGE_PATIENCE (seconds)",
                    place,
                ) from error
        time.sleep(pause * random.uniform(0.5, 1))  # spreads hosts in time, decides nothing
        pause = min(pause * 2, 30.0)


def _refused(error: Exception, place: str) -> None:
    """Raises what another attempt would not mend."""
    code = getattr(error, "code", None)
    kinds = {kind.__module__.partition(".")[0] + "." + kind.__name__ for kind in type(error).__mro__}
    if code == 404:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from None
    if code in (401, 403):
        raise StorageError(errno.EACCES, f"the storage refuses ({_said(error)}): check account and bucket", place)
    if "google.DefaultCredentialsError" in kinds:
        why = (
            "no credentials of Google were found: `gcloud auth application-default login`, or a machine with an account"
        )
        raise StorageError(errno.EACCES, why, place) from error
    passing = (ConnectionError, TimeoutError, http.client.HTTPException)
    if isinstance(error, passing) or code in _PASSES or kinds & _PASSING:
        return
    if isinstance(code, int) or isinstance(error, OSError) or "google.GoogleAPIError" in kinds:
        raise StorageError(getattr(error, "errno", None) or errno.EIO, _said(error), place) from error
    raise error


_PASSING = {
    "google.DataCorruption",  # the bytes are not those of the storage's checksum
    "google.RetryError",
    "google.TransportError",  # on the way to the server of tokens
    "google.RefreshError",
    "requests.RequestException",
    "urllib3.HTTPError",
}
"""Families of errors, by package and name, that say that something broke on the way."""


def _said(error: BaseException) -> str:
    """An error of a library in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
