"""The job `benchmark` in a process of its own, with the stand-in for checkpoint and detector, or with NETWORK=yes with a network.

KILL=block or KILL=predictions: it kills itself while it writes the second block, or the predictions.
"""

import os
import signal
import sys

import pytest

from glip_jax.__main__ import main
from glip_jax.evaluation.benchmark import blocks, predict
from tests.evaluation.benchmark.stand_in import small, stand_in


def _killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _half_written(path, content):
    if path.name == "block_00001.npz":
        (path.parent / f"{path.name}.unfinished").write_bytes(content[: len(content) // 2])
        _killed()
    blocks_write(path, content)


if __name__ == "__main__":
    blocks_write = blocks.write_atomic
    with pytest.MonkeyPatch.context() as patch:
        small(patch) if os.environ.get("NETWORK") else stand_in(patch)
        match os.environ.get("KILL"):
            case "block":
                patch.setattr(blocks, "write_atomic", _half_written)
            case "predictions":
                patch.setattr(predict, "prediction_rows", _killed)
        sys.exit(main(["benchmark", *sys.argv[1:]]))
