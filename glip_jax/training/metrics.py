"""Where numbers of a run go: `metrics.jsonl`, TensorBoard events, and a bar or plain lines for whoever watches.

    WORKDIR/metrics.jsonl     one JSON object a line, {"step": 120, "loss": 1.2, ...}; steps never repeat or go back
    WORKDIR/tensorboard/      the same scalars as event files (written without TensorFlow)

On resume both are cut back to the restored step, so a run that was killed reads like one that was not.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

__all__ = ["Progress", "Window", "Writer", "cut_back", "read"]

_COUNTS = ("examples", "positives", "corrupt", "dropped", "unknown_tokens")
_LAST = ("rate", "text_rate")
_UPLOAD_SECONDS = 30


class Window:
    """Means and sums of per-step metrics since the last `take`.

    Counts (examples, positives, corrupt, unknown_tokens, dropped…) and seconds are summed, rates are the latest, everything else is a
    mean over steps; the losses of a source are means over the steps in which it had examples.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._begin = time.perf_counter()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One step's scalars."""
        self._steps += 1
        for name, value in metrics.items():
            value = float(value)
            source, loss, _ = name.partition("/loss/")
            if loss and not metrics[f"{source}/examples"]:
                continue
            self._sums[name] = value if name in _LAST else self._sums.get(name, 0.0) + value
            self._seen[name] = self._seen.get(name, 0) + 1

    def take(self) -> dict[str, int | float]:
        """The window's numbers with `steps`, `seconds` and `images_per_second`; begins the next window."""
        result: dict[str, int | float] = {}
        for name, value in self._sums.items():
            parts = name.split("/")
            if name in _LAST:
                result[name] = value
            elif parts[-1] in _COUNTS or parts[-2:-1] == ["dropped"]:
                result[name] = int(value)
            elif parts[-1].endswith("seconds"):
                result[name] = round(value, 4)
            else:
                result[name] = value / self._seen[name]
        seconds = time.perf_counter() - self._begin
        result |= {"steps": self._steps, "seconds": round(seconds, 4)}
        result["images_per_second"] = round(result.get("examples", 0) / seconds, 4)
        self.__init__()
        return result


class Writer:
    """Appends to the two records of `workdir`, cut back to `step` first. Use as a context manager."""

    def __init__(self, workdir: str, step: int) -> None:
        self._folder = epath.Path(workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / "metrics.jsonl"
        # Object stores cannot append: there the lines are kept and the small file is written whole.
        self._lines = cut_back(workdir, step)
        self._remote = "://" in str(workdir)
        self._local = epath.Path(tempfile.mkdtemp()) if self._remote else self._folder / "tensorboard"
        # Names hold whole seconds only: without the suffix a quick second start would overwrite the first one's file.
        suffix = f".{time.time_ns()}"
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and then the next numbers wait for ever.
        self._local.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(self._local / "events"), suffix)
        # TensorBoard hides what it read at this step or later.
        self._events.write_event(
            Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self._written = 0.0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()
        if self._remote:
            self._upload()
            self._local.rmtree()

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        """One line and its events; numbers that are not finite are written as strings, which JSON can hold."""
        plain = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, **plain}) + "\n"
        if self._remote:
            self._lines.append(line)
            if time.monotonic() - self._written > _UPLOAD_SECONDS:
                self._upload()
        else:
            with self._path.open("a") as file:
                file.write(line)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()

    def _upload(self) -> None:
        self._path.write_text("".join(self._lines))
        target = self._folder / "tensorboard"
        target.mkdir(parents=True, exist_ok=True)
        for file in self._local.iterdir():
            file.copy(target / file.name, overwrite=True)
        self._written = time.monotonic()


def read(workdir: str) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; a last line that was cut off by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_back(workdir: str, step: int) -> list[str]:
    """Removes the lines after `step` from metrics.jsonl (by writing aside and renaming); returns those that stay."""
    kept = [json.dumps(line) + "\n" for line in read(workdir) if line["step"] <= step]
    path = epath.Path(workdir) / "metrics.jsonl"
    if path.exists():
        aside = epath.Path(workdir) / "metrics.jsonl.tmp"
        aside.write_text("".join(kept))
        aside.replace(path)
    return kept


class Progress:
    """A bar in a terminal, a plain line per window elsewhere; silent on all processes but the first."""

    def __init__(self, start: int, total: int, quiet: bool = False) -> None:
        self._total, self._quiet = total, quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        """One step was finished."""
        if self._bar is not None:
            self._bar.update(1)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._quiet:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def window(self, step: int, metrics: Mapping[str, int | float], sources: Sequence[str]) -> None:
        """Shows a window's numbers: beside the bar, or as a line."""
        shown = {"loss": metrics["loss"], "grad": metrics["gradient_norm"], "img/s": metrics["images_per_second"]}
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
            return
        parts = [
            f"{name.removeprefix('loss/')} {value:.4f}" for name, value in metrics.items() if name.startswith("loss/")
        ]
        parts += [f"{name} {metrics.get(f'source/{name}/examples', 0):.0f} ex" for name in sources if len(sources) > 1]
        dropped = sum(value for name, value in metrics.items() if name.startswith("dropped/"))
        parts += [f"positives {metrics['positives']:.0f}", f"dropped {dropped:.0f}", f"grad {shown['grad']:.3f}"]
        parts += [f"rate {metrics['rate']:.2e}", f"{shown['img/s']:.2f} img/s"]
        parts += [f"wait {metrics.get('wait_seconds', 0):.1f} s"]
        self.say(f"step {step}/{self._total}  loss {shown['loss']:.4f}  " + "  ".join(parts))

    def close(self) -> None:
        """Leaves the terminal's line."""
        if self._bar is not None:
            self._bar.close()
