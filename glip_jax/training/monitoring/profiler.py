"""Profiles of chosen steps, by `jax.profiler`."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from glip_jax.io import gcs
from glip_jax.training.monitoring.watchdog import WriteFile

__all__ = ["Profiler"]


class Profiler:
    """Profiles chosen steps of this process and its devices.

    `chosen`: first and last step, or (). `write_file` takes the profile's files where `folder` is in a bucket; None: this
    process profiles nothing.
    """

    def __init__(
        self, folder: epath.Path, chosen: tuple[int, ...], write_file: WriteFile | None, log: Callable[[str], None]
    ) -> None:
        self._folder, self._write_file, self._log = folder / "tensorboard", write_file, log
        self._remote = gcs.is_remote(folder)
        self._first, self._last = chosen if chosen and write_file is not None else (0, 0)
        self._local = ""
        """Where the trace that is being recorded is written; empty: none is."""

    def start_if_due(self, step: int, requested: int = 0) -> None:
        """Starts a trace if one begins with `step`. `requested`: number of steps from this one on that are wanted too."""
        if requested and not self._local:
            self._first, self._last = step, step + requested - 1
        if step == self._first:
            self._local = tempfile.mkdtemp() if self._remote else str(self._folder)
            jax.profiler.start_trace(self._local)

    def ends(self, step: int, last: bool) -> bool:
        """Whether the trace that is being recorded ends with `step`; `last`: the run ends with it."""
        return bool(self._local) and (last or step >= self._last)

    def stop(self, step: int) -> None:
        """Stops the trace and writes it; the devices have finished `step`."""
        jax.profiler.stop_trace()
        local, self._local = Path(self._local), ""
        if self._remote and self._write_file is not None:
            for path in sorted(local.rglob("*")):
                if path.is_file():
                    self._write_file(f"tensorboard/{path.relative_to(local)}", path.read_bytes())
            shutil.rmtree(local)
        self._log(f"steps {self._first} to {step} are profiled: tensorboard --logdir={self._folder}, or xprof")
