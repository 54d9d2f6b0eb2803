"""Times reading of training data from a bucket and from the local disk: the same records, and the same batches.

Sides: `far`, an emulator on loopback that delays every response by 20 ms, like the storage of a region; `near`, the emulator
without delay; `local`, the folder. Modes: `read-cold`, 128 records in random order by eight threads with an empty cache;
`read-warm`, the same records from the cache; `batches-cold` and `batches-warm`, 12 batches of 8 on canvases of short side 480. The
256 records are noise JPEGs of 480 x 640 in four shards. The emulator runs on the same cores.

`own_far`, `own_near`: the records alone, by the gs:// of array_record's own reader in place of the cache; `read-cold` opens the shards anew,
`read-warm` has them open.
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from benchmarks.alternating import Runs, Settings, main
from glip_jax.config import Config, DataConfig, ModelConfig, SourceConfig, TextConfig, TrainConfig
from glip_jax.data import shards
from glip_jax.data.mixture import Mixture
from glip_jax.data.records import Record, boxes_array
from glip_jax.io import gcs

__all__: list[str] = []

_ROOT = Path(__file__).resolve().parents[1]
_RECORDS, _READ, _STEPS = 256, 128, 12
_MODES = ("read-cold", "read-warm", "batches-cold", "batches-warm")


def _records() -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for i in range(_RECORDS):
        coarse = rng.integers(0, 256, (60, 80, 3), np.uint8)
        noisy = cv2.resize(coarse, (640, 480)).astype(np.int16) + rng.integers(-12, 13, (480, 640, 3))
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(np.clip(noisy, 0, 255).astype(np.uint8)), quality=85)
        yield Record(str(i), "detection", data, 480, 640, boxes_array([(10, 10, 200, 300)]), (i % 2,))


def _server(delay: str) -> None:
    """Starts the emulator in a process of its own, and configures this process to use it."""
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.io.faulty_storage", delay], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert running.stdin is not None
    assert running.stdout is not None
    atexit.register(running.wait)
    atexit.register(running.stdin.close)
    for line in iter(running.stdout.readline, ""):
        if line.startswith("#"):
            return
        if found := re.match(r"export (\w+)=(.*)", line):
            os.environ[found[1]] = found[2]
    raise SystemExit("the storage did not start: pip install -r requirements-test.txt")


def _side(delay: str | None) -> Callable[[Settings], Runs]:
    def side(settings: Settings) -> Runs:
        root = Path(tempfile.mkdtemp(prefix="bucket-benchmark-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        os.environ["GLIP_JAX_CACHE"] = str(root / "cache")
        place = str(root / "set")
        shards.write(_records(), place, name="set", names=["one", "other"], shards=4)
        if delay is not None:
            _server(delay)
            gcs.upload_files({path.name: path for path in Path(place).iterdir()}, "gs://bucket/set", "manifest.json")
            place = "gs://bucket/set"
        vocabulary = str(_ROOT / "tests" / "fixtures" / "vocab_tiny1.txt")
        mixture = Mixture(
            Config(
                model=ModelConfig(text=TextConfig(vocabulary=vocabulary, vocabulary_size=512, max_tokens=64)),
                data=DataConfig(sources={"set": SourceConfig(place)}, short_sides=(480,), long_side=800, threads=8),
                train=TrainConfig(batch_size=8),
            )
        )
        order = np.random.default_rng(1).permutation(_RECORDS)[:_READ].tolist()
        opened = mixture.shards[0]

        def read() -> None:
            with ThreadPoolExecutor(8) as pool:
                if not all(pool.map(opened.read, order)):
                    raise SystemExit("a record is empty")

        def batches() -> None:
            drawn = mixture.batches()
            if not all(batch.valid.all() for batch in islice(drawn, _STEPS)):
                raise SystemExit("a batch has a placeholder")
            drawn.close()  # pyright: ignore[reportAttributeAccessIssue]

        def cold(run: Callable[[], None]) -> Callable[[], None]:
            def runs() -> None:
                shutil.rmtree(root / "cache", ignore_errors=True)
                run()

            return runs

        del settings  # the number of threads is that of the pinned cores
        return dict(zip(_MODES, (cold(read), read, cold(batches), batches)))

    return side


def _own_reader(delay: str) -> Callable[[Settings], Runs]:
    def side(settings: Settings) -> Runs:
        del settings
        root = Path(tempfile.mkdtemp(prefix="bucket-benchmark-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        shards.write(_records(), root / "set", name="set", names=["one", "other"], shards=4)
        _server(delay)
        names = {path.name: path for path in (root / "set").iterdir()}
        gcs.upload_files(names, "gs://bucket/set", "manifest.json")
        # Google's C++ client has a variable of its own for the emulator.
        os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = os.environ["STORAGE_EMULATOR_HOST"]
        from array_record.python.array_record_module import ArrayRecordReader

        files = sorted(f"gs://bucket/set/{name}" for name in names if name.endswith(".array_record"))
        order = np.random.default_rng(1).permutation(_RECORDS)[:_READ].tolist()
        opened: list[ArrayRecordReader] = []

        def warm() -> None:
            if not opened:
                opened.extend(ArrayRecordReader(file) for file in files)
            where = [(number, row) for number, reader in enumerate(opened) for row in range(reader.num_records())]
            if len(where) != _RECORDS:
                raise SystemExit(f"array_record found {len(where)} records, expected {_RECORDS}")
            with ThreadPoolExecutor(8) as pool:
                if not all(pool.map(lambda i: opened[where[i][0]].read([where[i][1]])[0], order)):
                    raise SystemExit("a record is empty")

        def cold() -> None:
            opened.clear()
            warm()

        return {"read-cold": cold, "read-warm": warm}

    return side


if __name__ == "__main__":
    sides = {
        "far": _side("0.02"),
        "near": _side("0"),
        "local": _side(None),
        "own_far": _own_reader("0.02"),
        "own_near": _own_reader("0"),
    }
    main("benchmarks.bucket", __doc__ or "", sides, _MODES)
