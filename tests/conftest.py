"""Setting of every test: CPU, eight fake devices, a persistent compilation cache, shapes and types checked at run time.

The variables are set before jax is imported and reach the processes that tests start, so these find the same cache.
"""

import collections
import fcntl
import gc
import importlib.util
import logging
import multiprocessing.process
import os
import re
import signal
import subprocess
from pathlib import Path

import hypothesis
import pytest

_ROOT = Path(__file__).resolve().parents[1]

# Eight devices; and programs that run once need not be optimised. Compiling a Swin of five blocks forward and backward takes
# 16 s of CPU without these flags, 8.5 s at level 0, and 2.5 s with XLA's older emitters of fusions, which give the same numbers.
# The preset takes another quarter of the time of a network.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_parallel_codegen_split_count": "1",  # the processes of pytest keep the cores busy; parts cost a tenth
}
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_name}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tracing makes objects by the million and few cycles: with Python's own threshold the collector takes a seventh of the time.
gc.set_threshold(200_000, 20, 100)
# A shell starts what runs in the background with Ctrl-C ignored, and whatever that starts inherits it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and types of arrays are checked in tests only; outside the annotations cost nothing. Only packages of arrays: the
# hook over all of glip_jax took 25 s of CPU a process. It must stand before glip_jax is imported.
_ARRAYS = (
    "structures", "models", "inference", "evaluation", "data.images", "data.transforms", "data.examples", "data.negatives",
    "data.records", "training.assignment", "training.losses", "training.optimizer", "training.step", "training.state",
)  # fmt: skip
install_import_hook([f"glip_jax.{name}" for name in _ARRAYS], "beartype.beartype")

from glip_jax.cli import log  # noqa: E402

# What a marked test takes beside one that is not, roughly.
_WEIGHTS = {"compiles": 10, "processes": 5, "slow": 10, "long": 2}

# A machine under load is no failure; the examples count, not their time.
hypothesis.settings.register_profile("glip_jax", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("glip_jax")


@pytest.fixture(autouse=True, scope="session")
def _terminal():
    """The log's lines on stdout and stderr as in a job."""
    log.install()


@pytest.fixture(autouse=True)
def _caplog():
    """caplog listens at the root logger, from which a job takes the log away."""
    logging.getLogger("glip_jax").propagate = True


def pytest_ignore_collect(collection_path, config):
    """A file whose tests all have a marker that is left out is not imported: torch, transformers and jax take seconds."""
    if collection_path.suffix != ".py":
        return None
    marks = re.findall(r"^pytestmark = pytest\.mark\.(\w+)$", collection_path.read_text(), re.MULTILINE)
    return True if any(f"not {mark}" in config.option.markexpr for mark in marks) else None


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that the processes end together; without libtpu nothing compiles for a TPU."""
    cost = collections.Counter()
    for item in items:
        if "running" in item.fixturenames:
            item.add_marker(pytest.mark.processes)
        cost[item.path] += sum(weight for mark, weight in _WEIGHTS.items() if item.get_closest_marker(mark))
        if item.get_closest_marker("tpu") and importlib.util.find_spec("libtpu") is None:
            item.add_marker(pytest.mark.skip("libtpu is not installed: scripts/test.sh --tpu"))
    items.sort(key=lambda item: -cost[item.path])


@pytest.fixture(autouse=True)
def _started_processes(request, monkeypatch):
    """Whatever starts a process says so, that scripts/test.sh --quick stays quick. (`git`, which tells the commit, may run.)"""
    if any(request.node.get_closest_marker(mark) for mark in ("processes", "slow", "tpu")):
        return
    popen, start = subprocess.Popen.__init__, multiprocessing.process.BaseProcess.start

    def refused(what):
        raise AssertionError(f"{what} is started: mark the test with @pytest.mark.processes")

    def guarded(self, args, *rest, **options):
        name = Path(os.fsdecode(args if isinstance(args, str | bytes | os.PathLike) else args[0])).name
        popen(self, args, *rest, **options) if name == "git" else refused(name)

    monkeypatch.setattr(subprocess.Popen, "__init__", guarded)
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess,
        "start",
        lambda self: refused("a process") if multiprocessing.parent_process() is None else start(self),
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A `tests.tiny_run.Run`, made once by whichever process of pytest comes first; nobody writes into it."""
    from tests import tiny_run

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "trained"
        return tiny_run.Run(made) if made.exists() else tiny_run.make(made)


@pytest.fixture(scope="module")
def running():
    """A storage on loopback, behind a proxy that can inject faults."""
    from tests.io.faulty_storage import Storage

    server = Storage()
    yield server
    server.close()
