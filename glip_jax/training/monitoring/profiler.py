"""Profiles of chosen steps, by `jax.profiler`."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from glip_jax.io import gcs
from glip_jax.training.monitoring.watchdog import Keep

__all__ = ["Profiler"]


class Profiler:
    """Profiles of chosen steps, by `jax.profiler`, of this process and its devices.

    `chosen`: first and last step, or nothing; `keep` takes the files where `folder` is in a bucket.
    """

    def __init__(self, folder: epath.Path, chosen: tuple[int, ...], keep: Keep, say: Callable[[str], None]) -> None:
        self._folder, self._keep, self._say = folder / "tensorboard", keep, say
        self._remote = gcs.is_remote(folder)
        self._first, self._last = chosen or (0, 0)
        self._local = ""

    def before(self, step: int, asked: int = 0) -> None:
        """Begins where a profile begins with `step`; `asked`: so many steps from here on are wanted as well."""
        if asked and not self._local:
            self._first, self._last = step, step + asked - 1
        if step == self._first:
            self._local = tempfile.mkdtemp() if self._remote else str(self._folder)
            jax.profiler.start_trace(self._local)

    def ends(self, step: int, last: bool) -> bool:
        """Whether the one that is being made ends with `step`, the `last` of the run or not."""
        return bool(self._local) and (last or step >= self._last)

    def end(self, step: int) -> None:
        """Ends it; the results of `step` are there."""
        jax.profiler.stop_trace()
        local, self._local = Path(self._local), ""
        if self._remote:
            for path in sorted(local.rglob("*")):
                if path.is_file():
                    self._keep(f"tensorboard/{path.relative_to(local)}", path.read_bytes())
            shutil.rmtree(local)
        self._say(f"steps {self._first} to {step} are profiled: tensorboard --logdir={self._folder}, or xprof")
