"""A local Ray cluster of two nodes: workers that are killed, a node that is lost, workers that die again and again, the same shards."""

import functools
import json
import os
import re
import shutil
import signal
import threading
import time

import pytest

from glip_jax.cli import label
from glip_jax.data import shards
from glip_jax.distributed import exit_codes
from glip_jax.distributed.ray_tasks import RayError, WorkerLostError, ray_workers
from tests import ray_worker
from tests.cli.test_label import captions
from tests.data.conftest import coco_json, write_image
from tests.run_job import run_job

pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-ray.txt")
pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def sigterm():
    """The handler of SIGTERM that this process had. Each node that is made here sets one of ray's."""
    return signal.getsignal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def _sigterm_as_before(sigterm):
    yield
    signal.signal(signal.SIGTERM, sigterm)


@pytest.fixture(scope="module")
def cluster(sigterm):
    """Two nodes of one core."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    made.add_node(**{**node, "include_dashboard": None})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Captions of sixty images in six files, detections, and what comes of them when one process labels in order."""
    folder = tmp_path_factory.mktemp("ray")
    captions(folder / "many", 60, 6, "many")
    names = {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    names |= {"images": [{"id": i, "file_name": f"{i}.png", "height": 50, "width": 100} for i in range(60)]}
    rows = [
        {"image_id": i, "category_id": c, "bbox": [10 * c, 5, 30, 30], "score": 0.4 + 0.01 * i}
        for i in range(60)
        for c in (1, 2)
    ]
    (folder / "names.json").write_text(json.dumps(names))
    (folder / "found.json").write_text(json.dumps(rows))
    assert run_job("label", command(folder, folder / "whole")) == 0
    return folder


def command(folder, out, *more):
    found = (f"--detections={folder / 'found.json'}", f"--categories={folder / 'names.json'}")
    return [folder / "many", *found, f"--out={out}", *more]


def files(folder):
    """The bytes of everything that does not tell of time."""
    names = {path.name for path in folder.iterdir()}
    assert names == {*shards.shard_files(6), "columns.npz", "manifest.json", "report.json", "report.html"}
    made = {name: (folder / name).read_bytes() for name in names - {"report.json", "report.html", "manifest.json"}}
    manifest = json.loads((folder / "manifest.json").read_text())
    summary = json.loads((folder / "report.json").read_text())["summary"]
    return made, manifest | {"command": "", "name": ""}, {k: v for k, v in summary.items() if k != "seconds"}


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Slow workers; the folder of their process ids."""
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setattr(label, "_worker", functools.partial(ray_worker.slow_labels, str(pids), label._worker))
    return pids


def in_between(out, what):
    """Starts a thread that calls `what` when a file of `out` is done and another one is at work."""

    def wait():
        end = time.monotonic() + 60
        while not (list(out.glob("records-*")) and list((out / ".partial").glob("*.writing"))):
            assert time.monotonic() < end
            time.sleep(0.01)
        what()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_worker_is_killed_and_the_shards_are_those_of_one_process(cluster, inputs, slow, tmp_path, capfd):
    out = tmp_path / "whole"
    killed = []

    def kill():
        killed.append(int(next(slow.glob("*.pid")).stem))
        os.kill(killed[0], signal.SIGKILL)

    thread = in_between(out, kill)
    assert run_job("label", command(inputs, out, f"--ray={cluster.address}")) == 0
    thread.join()
    printed = "".join(capfd.readouterr())
    assert killed and len(list(slow.glob("*.pid"))) >= 2
    assert re.search(r"2 machines; workers: 2 with CPU 1", printed)
    assert re.search(r"records-\S+: its worker died .* another one does it, time 2 of 3", printed)
    assert files(out) == files(inputs / "whole")


def test_an_import_on_the_cluster_gives_the_bytes_of_one_process(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        write_image(tmp_path / "pictures" / f"img{i}.png", 24, 32, i)
    (tmp_path / "pictures" / "img7.png").unlink()
    (tmp_path / "boxes.json").write_text(json.dumps(coco_json([(24, 32)] * 12)))
    given = ["coco", "boxes.json", "--images=pictures", "--shards=4", "--out=set"]
    assert run_job("data", [*given, "--processes=1"]) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    shutil.rmtree(tmp_path / "set")
    assert run_job("data", [*given, f"--ray={cluster.address}"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == whole and len(whole) == 7


@pytest.mark.slow
def test_the_tasks_of_a_lost_node_are_done_by_others(cluster, tmp_path):
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    def lose():
        while not (tmp_path / "stuck").exists():
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    names = [f"t{i}" for i in range(8)]
    make = functools.partial(ray_worker.by_node, str(tmp_path), node.node_id)
    handler = signal.getsignal(signal.SIGTERM)
    with ray_workers(cluster.address, make) as run:
        assert signal.getsignal(signal.SIGTERM) == handler, "a signal ends the job with its own exit code"
        done = list(run(names, lambda name: (name, f"{name} of here")))
    thread.join()
    assert sorted(done) == names and all((tmp_path / name).read_text() == f"{name} of here" for name in names)


@pytest.mark.slow
def test_a_task_at_which_workers_die_ends_the_job(cluster, tmp_path, caplog):
    names = [f"t{i}" for i in range(6)]
    make = functools.partial(ray_worker.by_node, str(tmp_path), dies="t3")
    words = "3 workers died at t3 .killed, or out of memory.*the same command"
    with ray_workers(cluster.address, make, by_core=True) as run, pytest.raises(WorkerLostError, match=words) as caught:
        list(run(names, lambda name: (name, "")))
    assert caught.value.exit_code == exit_codes.PEER_LOST and not (tmp_path / "t3").exists()
    assert caplog.text.count("t3: its worker died") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray-resources=TPU=4"], r"no machine of the cluster offers TPU 4 \(they offer CPU 1; CPU 1"),
        (["--threshold=0.6"], r"with other settings .*thresholds: \{\"many\": 0.5\} -> \{\"many\": 0.6\}"),
    ],
)
def test_what_a_cluster_refuses(cluster, inputs, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert run_job("label", command(inputs, out, "--part=1/6")) == 0
    assert run_job("label", command(inputs, out, f"--ray={cluster.address}", *flags)) == exit_codes.BAD_INPUT
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("label: ") and re.search(message, error)


class _Absent:
    """Pickled as what is imported from a module that is not there."""

    def __reduce__(self):
        return __import__, ("glip_absent",)

    def __call__(self):
        raise AssertionError("it cannot be read")


def test_a_machine_without_the_package_is_said(cluster):
    with ray_workers(cluster.address, _Absent()) as run, pytest.raises(RayError) as caught:
        list(run(["a"], str))
    assert "a machine of the cluster cannot import glip_absent: install the same glip_jax" in str(caught.value)


def _other_code(*_):
    return {"files": "0" * 64}


def test_other_code_on_a_machine_is_refused(cluster, inputs, tmp_path, capsys, monkeypatch):
    from glip_jax.io import provenance

    monkeypatch.setattr(provenance, "code", _other_code)
    assert run_job("label", command(inputs, tmp_path / "out", f"--ray={cluster.address}")) == exit_codes.BAD_INPUT
    assert "another glip_jax is installed (files " in capsys.readouterr().err


def test_no_ray_and_no_cluster(inputs, tmp_path, capsys, monkeypatch):
    for address, message in (
        ("127.0.0.1:9", "--ray=127.0.0.1:9: no cluster answers there"),
        ("ray", "--ray=ray: expected auto or HOST:PORT"),
        ("auto", "--ray=127.0.0.1:9: no cluster answers there"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", "" if address != "auto" else "127.0.0.1:9")
        assert run_job("label", command(inputs, tmp_path / "out", f"--ray={address}")) == exit_codes.BAD_INPUT
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_job("label", command(inputs, tmp_path / "out", "--ray=auto")) == exit_codes.BAD_INPUT
    assert "pip install -r requirements-ray.txt" in capsys.readouterr().err
