"""Several processes on loopback train as one: same batches, same parameters, a common stop, and the report of a death.

In all but two tests the network is the stand-in, which compiles in a second; data, loop, checkpoints and exits are the real ones.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from PIL import Image

from glip_jax.config import MeshConfig
from glip_jax.data.mixture import Mixture
from glip_jax.distributed import exit_codes
from glip_jax.distributed.cluster import Cluster, ProcessError, ProcessGroup, _Coordinator, announced, join
from glip_jax.distributed.mesh import MeshError, make_mesh
from glip_jax.io import checksums
from glip_jax.io.checkpoint import complete_steps, latest_step, open_checkpoint
from glip_jax.training import loop
from glip_jax.training.monitoring import metrics
from tests import tiny_run
from tests.distributed.worker import rows
from tests.run_job import run_job
from tests.training import stand_in
from tests.training.same_path import same_path

TIMEOUT = 900
"""Seconds for a job to end, on a loaded machine."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tiny_run.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def file(sources, tmp_path_factory):
    return tiny_run.config_file(tmp_path_factory.mktemp("config"), sources)


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Job:
    """Processes of one job, each with its own options and environment."""

    def __init__(self, file, workdir, number, devices, options=(), own=(), environment=()):
        where, own, environment = f"127.0.0.1:{_port()}", dict(own), dict(environment)
        self.processes, self.lines = [], [[] for _ in range(number)]
        for index in range(number):
            command = [sys.executable, "-m", "tests.distributed.worker", f"--config={file}", f"--workdir={workdir}",
                       "--config.train.log_every=1", f"--coordinator={where}", f"--processes={number}",
                       f"--index={index}", f"--patience={TIMEOUT}", *options, *own.get(index, ())]  # fmt: skip
            flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
            more = {"XLA_FLAGS": flags, **environment.get(index, {})}
            self.processes.append(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **more}
                )
            )
        self._threads = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(number)]
        for thread in self._threads:
            thread.start()

    def _read(self, index):
        for line in self.processes[index].stdout:
            self.lines[index].append(line.rstrip("\n"))

    def wait_for(self, index, line):
        end = time.monotonic() + TIMEOUT
        while not any(text.startswith(line) for text in self.lines[index]):
            assert time.monotonic() < end and self.processes[index].poll() is None, "\n".join(self.lines[index])
            time.sleep(0.05)

    def finish(self):
        """(exit codes, what each printed); kills what does not end."""
        try:
            codes = [process.wait(TIMEOUT) for process in self.processes]
        finally:
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        for thread in self._threads:
            thread.join(10)
        return codes, ["\n".join(lines) for lines in self.lines]


def _hashes(*texts):
    """Per batch, the examples' hashes over the processes in order."""
    found = [re.findall(r"^batch \d+: (.*)$", text, re.MULTILINE) for text in texts]
    return [" ".join(parts).split() for parts in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def straight(file, tmp_path_factory):
    """Two processes of four devices, undisturbed: workdir and logs."""
    workdir = tmp_path_factory.mktemp("straight")
    codes, logs = _Job(file, workdir, 2, 4, ("--config.mesh.fsdp=4",)).finish()
    assert codes == [0, 0], logs
    return workdir, logs


def _same_parameters(workdir, other):
    one, two = (open_checkpoint(str(folder), 6).parameters("raw") for folder in (workdir, other))
    same_path(tiny_run.config(), one, two, 6)


def _alone(sources, workdir, monkeypatch, mesh, devices):
    """The same run in this process."""
    stand_in.install(monkeypatch, devices)
    return _trained(sources, workdir, mesh)


def _trained(sources, workdir, mesh):
    config = dataclasses.replace(tiny_run.config(sources), mesh=mesh)
    return loop.train(config, str(workdir))


@pytest.mark.slow
def test_two_processes_equal_one(file, sources, straight, tmp_path, monkeypatch):
    _alone(sources, tmp_path / "one", monkeypatch, MeshConfig(data=1), 1)
    batches = Mixture(tiny_run.config(sources)).batches(patches=True)
    expected = [rows(next(batches)) for _ in range(6)]
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert _hashes(*straight[1]) == expected
    for text in straight[1]:
        assert "evaluated step 6, gathered [0, 1]" in text, "all processes evaluate, and get the results of all"
    _same_parameters(tmp_path / "one", straight[0])


@pytest.mark.slow
def test_two_processes_write_into_a_bucket_what_they_write_into_a_folder(
    file, straight, running, tmp_path, monkeypatch
):
    """Checkpoints in parts from both, numbers from the first, while requests fail."""
    place = running.fresh(monkeypatch, tmp_path / "cache", timeout=5.0, retry_seconds=120) + "/runs/one"
    with running.arm("503", "reset", share=0.03) as injected:
        codes, logs = _Job(file, place, 2, 4, ("--config.mesh.fsdp=4",)).finish()
    assert codes == [0, 0], logs
    assert set(injected) == {"503", "reset"}
    prints = [re.findall("fingerprint: (.*)", text) for text in (logs[0], straight[1][0])]
    assert prints[0] == prints[1] != []
    assert complete_steps(place) == [4, 6] and checksums.mismatch(f"{place}/checkpoints/6") == ""
    assert [line["step"] for line in metrics.read(place) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    _same_parameters(straight[0], place)


@pytest.mark.slow
def test_all_processes_learn_the_score_of_a_checkpoint(file, tmp_path):
    """The wait for a slow evaluation is no step that hangs."""
    best, pictures, annotations = tmp_path / "best.py", tmp_path / "pictures", tmp_path / "set.json"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "0.png")
    annotations.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "0.png", "height": 64, "width": 64}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 32, 32], "iscrowd": 0, "area": 1024}
                ],
                "categories": [{"id": 1, "name": "cat"}],
            }
        )
    )
    best.write_text(
        f"from glip_jax.config import EvaluationConfig, EvaluationSet\n"
        f"from tests import tiny_run\n\n"
        f"exec(open({str(file)!r}).read().replace('get_config', 'plain'))\n\n"
        f"def get_config():\n"
        f"    sets = {{'set': EvaluationSet({str(annotations)!r}, {str(pictures)!r})}}\n"
        f"    config = tiny_run.replace(plain(), 'evaluation', sets=sets)\n"
        f"    config = tiny_run.replace(config, 'checkpoint', every=2, keep=1, best=1, best_by='evaluation/set/AP')\n"
        f"    return tiny_run.replace(config, 'train', steps=16, evaluate_every=2, hang_multiple=1.5, hang_min=1.0)\n"
    )
    scores = {i: {"SCORES": "0.1 0.1 0.1 0.1 0.1 0.5 0.1 0.2"} for i in range(2)}
    codes, logs = _Job(best, tmp_path / "run", 2, 1, environment=scores).finish()
    assert codes == [0, 0], logs
    for text in logs:
        assert "scored step 12: 0.5" in text
        assert "it hangs" not in text
    assert complete_steps(str(tmp_path / "run")) == [12, 16]
    assert not [path for path in (tmp_path / "run").glob("stacks*") if path.stat().st_size]


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step_and_the_same_bits_follow(file, sources, straight, tmp_path, monkeypatch):
    """The run also resumes in one process, on other numbers of devices and another mesh."""
    go, mesh = tmp_path / "go", ("--config.mesh.fsdp=4",)
    job = _Job(file, tmp_path / "run", 2, 4, mesh, environment={1: {"PAUSE": f"3:{go}"}})
    job.wait_for(1, "paused")
    job.processes[1].send_signal(signal.SIGTERM)
    go.touch()
    codes, logs = job.finish()
    assert codes == [exit_codes.PREEMPTED] * 2, logs
    step = latest_step(str(tmp_path / "run"))
    assert step in (3, 4) and f"SIGTERM: saved step {step}" in logs[0]
    for devices, shape in ((1, MeshConfig()), (4, MeshConfig(data=2, fsdp=2)), (8, MeshConfig(data=8))):
        shutil.copytree(tmp_path / "run", tmp_path / f"on{devices}")
        _alone(sources, tmp_path / f"on{devices}", monkeypatch, shape, devices)
        _same_parameters(straight[0], tmp_path / f"on{devices}")
    codes, logs = _Job(file, tmp_path / "run", 2, 4, mesh).finish()
    assert codes == [0, 0] and f"resuming at step {step}" in logs[0], logs
    assert _hashes(*logs) == _hashes(*straight[1])[step:], "the same examples in the same order"
    prints = [re.findall("fingerprint: (.*)", text) for text in (logs[0], straight[1][0])]
    assert prints[0] == prints[1] != []


@pytest.mark.slow
def test_sigterm_to_one_leaves_the_evaluation_which_is_made_after_the_resume(file, tmp_path):
    """To one that has finished its share and waits for the other; the rest is `test_a_signal_to_one_ends_the_evaluation_of_all`'s."""
    options = ("--config.train.evaluate_every=3",)
    job = _Job(file, tmp_path / "run", 2, 1, options, environment={0: {"WAIT": str(tmp_path / "never")}})
    job.wait_for(0, "evaluating step 3")
    job.processes[1].send_signal(signal.SIGTERM)
    codes, logs = job.finish()
    assert codes == [exit_codes.PREEMPTED] * 2 and "SIGTERM: saved step 3" in logs[0], logs
    assert "evaluated step 3" not in logs[0] and latest_step(str(tmp_path / "run")) == 3
    codes, logs = _Job(file, tmp_path / "run", 2, 1, options).finish()
    assert codes == [0, 0], logs
    assert [re.findall("evaluated step (.)", text) for text in logs] == [["3", "6"]] * 2


@pytest.mark.slow
def test_hosts_that_do_not_see_one_folder_are_refused_at_the_start(file, tmp_path):
    codes, logs = _Job(file, tmp_path / "one", 2, 1, own={1: (f"--workdir={tmp_path / 'two'}",)}).finish()
    assert codes == [exit_codes.BAD_INPUT] * 2, logs
    assert f"process 1 on {socket.gethostname()} does not see what process 0 wrote there" in logs[0]
    assert "canvas" not in logs[0] and os.listdir(tmp_path / "one") == []


@pytest.mark.slow
def test_ctrl_c_on_one_host_stops_all(file, tmp_path):
    go = tmp_path / "go"
    job = _Job(file, tmp_path / "run", 2, 1, environment={0: {"PAUSE": f"2:{go}"}})
    job.wait_for(0, "paused")
    job.processes[0].send_signal(signal.SIGINT)
    go.touch()
    codes, logs = job.finish()
    assert codes == [exit_codes.CANCELLED] * 2, logs
    assert "SIGINT: saved step" in logs[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_job_with_its_name(file, tmp_path, victim):
    """The survivor waits inside a collective for the one that is killed."""
    job = _Job(file, tmp_path / "run", 2, 1, environment={victim: {"PAUSE": f"3:{tmp_path / 'never'}"}})
    job.wait_for(victim, "paused")
    pid = job.processes[victim].pid
    job.processes[victim].kill()
    begin = time.monotonic()
    codes, logs = job.finish()
    assert codes[1 - victim] == exit_codes.PEER_LOST, logs
    assert time.monotonic() - begin < 60, "long before jax's own 100 s of silence"
    assert f"train: process {victim} on {socket.gethostname()} (pid {pid}) died" in logs[1 - victim]
    assert "Traceback" not in logs[1 - victim]


@pytest.mark.processes
def test_hosts_that_differ_are_refused_with_the_difference(file, sources, tmp_path):
    """Another setting, other code and other data, all at once."""
    other = tmp_path / "boxes"
    shutil.copytree(sources["boxes"].path, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"licence": "', '"licence": "another'))
    own = {1: ("--config.optimizer.rate=0.5", f"--config.data.sources.boxes.path={other}")}
    codes, logs = _Job(file, tmp_path / "run", 2, 1, own=own, environment={1: {"CODE": "f" * 64}}).finish()
    assert codes == [exit_codes.BAD_INPUT] * 2, logs
    for text in logs:
        (line,) = [line for line in text.splitlines() if line.startswith("train: ")]
        assert "the processes differ from process 0 on" in line and "process 1 on" in line
        assert "config.optimizer.rate is 0.5, not 0.001" in line
        assert "the package's code is ffffffffffff, not " in line
        assert re.search(r"data.sources.boxes is 8 records, \w{12}, not 8 records, \w{12}", line)
    assert not (tmp_path / "run").exists(), "refused before anything was written"


def test_process_0_is_sent_messages_last():
    """A message may end it, before its thread has sent it to the others."""
    heard: list[int] = []
    coordinator: Any = object.__new__(_Coordinator)
    coordinator._connections = {
        index: SimpleNamespace(send=lambda index=index, **_: heard.append(index)) for index in (0, 2, 1)
    }
    coordinator._send_all(refused="")
    assert heard == [2, 1, 0]


@pytest.mark.processes
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_whose_others_do_not_come_ends_with_one_line(file, tmp_path, index):
    job = _Job(file, tmp_path / "run", 1, 1, ("--processes=2", f"--index={index}", "--patience=2"))
    codes, logs = job.finish()
    assert codes == [exit_codes.BAD_INPUT], logs
    (line,) = [line for line in logs[0].splitlines() if line]
    wanted = r"train: process {} of 2: the others did not come together in 2 s: start all of them with --coordinator=.*"
    assert re.fullmatch(wanted.format(index), line)


def test_announced_processes_must_be_joined(file, tmp_path, monkeypatch, capsys):
    assert announced({"SLURM_STEP_NUM_TASKS": "4"}) == (4, "SLURM_STEP_NUM_TASKS")
    assert announced({"TPU_WORKER_HOSTNAMES": "a,b"}) == (2, "TPU_WORKER_HOSTNAMES")
    assert announced({"TPU_WORKER_HOSTNAMES": "localhost", "SLURM_STEP_NUM_TASKS": "1"}) == (1, "")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert run_job("train", [f"--config={file}", f"--workdir={tmp_path}"]) == exit_codes.BAD_INPUT
    err = capsys.readouterr().err
    assert "SLURM_STEP_NUM_TASKS announces 4 processes, but --distributed is not given" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (ProcessGroup("host:1"), "--processes and --index not given"),
        (ProcessGroup("host:1", 2, 2), "--index=2: expected 0 to 1"),
        (ProcessGroup("host", 2, 1), "--coordinator=host: expected HOST:PORT"),
    ],
)
def test_a_half_given_process_group_is_refused(group, message):
    with pytest.raises(ProcessError, match=message):
        join(group)


def _clusters(count, facts=None, timeout=60.0):
    """Clusters of `count` members in threads of this process, or the error of each."""
    handshake: list[bytes] = []
    ready = threading.Event()

    def share(message):
        if message:
            handshake.append(message)
            ready.set()
        assert ready.wait(60)
        return handshake[0]

    found: list = [None] * count

    def meet(index):
        try:
            found[index] = Cluster(
                (facts or {}).get(index, {"a": "1"}), timeout=timeout, place=(index, count), share=share
            )
        except ProcessError as fault:
            found[index] = fault

    threads = [threading.Thread(target=meet, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_a_cluster_agrees_on_the_step_after_the_farthest():
    """Also if one is busy when another gets the signal, and continues only later."""
    clusters = _clusters(3)
    for cluster, steps in zip(clusters, (5, 6, 5)):
        assert [cluster.agreed(0, step) for step in range(1, steps + 1)] == [0] * steps
    assert clusters[2].agreed(signal.SIGTERM, 6) == 0
    deadline = time.monotonic() + 30
    while any(cluster._stop_at is None for cluster in clusters) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [clusters[0].agreed(0, step) for step in (6, 7)] == [0, signal.SIGTERM]
    assert clusters[1].agreed(0, 7) == clusters[2].agreed(0, 7) == signal.SIGTERM


@pytest.mark.parametrize("came_to", [None, 0, 2])
def test_a_signal_to_one_ends_the_evaluation_of_all(came_to):
    """Process 0 works longer than the others, which wait; whoever waits passes on the signal that comes to it."""
    clusters, heard = _clusters(3), threading.Event()
    clusters[0].on_stop = lambda number: heard.set()
    for cluster in clusters:
        assert cluster.agreed(0, 7) == 0
    found: list[Any] = [None] * 3

    def evaluate(index):
        sets = [clusters[index].met() for _ in range(2)]
        if index == 0 and came_to == 2:
            assert heard.wait(30), "it hears of it while it works"
        left = signal.SIGTERM if index == 0 and came_to is not None else 0
        received = signal.SIGTERM if index == came_to or left else 0
        found[index] = [*sets, clusters[index].met(left, lambda: received)]

    threads = [threading.Thread(target=evaluate, args=(index,)) for index in (1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[0, 0, 0 if came_to is None else signal.SIGTERM]] * 3
    assert [cluster._together(exit_codes.PREEMPTED) for cluster in clusters] == [came_to is not None] * 3


def test_who_has_not_seen_yet_that_all_met_goes_on_although_one_has_left_before_the_next_time():
    slow = _clusters(2)[1]
    slow._met, slow._leaving = 1, (signal.SIGTERM, 2)
    assert slow.met() == 0


def test_a_cluster_names_the_process_that_differs():
    found = _clusters(3, {1: {"a": "2"}, 2: {"a": "1", "b": "x"}})
    assert all(isinstance(each, ProcessError) for each in found)
    (text,) = {str(each) for each in found}
    assert re.search(r"process 1 on \S+ \(pid \d+\): a is 2, not 1 \| process 2 on .*: b is x, not absent;", text)


def test_slices_are_rows_of_data():
    """Devices of two slices, as multi-slice TPUs report them, in any order."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        process_index: int
        slice_index: int

    devices = [Device(n, n // 2, n % 2) for n in range(8)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    assert [[each.slice_index for each in row.flat] for row in mesh.devices] == [[0] * 4, [1] * 4]
    with pytest.raises(MeshError, match="the devices are of 2 slices.*mesh.data to be a multiple of 2"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)
    assert make_mesh(MeshConfig(), jax.devices()).shape["data"] == 8
