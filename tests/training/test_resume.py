"""The job in a subprocess: killed in the middle, the same command ends with the same bits."""

import os
import re
import signal
import subprocess
import sys

import pytest

from glip_jax.io.checkpoint import latest_step
from glip_jax.training.monitoring import metrics
from tests import tiny_run


def _start(config, workdir, *options):
    """The job with the stand-in network, on one device: meshes are test_cluster's."""
    command = [sys.executable, "-m", "tests.distributed.worker", f"--config={config}", f"--workdir={workdir}"]
    command += ["--config.train.log_every=1", *options]
    flags = {"XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **flags}
    )


def _finish(config, workdir, *options):
    process = _start(config, workdir, *options)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def _fingerprint(out):
    return re.findall(r"fingerprint: ([0-9a-f]{64})", out)[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return tiny_run.config_file(folder, tiny_run.write_sources(folder))


@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_bits(config, tmp_path):
    code, straight, err = _finish(config, tmp_path / "straight", "--config.train.draw_first_batch=True")
    assert code == 0, err
    assert (tmp_path / "straight" / "first_batch.png").stat().st_size > 1000

    process = _start(config, tmp_path / "killed")
    for line in process.stdout or ():
        if line.startswith("step 5/6"):
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    code, resumed, err = _finish(config, tmp_path / "killed")
    assert code == 0, err
    start = int(re.findall(r"resuming at step (\d+)", resumed)[0])
    assert start in (2, 4), "a checkpoint every 2 steps"
    assert _fingerprint(resumed) == _fingerprint(straight)
    lines = {name: metrics.read(str(tmp_path / name)) for name in ("straight", "killed")}
    assert [line["step"] for line in lines["killed"]] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines["killed"]] == [line["loss"] for line in lines["straight"]]

    # A finished run refuses other settings in one message.
    code, _, err = _finish(config, tmp_path / "killed", "--config.optimizer.rate=0.5")
    assert code == 2 and "optimizer.rate: 0.001 -> 0.5" in err and "Traceback" not in err
    assert latest_step(str(tmp_path / "killed")) == 6


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.data.sources.boxes.path=/nowhere", "data.sources.boxes: "),
        ("--config.mesh.data=3", "mesh is"),
        ("--config.train.stpes=3", "did you mean --config.train.steps"),
    ],
)
def test_mistakes_give_code_2_and_one_message(config, tmp_path, option, message, capsys):
    from tests.run_job import run_job

    assert run_job("train", [f"--config={config}", f"--workdir={tmp_path}", option]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train: ") and message in err
