"""Several processes on loopback train as one: same batches, same parameters, a common stop, and the report of a death.

The network is the stand-in, which compiles in a second; data, loop, checkpoints and exits are the real ones. What needs no training
runs in `tests.distributed.joined`.
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

import jax
import numpy as np
import pytest
from PIL import Image

from glip_jax.config import MeshConfig
from glip_jax.data.mixture import Mixture
from glip_jax.distributed import cluster, exit_codes
from glip_jax.distributed.cluster import Cluster, Member, ProcessError, ProcessGroup, announced, check_alike, join
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
HEARTBEAT = 10
"""Seconds, where a death is awaited; elsewhere the default, for a machine under load."""
NOTICED = 2.5
"""Seconds until all processes know that one received SIGTERM, of which jax's service looks once a second."""
LOST = (exit_codes.PEER_LOST, -signal.SIGABRT)
"""How a process ends that finds another one gone: by a collective that fails, or by jax's service."""


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


class _Processes:
    """Processes of one job, each with its own options and environment."""

    def __init__(self, module, arguments, number, devices, own=(), environment=()):
        where, own, environment = f"127.0.0.1:{_port()}", dict(own), dict(environment)
        self.processes, self.lines = [], [[] for _ in range(number)]
        for index in range(number):
            command = [sys.executable, "-m", module, *arguments, f"--coordinator={where}", f"--processes={number}",
                       f"--index={index}", f"--patience={TIMEOUT}", *own.get(index, ())]  # fmt: skip
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


class _Job(_Processes):
    """Training."""

    def __init__(self, file, workdir, number, devices, options=(), own=(), environment=()):
        arguments = [f"--config={file}", f"--workdir={workdir}", "--config.train.log_every=1"]
        own = {
            index: [*options, *dict(own).get(index, ())] for index in range(number)
        }  # the last of several flags counts
        super().__init__("tests.distributed.worker", arguments, number, devices, own, environment)


class _Joined(_Processes):
    """Work without training, in processes of one device that are all at work."""

    def __init__(self, work, number, *options):
        super().__init__("tests.distributed.joined", [work, *options], number, 1)

    def signal(self, index, number):
        for each in range(len(self.processes)):
            self.wait_for(each, "ready")
        self.processes[index].send_signal(number)


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
    time.sleep(NOTICED)
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
    """To one that has finished its share and waits for the other; the rest is `test_a_signal_to_one_leaves_the_evaluation_of_all`'s."""
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
    time.sleep(NOTICED)
    go.touch()
    codes, logs = job.finish()
    assert codes == [exit_codes.CANCELLED] * 2, logs
    assert "SIGINT: saved step" in logs[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_job(file, tmp_path, victim):
    """The survivor waits inside a collective of a step for the one that is killed."""
    pause = {victim: {"PAUSE": f"3:{tmp_path / 'never'}"}}
    job = _Job(file, tmp_path / "run", 2, 1, (f"--heartbeat={HEARTBEAT}",), environment=pause)
    job.wait_for(victim, "paused")
    job.processes[victim].kill()
    begin = time.monotonic()
    codes, logs = job.finish()
    assert codes[1 - victim] in LOST, logs
    assert time.monotonic() - begin < 60, "long before jax's own 100 s of silence"
    assert "train: another process died" in logs[1 - victim] or "another task died" in logs[1 - victim]
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


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(2, "SIGTERM", exit_codes.PREEMPTED), pytest.param(4, "SIGINT", exit_codes.CANCELLED, marks=pytest.mark.slow)],
)
def test_a_signal_to_one_stops_all_after_the_same_step(number, kind, code):
    """Each works at a speed of its own, without waiting for another."""
    job = _Joined("steps", number)
    job.signal(number - 1, signal.Signals[kind])
    codes, logs = job.finish()
    assert codes == [code] * number, logs
    (stopped,) = {re.findall(r"^stopped after step (\d+) (\w+)$", text, re.MULTILINE)[0] for text in logs}
    assert stopped[1] == kind


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "came_to", "kind", "code"),
    [
        (2, 1, "SIGTERM", exit_codes.PREEMPTED),
        pytest.param(3, 0, "SIGHUP", exit_codes.PREEMPTED, marks=pytest.mark.slow),
        pytest.param(4, 0, "SIGINT", exit_codes.CANCELLED, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_leaves_the_evaluation_of_all(number, came_to, kind, code):
    """Process 0 never ends its share; the others wait for it."""
    job = _Joined("evaluation", number)
    job.signal(came_to, signal.Signals[kind])
    codes, logs = job.finish()
    assert codes == [code] * number, logs
    assert all(f"stopped in the evaluation {kind}" in text for text in logs)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "kind"), [(0, "SIGKILL"), (1, "SIGKILL"), (1, "SIGSTOP")])
def test_a_process_that_is_gone_or_silent_ends_those_that_sleep_or_wait(victim, kind):
    job = _Joined("waiting", 3, f"--heartbeat={HEARTBEAT}")
    job.signal(victim, signal.Signals[kind])
    begin = time.monotonic()
    others = [index for index in range(3) if index != victim]
    assert {job.processes[index].wait(TIMEOUT) for index in others} <= {*LOST}
    assert time.monotonic() - begin < 3 * HEARTBEAT
    job.processes[victim].kill()
    _, logs = job.finish()
    for index in others:
        assert "train: another process died" in logs[index] or "another task died" in logs[index]
        assert "Traceback" not in logs[index]
    assert f"process {victim} on {socket.gethostname()} (pid {job.processes[victim].pid})" in logs[victim]


@pytest.mark.slow
def test_a_process_that_fails_keeps_its_code_and_ends_the_others():
    codes, logs = _Joined("one_fails", 3, f"--heartbeat={HEARTBEAT}").finish()
    assert codes[1] == exit_codes.BAD_INPUT and codes[0] in LOST and codes[2] in LOST, logs
    assert "train: a file is missing here" in logs[1] and "Traceback" not in "".join(logs)


@pytest.mark.slow
def test_processes_that_fail_alike_all_end_with_the_code():
    codes, logs = _Joined("all_fail", 3).finish()
    assert codes == [exit_codes.BAD_INPUT] * 3, logs
    assert all(text.splitlines()[-1] == "train: a file is missing everywhere" for text in logs)


class _Service:
    """jax's preemption service and collectives for threads of this process: what `Cluster` sees of them."""

    def __init__(self, number, monkeypatch):
        self._counts, self.sync = [0] * number, 0
        self._own, self._lock, self._rows = threading.local(), threading.Lock(), [np.zeros(3, np.int32)] * number
        self._barrier = threading.Barrier(number)
        monkeypatch.setattr(cluster.multihost_utils, "reached_preemption_sync_point", self._reached)
        monkeypatch.setattr(cluster.multihost_utils, "process_allgather", self._gather)

    def notice(self):
        with self._lock:
            self.sync = max(self._counts) + 1

    def _reached(self, count):
        with self._lock:
            self._counts[self._own.index] = count
            return count == self.sync

    def _gather(self, row):
        self._rows[self._own.index] = row
        self._barrier.wait(30)
        rows = np.stack(self._rows)
        self._barrier.wait(30)
        return rows

    def run(self, work):
        """What `work` of (index, cluster) returns in each."""
        found: list = [None] * len(self._rows)

        def start(index):
            self._own.index = index
            found[index] = work(index, Cluster())

        threads = [threading.Thread(target=start, args=(index,)) for index in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


@pytest.mark.parametrize("noticed_at", [0.0, 0.1, 0.4, 0.99, 1.5])
def test_all_stop_at_one_count_also_where_evaluations_count_seconds(noticed_at, monkeypatch):
    """A notice while processes evaluate, some of which have counted further, or as they end, stops all there or after the next step."""
    service = _Service(3, monkeypatch)

    def work(index, joined):
        if index == 0:
            threading.Timer(noticed_at, service.notice).start()
        for step in range(1, 200):
            if joined.agreed():
                return step, "step"
            end = time.monotonic() + 0.3 * (index + 1) * (step == 3)
            joined._since -= index  # as if it had begun so many seconds before process 0
            if index == 2 and step == 3:  # as if a batch had taken ten seconds
                time.sleep(0.25)
                joined._since -= 10
            while time.monotonic() < end and not joined.asked():
                time.sleep(0.01)
            if joined.met(signal.SIGINT * (index == 1)):
                return step, "evaluation"
            time.sleep(0.005)
        return "never"

    found = service.run(work)
    assert found[0] != "never" and len(set(found)) == 1, found


def test_a_signal_is_that_of_whom_it_came_to(monkeypatch):
    service = _Service(3, monkeypatch)
    service.sync = 2

    def work(index, joined):
        kind = kinds[index]
        return [joined.agreed(), joined.met(kind), joined.agreed(), joined.met(kind), joined.met(0)]

    kinds = [0, signal.SIGINT, signal.SIGHUP]
    assert service.run(work) == [[False, 0, True, signal.SIGINT, signal.SIGINT]] * 3
    kinds = [0, 0, 0]
    assert service.run(work) == [[False, 0, True, signal.SIGTERM, signal.SIGTERM]] * 3


def test_processes_that_differ_are_named():
    members = [
        Member(index, "host", 7 + index, facts)
        for index, facts in enumerate([{"a": "1"}, {"a": "2"}, {"a": "1", "b": "x"}, {"a": "1"}])
    ]
    check_alike([members[0], members[3]])
    with pytest.raises(ProcessError) as fault:
        check_alike(members)
    assert (
        str(fault.value)
        == "the processes differ from process 0 on host (pid 7): process 1 on host (pid 8): a is 2, not 1 | "
        "process 2 on host (pid 9): b is x, not absent; give all hosts the same command, code and data"
    )


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
