"""Retries of storage requests: what is asked again, for how long, and what is said in the end."""

import time

import pytest
from google.api_core.exceptions import Forbidden, NotFound, ServiceUnavailable

from glip_jax.io.retry import StorageError, with_retries


def _failing(*errors):
    """An attempt that fails with each of `errors`, then succeeds; and the list of what it raised."""
    left, raised = list(errors), []

    def attempt():
        if left:
            raised.append(left.pop(0))
            raise raised[-1]
        return "done"

    return attempt, raised


def test_transient_errors_are_asked_again():
    attempt, raised = _failing(ServiceUnavailable("busy"), ConnectionResetError(), TimeoutError())
    assert with_retries("gs://b/x", attempt) == "done" and len(raised) == 3


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NotFound("gone"), FileNotFoundError, "gs://b/x"),
        (Forbidden("no"), StorageError, "the storage refuses"),
        (IsADirectoryError(21, "is one"), StorageError, "is one"),
        (ZeroDivisionError("ours"), ZeroDivisionError, "ours"),
        (StorageError(5, "said before"), StorageError, "said before"),
    ],
)
def test_what_no_retry_mends_is_raised_at_once(error, kind, message):
    attempt, raised = _failing(error, error)
    with pytest.raises(kind, match=message):
        with_retries("gs://b/x", attempt)
    assert len(raised) == 1


def test_the_time_for_retries_begins_with_the_first_error(monkeypatch):
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "0.4")
    calls = []

    def late():
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.5)  # as the upload of a large file
            raise ConnectionResetError
        return "done"

    assert with_retries("gs://b/x", late) == "done"
    attempt, raised = _failing(*[ServiceUnavailable("busy")] * 1000)
    with pytest.raises(StorageError, match=r"failed (\d+) times in a row.*last: 503 busy") as caught:
        with_retries("gs://b/x", attempt)
    assert (
        caught.value.filename == "gs://b/x" and f"failed {len(raised)} times" in str(caught.value) and len(raised) > 1
    )
