"""Writes the metrics and files of a run in a thread, so that no step waits for a disk or a bucket.

    WORKDIR/metrics.jsonl     one JSON object a line, {"step": 120, "time": 1767225600.1, "loss": 1.2, ...}; steps never go back
    WORKDIR/tensorboard/      the same scalars as event files (written without TensorFlow)

On resume both are cut back to the restored step, so the records of a run that was killed look like those of one that was not. An
object in a bucket cannot be appended to: there the lines are kept in memory, and the whole small file is uploaded every half minute, at
every checkpoint and at the end. Lines that are not written yet when a checkpoint is saved go into the checkpoint (`unwritten`), so a
kill loses no line before it.
"""

import contextlib
import hashlib
import importlib
import json
import logging
import math
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glip_jax.config import Config, ConfigError
from glip_jax.io import gcs
from glip_jax.io.workdir import flat_settings, workdir_path
from glip_jax.training.monitoring.metrics import cut_back

__all__ = ["Writer", "wandb_module", "wandb_run"]

logger = logging.getLogger(__name__)

_UPLOAD_SECONDS = 30
"""Between two uploads to a bucket."""

_MAX_QUEUED = 10_000
"""Lines and files in the queue; more are dropped and counted."""

Sink = Callable[[int, Mapping[str, int | float]], None]
"""Takes (step, metrics) for another service."""


class Writer:
    """Appends to the metrics of `workdir`, cut back to `step` first. Use as a context manager.

    `also`: lines from the checkpoint (`unwritten`), added where they are missing. `sink` takes the metrics too. `log` takes messages.
    The OSError of a disk that cannot be written is raised by the next call. A bucket that does not answer is reported and tried
    again; what it lacks at the end is left in a local folder, and a message names that folder.
    """

    def __init__(
        self,
        workdir: str,
        step: int,
        also: Sequence[str] = (),
        sink: Sink | None = None,
        log: Callable[[str], None] = logger.info,
    ) -> None:
        self._folder = workdir_path(workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remote, self._sink, self._log = gcs.is_remote(workdir), sink, log
        self._lines = cut_back(workdir, step, also)
        self._local = Path(tempfile.mkdtemp() if self._remote else workdir) / "tensorboard"
        self._local.mkdir(parents=True, exist_ok=True)
        # Here, because tensorboardX imports torch where it is installed, which takes seconds that other jobs do not need.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        # The names of event files hold whole seconds: without the suffix a second start in the same second overwrites the file.
        # Not tensorboardX's SummaryWriter: a full disk ends its thread, and then the next event waits for ever.
        self._events = EventsWriter(str(self._local / "events"), f".{time.time_ns()}")
        # TensorBoard hides earlier events of this step and later ones.
        self._events.write_event(
            Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self._queue: deque[tuple[int, str, Any]] = deque()
        """(step, line, numbers), or (0, name, bytes) of a file."""
        self._unwritten: deque[str] = deque()
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closing, self._upload_now, self._dropped = False, False, 0
        self._error: OSError | None = None
        self._missing = ""
        """Why the bucket lacks something; empty: it lacks nothing."""
        self._uploaded = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._events.close()
        if self._dropped:
            self._log(
                f"{self._folder}: {self._dropped} windows of metrics were dropped, because nothing could be written for a long time"
            )
        if self._remote:
            self._remove_local()
        if self._error is not None and kind is None:
            raise self._error

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        """Queues one line and its events. Values that are not finite are written as strings, because JSON has no number for them.

        Never waits. Raises the OSError of an earlier line that the disk refused.
        """
        plain = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **plain}) + "\n"
        self._add((step, line, dict(metrics)))

    def times(self, step: int, kind: str, seconds: Mapping[str, float]) -> None:
        """Queues a line of times alone (`glip_jax.training.monitoring.goodput`), of which there are no events. As `write`."""
        line = json.dumps({"step": step, "goodput": kind, "time": round(time.time(), 3), **seconds}) + "\n"
        self._add((step, line, {}))

    def file(self, name: str, data: bytes) -> None:
        """Queues a file of the working folder, as `write`; a later one of the same name replaces it."""
        self._add((0, name, data))

    def flush(self) -> None:
        """Starts an upload of everything that is queued; does not wait for it."""
        self._upload_now = True
        self._wake.set()

    def unwritten(self) -> list[str]:
        """The lines that may not be in metrics.jsonl yet."""
        with self._lock:
            return list(self._unwritten)

    def _add(self, item: tuple[int, str, Any]) -> None:
        if self._error is not None:
            raise self._error
        if len(self._queue) >= _MAX_QUEUED:
            if not self._dropped:
                self._log(
                    f"{self._folder} takes no more metrics: {_MAX_QUEUED} are queued, from here on they are dropped and counted"
                )
            self._dropped += 1
            return
        if isinstance(item[2], dict):
            with self._lock:
                self._unwritten.append(item[1])
        self._queue.append(item)
        self._wake.set()

    def _work(self) -> None:
        """The thread: writes what is queued; uploads to a bucket at intervals."""
        files: dict[str, bytes] = {}
        while True:
            self._wake.wait(_UPLOAD_SECONDS)
            closing = self._closing  # read before the queue: nothing is queued after it was set
            self._wake.clear()
            try:
                has_file = self._drain(files)
                if self._remote:
                    if closing or self._upload_now or has_file or time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
                        self._upload(files)
            except OSError as error:
                self._error = error
                return
            if closing:
                return

    def _drain(self, files: dict[str, bytes]) -> bool:
        """Empties the queue; writes to a local disk. True if a file was queued, which is uploaded without delay."""
        has_file = False
        while self._queue:
            step, text, content = self._queue.popleft()
            if isinstance(content, bytes):
                has_file = True
                if self._remote:
                    files[text] = content
                else:
                    (self._folder / text).write_bytes(content)
                continue
            if self._remote:
                self._lines.append(text)
            else:
                with (self._folder / "metrics.jsonl").open("a") as file:
                    file.write(text)
                self._written(1)
            if not content:  # times alone
                continue
            from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

            values = [Summary.Value(tag=name, simple_value=value) for name, value in content.items()]
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()
            self._send_to_sink(step, content)
        return has_file

    def _send_to_sink(self, step: int, metrics: Mapping[str, int | float]) -> None:
        if self._sink is None:
            return
        try:
            self._sink(step, metrics)
        except Exception as error:  # a failure of another service does not stop the run
            self._sink = None
            self._log(
                f"metrics are no longer sent to wandb: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            )

    def _written(self, number: int) -> None:
        with self._lock:
            for _ in range(number):
                self._unwritten.popleft()

    def _upload(self, files: dict[str, bytes]) -> None:
        """Uploads everything new to the bucket. A failure is reported, and the next upload tries again."""
        self._upload_now, count = False, len(self._lines)
        try:
            gcs.put(f"{self._folder}/metrics.jsonl", "".join(self._lines).encode())
            with self._lock:
                new = set(self._lines[:count])
                while self._unwritten and self._unwritten[0] in new:
                    self._unwritten.popleft()
            for name in list(files):
                gcs.put(f"{self._folder}/{name}", files[name])
                del files[name]
            for path in self._local.iterdir():
                gcs.upload_file(path, f"{self._folder}/tensorboard/{path.name}")
            if self._missing:
                self._log(f"{self._folder}: all metrics are uploaded again")
            self._missing = ""
        except (gcs.StorageError, FileNotFoundError) as error:
            reason = gcs.describe(error) if isinstance(error, gcs.StorageError) else str(error)
            self._missing = f"{self._folder}: metrics could not be uploaded ({reason})"
            if not self._closing:
                self._log(f"{self._missing}; the run continues and tries again")
        self._uploaded = time.monotonic()

    def _remove_local(self) -> None:
        """Removes the local copy, or names it in a message if the bucket lacks something."""
        if not self._missing and self._error is None:
            shutil.rmtree(self._local.parent, ignore_errors=True)
            return
        self._local.parent.mkdir(parents=True, exist_ok=True)  # a cleaner of temporary files may have been there
        (self._local.parent / "metrics.jsonl").write_text("".join(self._lines))
        logger.warning(f"{self._missing or self._error}; all of them are in {self._local.parent}")


def wandb_module(project: str) -> Any:
    """The module of Weights & Biases, None without a `project`. Raises ConfigError if it is not installed."""
    if not project:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"train.wandb is {project!r}, but wandb cannot be imported ({error}): pip install -r requirements-wandb.txt, or leave it empty"
        ) from None


@contextlib.contextmanager
def wandb_run(wandb: Any, workdir: str, config: Config) -> Iterator[Sink | None]:
    """Logs to the project `config.train.wandb`; yields None if `wandb` (see `wandb_module`) is None. A resumed run is the same run
    there.

    W&B's environment variables apply: WANDB_MODE=offline, WANDB_DIR, WANDB_API_KEY.
    """
    if wandb is None:
        yield None
        return
    identity = hashlib.sha256(gcs.address(workdir).encode()).hexdigest()[:16]
    try:
        run = wandb.init(
            project=config.train.wandb, name=config.name, id=identity, resume="allow", config=flat_settings(config)
        )
    except getattr(wandb, "Error", Exception) as error:
        raise ConfigError(
            f"train.wandb is {config.train.wandb!r}, but W&B starts no run ({' '.join(str(error).split())[:200]}): wandb login, "
            "or WANDB_MODE=offline, or leave it empty"
        ) from None
    try:
        yield lambda step, metrics: run.log(dict(metrics), step=step)
    finally:
        run.finish()
