"""Throughput of a run and where its time goes: metrics of each window of steps, beside the losses.

step_seconds                  mean time of a step, without what is listed below
images_per_second_per_chip    images_per_second over the number of devices
mfu                           model FLOPs utilization: FLOPs of the images (`glip_jax.training.monitoring.flops`, forward and backward) over what the
                              chips can do at their published bfloat16 peak in the time of the steps; absent where no peak is known
compile_seconds, checkpoint_seconds, evaluation_seconds, profile_seconds    time in which no step ran; absent if 0
memory_bytes, memory_peak_bytes    of the fullest device of this process; absent where jax does not report it, as on CPUs
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from glip_jax.config import Config
from glip_jax.training.monitoring.chips import chip_of
from glip_jax.training.monitoring.flops import flops_per_image

__all__ = ["Throughput"]


class Throughput:
    """Counts of one window; `take` starts the next one."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._model, self._batch, self._devices = config.model, config.train.batch_size, mesh.size
        chip = chip_of(mesh.devices.flat[0].device_kind)
        self._peak = chip.flops * mesh.size if chip else 0.0
        self._excluded: defaultdict[str, float] = defaultdict(float)
        self._flops = 0.0
        self._per_image: dict[tuple[int, ...], float] = {}

    @contextlib.contextmanager
    def exclude(self, what: str) -> Iterator[None]:
        """Excludes the time of this block from the step time and records it as `what`_seconds."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._excluded[what] += time.perf_counter() - begin

    def step(self, canvas: tuple[int, ...], tokens: int) -> None:
        """Counts a dispatched step on images of `canvas` (height, width) with prompts of `tokens`."""
        height, width = canvas
        key = (height, width, tokens)
        if self._peak and key not in self._per_image:
            self._per_image[key] = flops_per_image(self._model, height, width, tokens).training
        self._flops += self._batch * self._per_image.get(key, 0.0)

    def take(self, window: Mapping[str, int | float]) -> dict[str, int | float]:
        """The metrics that go with those of `Window.take`."""
        stepping = max(1e-9, window["seconds"] - sum(self._excluded.values()))
        result: dict[str, int | float] = {
            "step_seconds": round(stepping / max(1, window["steps"]), 6),
            "images_per_second_per_chip": round(window["images_per_second"] / self._devices, 6),
        }
        if self._peak:
            result["mfu"] = self._flops / stepping / self._peak
        self._flops = 0.0
        return result | self.take_excluded() | _memory()

    def take_excluded(self) -> dict[str, int | float]:
        """The seconds of `exclude` since the last line."""
        result = {f"{what}_seconds": round(seconds, 4) for what, seconds in self._excluded.items()}
        self._excluded.clear()
        return result


def _memory() -> dict[str, int | float]:
    stats = [report for device in jax.local_devices() if (report := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {name: max(each[key] for each in stats) for name, key in names.items() if stats and key in stats[0]}
