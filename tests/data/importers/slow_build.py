"""The job `data` with pictures that take their time: for tests that kill it. Worker processes import this as well."""

import sys
import time
from typing import Any

from glip_jax.cli.data import main
from glip_jax.data.importers import entry

__all__: list[str] = []

_real = entry._picture


def _slowly(*arguments: Any) -> Any:
    time.sleep(0.05)
    return _real(*arguments)


entry._picture = _slowly

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
