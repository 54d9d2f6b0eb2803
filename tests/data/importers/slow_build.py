"""The job `data` with pictures that take their time: for tests that kill it. Worker processes import this as well."""

import sys
import time
from typing import Any

from glip_jax.data.importers import entry
from tests.run_job import run_job

__all__: list[str] = []

_real = entry._picture


def _slowly(*arguments: Any) -> Any:
    time.sleep(0.05)
    return _real(*arguments)


entry._picture = _slowly

if __name__ == "__main__":
    sys.exit(run_job("data", sys.argv[1:]))
