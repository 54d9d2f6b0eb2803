"""Throughput, steps that hang, requested profiles, metrics for W&B."""

import ctypes
import dataclasses
import re
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from glip_jax.config import ConfigError, MeshConfig, validate
from glip_jax.distributed.mesh import make_mesh
from glip_jax.training import loop
from glip_jax.training.loop import train
from glip_jax.training.monitoring import chips, metrics, throughput, watchdog
from glip_jax.training.monitoring.flops import flops_per_image
from glip_jax.training.monitoring.profiler import Profiler
from glip_jax.training.monitoring.throughput import Throughput
from glip_jax.training.monitoring.watchdog import Watchdog
from tests import tiny_run
from tests.training import stand_in

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_run.config(tiny_run.write_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    stand_in.install(monkeypatch)
    return str(tmp_path / "run")


def test_mfu_is_of_the_steps_alone(config, monkeypatch):
    chip = chips.CHIPS["v5e"]._replace(flops=1e9)
    monkeypatch.setattr(throughput, "chip_of", lambda kind: chip)
    measured = Throughput(config, make_mesh(MeshConfig(data=2), jax.devices()[:2]))
    with measured.exclude("compile"):
        time.sleep(0.2)
    for canvas in ((64, 64), (64, 64), (64, 128)):
        measured.step(canvas, 16)
    numbers = measured.take({"steps": 3, "seconds": 3.2, "images_per_second": 7.5})
    assert numbers["step_seconds"] == pytest.approx(1.0, rel=0.05) and numbers["compile_seconds"] >= 0.2
    assert numbers["images_per_second_per_chip"] == 3.75
    flops = 8 * sum(flops_per_image(config.model, 64, width, 16).training for width in (64, 64, 128))
    assert numbers["mfu"] == pytest.approx(flops / 3.0 / 2e9, rel=0.05)
    assert measured.take({"steps": 1, "seconds": 1.0, "images_per_second": 8})["mfu"] == 0, (
        "the next window starts at 0"
    )
    progress, shown = metrics.Progress(0, 10), []
    monkeypatch.setattr(progress, "log", shown.append)
    known = {"loss": 1.0, "gradient_norm": 1.0, "images_per_second": 1.0, "positives": 1, "rate": 1e-4, "mfu": 0.4123}
    progress.window(5, known, ["a"])
    assert "mfu 41.2 %" in shown[0]


def test_memory_is_of_the_fullest_device(config, monkeypatch):
    devices = [
        types.SimpleNamespace(memory_stats=lambda n=n: {"bytes_in_use": n, "peak_bytes_in_use": 2 * n}) for n in (5, 7)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    numbers = Throughput(config, make_mesh(MeshConfig(), jax.devices()[:1])).take(
        {"steps": 1, "seconds": 1.0, "images_per_second": 8}
    )
    assert numbers["memory_bytes"] == 7 and numbers["memory_peak_bytes"] == 14 and "mfu" not in numbers


def test_a_step_that_hangs_leaves_the_stacks_and_a_line(config, workdir, tmp_path, monkeypatch, capsys):
    real, calls = loop.place_batch, []

    def slow(batch, mesh):
        calls.append(1)
        if len(calls) == 8:
            stuck_in_here()
        return real(batch, mesh)

    reported, report = threading.Event(), Watchdog._report

    def stuck_in_here():
        assert reported.wait(120), "as long as it takes on a busy machine"

    monkeypatch.setattr(Watchdog, "_report", lambda self, *how: (report(self, *how), reported.set()))
    monkeypatch.setattr(loop, "place_batch", slow)
    short = tiny_run.replace(config, "train", steps=9, hang_multiple=3.0, hang_min=1.0)
    assert int(train(short, workdir).step) == 9, "the run continues when the step does"
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "the usual is" in each]
    assert re.match(r"step 8 has taken \d+ s, the usual is \d\.\d\d s: it hangs", line)
    assert line.endswith(f"{workdir}/stacks.txt")
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    assert "stuck_in_here" in stacks and "in slow" in stacks and stacks.count("Thread 0x") > 2
    assert "Timeout (" not in stacks, (
        "faulthandler's thread reads the frames of running threads: a step that is slow crashed"
    )


def test_a_first_step_that_hangs_leaves_the_stacks_too(config, workdir, tmp_path, monkeypatch, capsys):
    """As when a host never reaches the first collective: the usual time is not known yet."""
    reported, report, real = threading.Event(), Watchdog._report, loop.place_batch

    def stuck_in_the_first_step(batch, mesh):
        assert reported.wait(120)
        return real(batch, mesh)

    monkeypatch.setattr(Watchdog, "_report", lambda self, *how: (report(self, *how), reported.set()))
    monkeypatch.setattr(loop, "place_batch", stuck_in_the_first_step)
    train(tiny_run.replace(config, "train", steps=1, hang_first=0.5, hang_min=1.0), workdir)
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "hangs" in each]
    assert line.startswith("step 1 has taken 0 s, with what is compiled for it (train.hang_first): it hangs")
    assert "stuck_in_the_first_step" in (tmp_path / "run" / "stacks.txt").read_text()


def test_a_compilation_has_a_limit(tmp_path, capsys):
    with Watchdog(epath.Path(tmp_path), 3.0, 0.2, 1.0, None) as running:
        with running.compiling():
            time.sleep(0.1)
        for step in range(7):
            running.heartbeat(step)
        assert not (tmp_path / "stacks.txt").read_text() and capsys.readouterr().err == ""
        with running.compiling():
            time.sleep(1.6)
        assert "test_a_compilation_has_a_limit" in (tmp_path / "stacks.txt").read_text()
    assert "step 7 has taken 1 s, with what is compiled for it" in capsys.readouterr().err
    with Watchdog(epath.Path(tmp_path), 3.0, 0.2, 60.0, None):
        pass
    assert "(above: step 7, " in (tmp_path / "stacks.txt").read_text(), "a restart appends"


def test_stacks_are_written_while_a_library_holds_the_interpreter_lock(tmp_path):
    with Watchdog(epath.Path(tmp_path), 3.0, 0.3, 60.0, None) as running:
        for step in range(7):
            running.heartbeat(step)
            time.sleep(0.01)
        # Through PyDLL the interpreter's lock is held: no Python runs meanwhile.
        ctypes.PyDLL(None).usleep(900_000)
        stacks = (tmp_path / "stacks.txt").read_text()
    assert "test_stacks_are_written_while" in stacks and "Timeout (" in stacks


def test_stacks_that_someone_removes_are_not_missed(tmp_path):
    """Those of a step that hangs later are written again."""
    file = tmp_path / "stacks.txt"
    with Watchdog(epath.Path(tmp_path), 3.0, 60.0, 60.0, None):
        file.unlink()
    assert not file.exists()
    with Watchdog(epath.Path(tmp_path), 3.0, 0.2, 0.3, None) as running:
        file.unlink()
        end = time.monotonic() + 30
        while not (file.exists() and "(above: step 1, " in file.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        assert "test_stacks_that_someone" in file.read_text()
        running.heartbeat(1)
    assert file.exists()


def test_a_pause_has_no_limit(tmp_path, capsys):
    with Watchdog(epath.Path(tmp_path), 3.0, 0.2, 60.0, None) as running:
        for step in range(7):
            running.heartbeat(step)
        with running.paused():
            time.sleep(0.6)
        running.heartbeat(8)
    assert capsys.readouterr().err == "" and not (tmp_path / "stacks.txt").exists()
    with Watchdog(epath.Path(tmp_path), 0.0, 0.2, 0.3, None) as running:
        for step in range(7):
            running.heartbeat(step)
        time.sleep(0.5)
    assert capsys.readouterr().err == "" and not (tmp_path / "stacks.txt").exists()


def test_profiles_by_setting_and_by_request(config, workdir, tmp_path, monkeypatch, capsys):
    made = []

    def start(folder):
        made.append(folder)
        (tmp_path / "run" / "tensorboard" / "made").write_text("x")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.0)
    real, calls = loop.place_batch, []

    def requesting(batch, mesh):
        calls.append(1)
        if len(calls) == 5:
            (tmp_path / "run" / "profile").write_text("2\n")
            until = time.monotonic() + 60
            while (tmp_path / "run" / "profile").exists() and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.2)
        return real(batch, mesh)

    monkeypatch.setattr(loop, "place_batch", requesting)
    train(tiny_run.replace(config, "train", steps=9, profile=(2, 3), hang_min=1.0), workdir)
    out = capsys.readouterr().out
    assert "steps 2 to 3 are profiled: tensorboard --logdir=" in out and "steps 6 to 7 are profiled" in out
    assert made == [f"{workdir}/tensorboard", "stop"] * 2
    assert "profile_seconds" in metrics.read(workdir)[1]


def test_a_profile_of_a_run_in_a_bucket_is_uploaded(tmp_path, monkeypatch):
    kept: dict[str, bytes] = {}
    profiler = Profiler(epath.Path("gs://bucket/run"), (), kept.__setitem__, lambda text: None)

    def start(folder):
        (epath.Path(folder) / "plugins").mkdir()
        (epath.Path(folder) / "plugins" / "host.xplane.pb").write_text("trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    profiler.start_if_due(3)
    assert not profiler.ends(3, True)
    profiler.start_if_due(4, requested=2)
    assert not profiler.ends(4, False) and profiler.ends(5, False) and profiler.ends(4, True)
    profiler.stop(5)
    assert kept == {"tensorboard/plugins/host.xplane.pb": b"trace"} and not profiler.ends(6, False)


class _Wandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.settings: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.broken = False

    def init(self, **settings):
        self.settings.append(settings)
        return self

    def log(self, metrics, step):
        if self.broken:
            raise ConnectionError("no route to host\nat all")
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.mark.slow
def test_metrics_are_logged_to_wandb_too(config, workdir, monkeypatch, capsys):
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tiny_run.replace(config, "train", steps=2, wandb="glip"), workdir)
    fake.broken = True
    named = tiny_run.replace(config, "train", steps=4, wandb="glip")
    assert int(train(named, workdir, resume_with_changes=True).step) == 4
    first, second = fake.settings
    assert first["project"] == "glip" and first["id"] == second["id"] and first["resume"] == "allow"
    assert first["config"]["optimizer.rate"] == 1e-3 and fake.finished == 2
    assert [step for step, _ in fake.logged] == [2]
    assert fake.logged[0][1]["loss"] == metrics.read(workdir)[0]["loss"]
    assert "metrics are no longer sent to wandb: ConnectionError: no route to host" in capsys.readouterr().out
    assert [line["step"] for line in metrics.read(workdir)] == [2, 4]


def test_wandb_that_starts_no_run_is_one_line(config, workdir, monkeypatch):
    fake = _Wandb()
    fake.Error = RuntimeError  # type: ignore[attr-defined]

    def init(**_):
        raise RuntimeError("api_key not configured\n(no-tty)")

    fake.init = init  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(
        ConfigError, match=r"W&B starts no run \(api_key not configured \(no-tty\)\): wandb login, or WANDB"
    ):
        train(tiny_run.replace(config, "train", wandb="glip"), workdir)


def test_without_wandb_it_is_one_line(config, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"train.wandb is 'glip', but wandb cannot be imported .*requirements-wandb.txt"
    ):
        train(tiny_run.replace(config, "train", wandb="glip"), workdir)
    assert not Path(workdir).exists(), "found before anything is written"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"profile": (3,)}, "train.profile is 3: expected the first and the last"),
        ("train", {"profile": (5, 2)}, "train.profile is 5,2"),
        ("train", {"hang_multiple": 0.5}, "hang_multiple is 0.5: expected 0, or more than 1"),
        ("train", {"hang_min": 0.0}, "hang_min is 0"),
        ("checkpoint", {"keep_every": 3}, "keep_every 3 is not a multiple of checkpoint.every 2"),
        ("checkpoint", {"best": 1}, "best_by '': expected evaluation/SET/NUMBER"),
        ("checkpoint", {"best": 1, "best_by": "evaluation/x/AP"}, r"evaluation/x/AP.*no set"),
    ],
)
def test_invalid_settings_are_refused(config, section, values, message):
    changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    with pytest.raises(ConfigError, match=message):
        validate(changed)
