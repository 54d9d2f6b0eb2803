"""The jobs `upload` and `verify`: into a bucket with faults and kills, and every kind of damage named."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from glip_jax.__main__ import main
from glip_jax.config import Config
from glip_jax.data import shards
from glip_jax.data.records import Record, boxes_array
from glip_jax.data.shards import Shards
from glip_jax.io import gcs
from glip_jax.io.checkpoint import Checkpoints
from tests.io.test_checkpoint import _saved

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("set") / "s"
    made = (Record(str(i), "detection", rng.bytes(60_000), 10, 20, boxes_array([])) for i in range(24))
    shards.write(made, place, name="s", shards=6)
    return place


@pytest.fixture
def target(running, tmp_path, monkeypatch) -> str:
    return running.fresh(monkeypatch, tmp_path / "cache", timeout=1.0, retry_seconds=60) + "/shards/s"


def test_sent_through_faults_and_nothing_twice(folder, target, running, capsys):
    with running.arm("503", "reset", "lost", "late", "truncate", share=0.3) as injected:
        assert main(["upload", str(folder), target]) == 0
    assert set(injected) == {"503", "reset", "lost", "late", "truncate"}
    assert "8 files, " in capsys.readouterr().out
    assert [Shards(target).read(i) for i in range(24)] == [Shards(folder).read(i) for i in range(24)]
    before = running.requests["POST upload"]
    assert main(["upload", str(folder), target]) == 0
    assert "sent 0 (0 bytes" in capsys.readouterr().out and running.requests["POST upload"] == before
    assert main(["verify", target, str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"{target}: 7 files as the manifest says, 24 records" in output and f"{folder}: 7 files" in output


def test_killed_in_the_middle_the_same_command_goes_on(folder, target, running, capsys):
    command = [sys.executable, "-m", "glip_jax", "upload", str(folder), target]
    with running.arm("slow", "stall", share=0.9, only="/upload/", stall=0.8):
        child = subprocess.Popen(command, cwd=ROOT)
        until = time.monotonic() + 90
        while len(gcs.list_files(target)) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        child.kill()
        child.wait()
    time.sleep(1.6)  # the storage holds back what was on its way, which ends later
    there = gcs.list_files(target)
    assert 2 <= len(there) < 8 and "manifest.json" not in there
    assert main(["verify", target]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    before = running.requests["POST upload"]
    assert main(["upload", str(folder), target]) == 0
    assert running.requests["POST upload"] - before == 8 - len(there), "what is there is not sent again"
    assert f"{len(there)} were there" in capsys.readouterr().out
    assert shards.verify(target)


def test_damage_is_named_here_and_there_and_never_sent(folder, target, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "s")
    first, second = sorted((tmp_path / "s").glob("*.array_record"))[:2]
    data = bytearray(first.read_bytes())
    data[1000] ^= 1
    first.write_bytes(data)
    second.unlink()
    assert main(["upload", str(tmp_path / "s"), target]) == 2
    line = capsys.readouterr().err
    assert f"{first}: sha256 is" in line and "(and 1 more files): nothing was sent" in line
    assert gcs.list_files(target) == {}
    assert main(["verify", str(tmp_path / "s")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and f"verify: {second} is missing" in lines[1]
    assert main(["upload", str(folder), target]) == 0
    gcs.put(f"{target}/{first.name}", bytes(data))
    capsys.readouterr()
    assert main(["verify", target]) == 2
    assert f"verify: {target}/{first.name}: sha256 is" in capsys.readouterr().err


def test_nothing_that_is_there_is_changed(folder, target, tmp_path, capsys):
    gcs.put(f"{target}/else.txt", b"mine")
    assert main(["upload", str(folder), target]) == 2
    assert "holds 1 files of another build (else.txt)" in capsys.readouterr().err
    gcs.remove(f"{target}/else.txt")
    assert main(["upload", str(folder), target]) == 0
    shutil.copytree(folder, tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest | {"licence": "other", "command": "x"}))
    capsys.readouterr()
    assert main(["upload", str(tmp_path / "s"), target]) == 2
    assert "is another finished folder (its manifest differs in licence, command)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upload"], "expected a folder and where it goes"),
        (["upload", "x", "y"], "expected a local folder, then gs://BUCKET/FOLDER"),
        (["upload", "/nowhere", "gs://bucket/x"], "/nowhere does not exist: expected a folder of shards"),
        (["verify"], "nothing to verify"),
        (["verify", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_checkpoints_are_verified_as_well(tmp_path, capsys):
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _saved(step), Config())
    assert main(["verify", str(tmp_path)]) == 0
    assert f"{tmp_path}: checkpoints as they were written: 1, 2" in capsys.readouterr().out
    (tmp_path / "checkpoints/2/run/metadata").write_text("")
    assert main(["verify", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "as they were written: 1\n" in output.out
    assert "verify: " in output.err and "checkpoints/2 is damaged (run/metadata has 0 bytes" in output.err
