"""The job `label` with an outside teacher that takes its time: for tests that run several, and kill them."""

import sys
import time
from typing import Any

from glip_jax.jobs.label import main
from glip_jax.labeling.outside import OutsideTeacher

__all__: list[str] = []

_real = OutsideTeacher.answers


def _slowly(*arguments: Any) -> Any:
    time.sleep(0.05)
    return _real(*arguments)


OutsideTeacher.answers = _slowly  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
