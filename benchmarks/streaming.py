"""Seconds until the first batch of many shards, and resident memory over many steps of the mixture.

A detection source of 1,000 generated shards (10 records each) and one of captions with phrases. Prints the seconds from opening the
folders to the first batch, in a process that has not read them before, then draws 10,000 batches of 8 and prints the resident memory
every 500; memory is flat if it grows in the last half by no more than the spread of its readings.

    python -m benchmarks.streaming --steps 10000
"""

import argparse
import io
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHARDS, RECORDS, SIDE, BATCH = 1000, 10_000, 96, 8


def _make(folder: Path) -> None:
    """Writes the shards of both sources."""
    from glip_jax.data import shards
    from glip_jax.data.records import Record, boxes_array
    from glip_jax.data.scenes.backgrounds import background

    pictures = []
    for i in range(50):
        stream = io.BytesIO()
        Image.fromarray(background(np.random.default_rng(i), SIDE, SIDE).astype(np.uint8)).save(stream, "JPEG")
        pictures.append(stream.getvalue())
    names = tuple(f"thing {number}" for number in range(80))
    boxes = boxes_array([(5, 6, 40, 50), (30, 20, 90, 80)])

    def named(i: int) -> Record:
        return Record(str(i), "detection", pictures[i % 50], SIDE, SIDE, boxes, (i % 80, (i * 7) % 80))

    def grounding_record(i: int) -> Record:
        text = f"a thing number {i} beside another"
        return Record(str(i), "grounding", pictures[i % 50], SIDE, SIDE, boxes, (), text, (((2, 7),), ((8, 14),)))

    shards.write(map(named, range(RECORDS)), folder / "named", name="named", names=names, shards=SHARDS)
    shards.write(
        map(grounding_record, range(RECORDS // 10)), folder / "grounding", name="grounding", shards=SHARDS // 10
    )


def _resident() -> int:
    """Resident memory of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _read(folder: Path, steps: int) -> None:
    """Runs the benchmark."""
    from configs.demo import get_config
    from glip_jax.config import Config, DataConfig, SourceConfig, TrainConfig
    from glip_jax.data.mixture import Mixture

    sources = {name: SourceConfig(str(folder / name)) for name in ("named", "grounding")}
    data = DataConfig(sources=sources, short_sides=(SIDE,), long_side=SIDE, aspects=(1.0,), threads=2, prefetch=4)
    config = Config(name="streaming", model=get_config().model, data=data, train=TrainConfig(batch_size=BATCH))
    start = time.perf_counter()
    batches = Mixture(config).batches()
    next(batches)
    print(f"{SHARDS + SHARDS // 10} shards: first batch {time.perf_counter() - start:.2f} s after opening them")
    readings = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        next(batches)
        if step % max(1, steps // 20) == 0:
            readings.append(_resident() / 2**20)
            print(
                f"step {step:6}: {readings[-1]:7.1f} MiB, {step / (time.perf_counter() - start):5.0f} batches/s",
                flush=True,
            )
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    half = np.array(readings[len(readings) // 2 :])
    growth = np.polyfit(np.arange(len(half)), half, 1)[0] * (len(half) - 1)
    print(f"the last half: {half.min():.1f} to {half.max():.1f} MiB, {growth:+.1f} MiB by a fitted line")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        context = multiprocessing.get_context("spawn")
        for work in ((_make, (Path(scratch),)), (_read, (Path(scratch), asked.steps))):
            process = context.Process(target=work[0], args=work[1])
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)
