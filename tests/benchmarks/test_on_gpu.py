"""What the measurement on a GPU makes of a trace and of its runs."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import on_gpu


def test_kernels_are_those_of_the_chip_by_time(tmp_path: Path) -> None:
    names = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
    ]
    events = [
        {"ph": "X", "pid": pid, "name": name, "dur": dur}
        for pid, name, dur in [(1, "a", 3000), (1, "b", 5000), (1, "a", 4000), (2, "host", 90_000)]
    ]
    (tmp_path / "x.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": names + events}).encode()))
    assert on_gpu.kernels(tmp_path, steps=2) == [
        {"kernel": "a", "ms": 3.5, "calls": 1, "share": pytest.approx(7 / 12)},
        {"kernel": "b", "ms": 2.5, "calls": 0.5, "share": pytest.approx(5 / 12)},
        {"kernel": "all", "ms": 6.0, "calls": 1.5, "share": 1.0},
    ]


def test_a_row_has_the_median_and_the_share_of_the_peak_or_the_error() -> None:
    found = [{"seconds": seconds, "peak": 2**30} for seconds in (0.4, 0.1, 0.2)]
    row = on_gpu._row(found, None, "glip_jax", "step", 4, "NVIDIA H200")
    assert row["images_per_second"] == 20
    assert row["mfu"] * 989 * 0.2 / 4 == pytest.approx(3.0, rel=0.05)  # TFLOP an image
    assert "| 4 | step | glip_jax | 200.0 | 100.0 to 400.0 | 20.00 |" in on_gpu._markdown(row)
    failed = on_gpu._row([], "out of memory", "mm_grounding_dino", "step", 16, "NVIDIA H200")
    assert on_gpu._markdown(failed) == "| 16 | step | mm_grounding_dino | out of memory | | | | |"
