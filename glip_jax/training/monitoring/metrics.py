"""Metrics of a run: gathered over windows of steps, read from `metrics.jsonl`, shown as a progress bar or plain lines.

`glip_jax.training.monitoring.writer` writes them.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from glip_jax.config import current_names
from glip_jax.io.workdir import workdir_path, write_atomic
from glip_jax.training.monitoring.goodput import lost

__all__ = ["Progress", "Window", "cut_back", "read"]

logger = logging.getLogger(__name__)

_COUNTS = ("examples", "positives", "corrupt", "dropped", "unknown_tokens")
_LATEST = ("rate", "text_rate")


class Window:
    """Means and sums of per-step metrics since the last `take`.

    Counts (examples, positives, corrupt, unknown_tokens, dropped…) and seconds are summed, of rates the latest is taken, everything
    else is a mean over steps. The losses of a source are means over the steps in which it had examples.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._begin = time.perf_counter()

    @property
    def steps(self) -> int:
        """Steps since the last `take`."""
        return self._steps

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds the scalars of one step."""
        self._steps += 1
        for name, value in metrics.items():
            value = float(value)
            source, loss, _ = name.partition("/loss/")
            if loss and not metrics[f"{source}/examples"]:
                continue
            self._sums[name] = value if name in _LATEST else self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, int | float]:
        """The metrics of the window, with `steps`, `seconds` and `images_per_second`; starts the next window."""
        result: dict[str, int | float] = {}
        for name, value in self._sums.items():
            parts = name.split("/")
            if name in _LATEST:
                result[name] = value
            elif parts[-1] in _COUNTS or parts[-2:-1] == ["dropped"]:
                result[name] = int(value)
            elif parts[-1].endswith("seconds"):
                result[name] = round(value, 4)
            else:
                result[name] = value / self._counts[name]
        seconds = time.perf_counter() - self._begin
        result |= {"steps": self._steps, "seconds": round(seconds, 4)}
        result["images_per_second"] = round(result.get("examples", 0) / seconds, 4)
        self.__init__()
        return result


def read(workdir: str, times: bool = False) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl under today's names; a last line that a kill cut off is left out.

    So are damaged lines, as a loss of power leaves them: a warning names them. `times`: also the lines that hold times alone
    (`glip_jax.training.monitoring.goodput`).
    """
    lines, damaged = _read(workdir)
    if damaged:
        logger.warning("%s: %s: left out", workdir_path(workdir) / "metrics.jsonl", _named(damaged))
    return [line for line in lines if times or "goodput" not in line]


def cut_back(workdir: str, step: int, also: Sequence[str] = ()) -> list[str]:
    """Removes the lines after `step` from metrics.jsonl, adds the lines of `also` that it lacks, and returns all lines.

    The times of what is removed stay, at `step`: the run took them.
    A local file is written under another name and renamed; an object in a bucket is replaced as a whole. Damaged lines are set
    aside in metrics.jsonl.damaged; a warning names them.
    """
    lines, damaged = _read(workdir)
    path = workdir_path(workdir) / "metrics.jsonl"
    if damaged:
        aside = path.parent / "metrics.jsonl.damaged"
        before = aside.read_bytes() if aside.exists() else b""
        aside.write_bytes(before + b"".join(line + b"\n" for line in damaged.values()))
        logger.warning("%s: %s: set aside in %s", path, _named(damaged), aside)
    lines += [line for text in also if (line := current_names(json.loads(text))) not in lines]
    lines = [line if line["step"] <= step else lost(line, step) for line in lines]
    lines = sorted((line for line in lines if line is not None), key=lambda line: line["step"])
    kept = [json.dumps(line) + "\n" for line in lines]
    if path.exists() or kept:
        write_atomic(path, "".join(kept))
    return kept


def _read(workdir: str) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The lines that are whole, and by their number those that are not."""
    path = workdir_path(workdir) / "metrics.jsonl"
    texts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    lines: list[dict[str, Any]] = []
    damaged: dict[int, bytes] = {}
    for number, text in enumerate(texts, start=1):
        try:
            # Blocks that never reached the disk are zeros; what was appended after them is whole.
            line = current_names(json.loads(text.lstrip(b"\0").decode()))
            if type(line["step"]) is not int:
                raise ValueError
            lines.append(line)
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged[number] = text
    return lines, damaged


def _named(damaged: Mapping[int, bytes]) -> str:
    number, text = next(iter(damaged.items()))
    start = text[:40].decode(errors="replace").replace("\0", "\\0")
    more = f", and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
    return f"line {number} is damaged ({start!r}){more}"


class Progress:
    """A progress bar in a terminal, a plain line per window elsewhere; nothing where `quiet` (all processes but the first)."""

    def __init__(self, start: int, total: int, quiet: bool = False) -> None:
        self._total, self._quiet = total, quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        """Counts a finished step."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed
                self._bar.update(1)

    def log(self, text: str) -> None:
        """Logs a line."""
        if not self._quiet:
            logger.info(text)

    def window(self, step: int, metrics: Mapping[str, int | float], sources: Sequence[str]) -> None:
        """Shows the metrics of a window: beside the bar, or as a line."""
        shown = {"loss": metrics["loss"], "grad": metrics["gradient_norm"], "img/s": metrics["images_per_second"]}
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
            return
        parts = [
            f"{name.removeprefix('loss/')} {value:.4f}" for name, value in metrics.items() if name.startswith("loss/")
        ]
        parts += [f"{name} {metrics.get(f'source/{name}/examples', 0):.0f} ex" for name in sources if len(sources) > 1]
        dropped = sum(value for name, value in metrics.items() if name.startswith("dropped/"))
        parts += [f"positives {metrics['positives']:.0f}", f"dropped {dropped:.0f}", f"grad {shown['grad']:.3f}"]
        parts += [f"rate {metrics['rate']:.2e}", f"{shown['img/s']:.2f} img/s"]
        parts += [f"mfu {100 * metrics['mfu']:.1f} %"] if "mfu" in metrics else []
        parts += [f"wait {metrics.get('wait_seconds', 0):.1f} s"]
        self.log(f"step {step}/{self._total}  loss {shown['loss']:.4f}  " + "  ".join(parts))

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
