"""Writes what a run records, in a thread of its own, so that no step ever waits for a disk or a bucket.

    WORKDIR/metrics.jsonl     one JSON object a line, {"step": 120, "loss": 1.2, ...}; steps never go back
    WORKDIR/tensorboard/      the same scalars as event files (written without TensorFlow)

On resume both are cut back to the restored step, so a run that was killed reads like one that was not. A bucket cannot append: there
the lines are kept and the whole small file is sent every half minute, at every checkpoint and at the end. What was not written when a
checkpoint is saved goes into the checkpoint (`unwritten`), so a kill loses no line before it.
"""

import contextlib
import hashlib
import importlib
import json
import math
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from glip_jax.config import Config, ConfigError
from glip_jax.io import gcs
from glip_jax.io.workdir import opened, plain
from glip_jax.training.monitoring.metrics import cut_back

__all__ = ["Writer", "wandb_module", "wandb_run"]

_SECONDS = 30
"""Between two sendings to a bucket."""

_MOST = 10_000
"""Lines and files that may wait; more are dropped and counted."""

Sink = Callable[[int, Mapping[str, int | float]], None]


class Writer:
    """Appends to the two records of `workdir`, cut back to `step` first. Use as a context manager.

    `also`: the lines that a checkpoint kept (`unwritten`), put where they are missing; `sink`: another receiver of the numbers;
    `say`: where complaints go. A disk that cannot be written raises its OSError at the next call; a bucket that does not answer
    is said and tried again, and at the end what is missing there lies in a local folder that is named.
    """

    def __init__(
        self,
        workdir: str,
        step: int,
        also: Sequence[str] = (),
        sink: Sink | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._folder = opened(workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remote, self._sink, self._say = gcs.is_remote(workdir), sink, say
        self._lines = cut_back(workdir, step, also)
        self._local = Path(tempfile.mkdtemp() if self._remote else workdir) / "tensorboard"
        self._local.mkdir(parents=True, exist_ok=True)
        # Names hold whole seconds only: without the suffix a quick second start would overwrite the first one's file.
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and then the next numbers wait for ever.
        self._events = EventsWriter(str(self._local / "events"), f".{time.time_ns()}")
        # TensorBoard hides what it read at this step or later.
        self._events.write_event(
            Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self._waiting: deque[tuple[int, str, Any]] = deque()
        """(step, line, numbers), or (0, name, bytes) of a file."""
        self._unwritten: deque[str] = deque()
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closing, self._now, self._dropped = False, False, 0
        self._error: OSError | None = None
        self._behind = ""
        self._sent = time.monotonic()
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
            self._say(
                f"{self._folder}: {self._dropped} windows of numbers were dropped, as nothing could be written for long"
            )
        if self._remote:
            self._leave()
        if self._error is not None and kind is None:
            raise self._error

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        """One line and its events, at once or later; numbers that are not finite are written as strings, which JSON can hold.

        Never waits. Raises the OSError of an earlier line that a disk refused.
        """
        plain = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, **plain}) + "\n"
        self._add((step, line, dict(metrics)))

    def file(self, name: str, data: bytes) -> None:
        """A file of the working folder, as `write`; a later one of the same name replaces it."""
        self._add((0, name, data))

    def flush(self) -> None:
        """Asks for everything to be sent now; does not wait."""
        self._now = True
        self._wake.set()

    def unwritten(self) -> list[str]:
        """The lines that are not known to lie in metrics.jsonl yet."""
        with self._lock:
            return list(self._unwritten)

    def _add(self, item: tuple[int, str, Any]) -> None:
        if self._error is not None:
            raise self._error
        if len(self._waiting) >= _MOST:
            if not self._dropped:
                self._say(
                    f"{self._folder} takes no more numbers: {_MOST} wait, from here on they are dropped and counted"
                )
            self._dropped += 1
            return
        if isinstance(item[2], dict):
            with self._lock:
                self._unwritten.append(item[1])
        self._waiting.append(item)
        self._wake.set()

    def _work(self) -> None:
        """The thread: what waits is written; to a bucket, together and not at once."""
        files: dict[str, bytes] = {}
        while True:
            self._wake.wait(_SECONDS)
            closing = self._closing  # before the queue is looked at: nothing comes after it was set
            self._wake.clear()
            try:
                fresh = self._drain(files)
                if self._remote:
                    if closing or self._now or fresh or time.monotonic() - self._sent > _SECONDS:
                        self._send(files)
            except OSError as error:
                self._error = error
                return
            if closing:
                return

    def _drain(self, files: dict[str, bytes]) -> bool:
        """Takes what waits; a disk gets it here. True if a file is among it, which is not kept back."""
        fresh = False
        while self._waiting:
            step, text, content = self._waiting.popleft()
            if isinstance(content, bytes):
                fresh = True
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
            values = [Summary.Value(tag=name, simple_value=value) for name, value in content.items()]
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()
            self._tell(step, content)
        return fresh

    def _tell(self, step: int, numbers: Mapping[str, int | float]) -> None:
        if self._sink is None:
            return
        try:
            self._sink(step, numbers)
        except Exception as error:  # somebody else's service; the run's own records go on
            self._sink = None
            self._say(
                f"the numbers go to wandb no longer: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            )

    def _written(self, number: int) -> None:
        with self._lock:
            for _ in range(number):
                self._unwritten.popleft()

    def _send(self, files: dict[str, bytes]) -> None:
        """Everything that is new, to the bucket; if that fails it is said, and stays to be sent."""
        self._now, count = False, len(self._lines)
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
                gcs.send(path, f"{self._folder}/tensorboard/{path.name}")
            if self._behind:
                self._say(f"{self._folder}: the numbers are all there again")
            self._behind = ""
        except (gcs.StorageError, FileNotFoundError) as error:
            reason = gcs.told(error) if isinstance(error, gcs.StorageError) else str(error)
            self._behind = f"{self._folder}: numbers could not be sent ({reason})"
            if not self._closing:
                self._say(f"{self._behind}; the run goes on and tries again")
        self._sent = time.monotonic()

    def _leave(self) -> None:
        """The local copy goes, or is named where the bucket lacks something."""
        if not self._behind and self._error is None:
            for path in self._local.iterdir():
                path.unlink()
            self._local.rmdir()
            self._local.parent.rmdir()
            return
        (self._local.parent / "metrics.jsonl").write_text("".join(self._lines))
        print(f"{self._behind or self._error}; all of them lie in {self._local.parent}", file=sys.stderr, flush=True)


def wandb_module(project: str) -> Any:
    """The library of Weights & Biases, None without a `project`. ConfigError if it is not installed."""
    if not project:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"train.wandb is {project!r}, but wandb is not there ({error}): pip install -r requirements-wandb.txt, or leave it empty"
        ) from None


@contextlib.contextmanager
def wandb_run(wandb: Any, workdir: str, config: Config) -> Iterator[Sink | None]:
    """What hands numbers to the project `config.train.wandb`, None without a `wandb_module`; a run that goes on is the same run
    there.

    Where they go is W&B's own business (WANDB_MODE=offline, WANDB_DIR, WANDB_API_KEY).
    """
    if wandb is None:
        yield None
        return
    identity = hashlib.sha256(gcs.address(workdir).encode()).hexdigest()[:16]
    try:
        run = wandb.init(
            project=config.train.wandb, name=config.name, id=identity, resume="allow", config=plain(config)
        )
    except getattr(wandb, "Error", Exception) as error:
        raise ConfigError(
            f"train.wandb is {config.train.wandb!r}, but W&B begins no run ({' '.join(str(error).split())[:200]}): wandb login, "
            "or WANDB_MODE=offline, or leave it empty"
        ) from None
    try:
        yield lambda step, numbers: run.log(dict(numbers), step=step)
    finally:
        run.finish()
