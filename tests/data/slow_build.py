"""The job `data` with pictures that take their time: for tests that kill it. Worker processes import this as well."""

import sys
import time
from typing import Any

from glip_jax.data import entries
from glip_jax.jobs.data import main

__all__: list[str] = []

_real = entries._picture


def _slowly(*arguments: Any) -> Any:
    time.sleep(0.05)
    return _real(*arguments)


entries._picture = _slowly

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
