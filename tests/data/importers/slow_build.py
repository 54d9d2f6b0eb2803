"""Runs the job `data` with slow image loading, for tests that kill it. Worker processes import this module too."""

import sys
import time
from typing import Any

from glip_jax.data.importers import entry
from tests.run_job import run_job

__all__: list[str] = []

_load_image = entry._load_image


def _delayed(*arguments: Any) -> Any:
    time.sleep(0.05)
    return _load_image(*arguments)


entry._load_image = _delayed

if __name__ == "__main__":
    sys.exit(run_job("data", sys.argv[1:]))
