"""Checkpoints: saved and restored onto another mesh, newest kept, half-written ones ignored, damage and differences refused."""

import dataclasses
import json
import os
import re
import shutil
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from glip_jax.config import CheckpointConfig, Config, MeshConfig, OptimizerConfig, TrainConfig, flatten
from glip_jax.distributed.mesh import abstract, make_mesh, shardings
from glip_jax.io import checkpoint_reader, checksums, gcs
from glip_jax.io import workdir as workdir_module
from glip_jax.io.checkpoint import (
    CheckpointError,
    Checkpoints,
    Saved,
    complete_steps,
    fingerprint,
    latest_step,
    open_checkpoint,
    unfinished,
)
from glip_jax.io.workdir import check_config, check_shared, started_from, write_config
from glip_jax.training import optimizer as optim

EIGHT, TWO = MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=2)


def _saved(value: float) -> Saved:
    params = {
        "pyramid": {"lateral3": {"kernel": jnp.arange(64.0).reshape(1, 1, 8, 8) + value, "bias": jnp.ones(8) * value}},
        "text": {"embeddings": {"type": jnp.ones((2, 8))}},
    }
    ema = {"pyramid": jax.tree.map(lambda x: x + 1, params["pyramid"])}
    return Saved(params, optim.make_optimizer({}, 1, OptimizerConfig()).init(ema), ema)


def _equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.fixture
def workdir(tmp_path):
    mesh = make_mesh(EIGHT)
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for step in (1, 2, 3):
            saved = _saved(step)
            checkpoints.save(step, jax.device_put(saved, shardings(saved, mesh)), Config())
    return str(tmp_path)


def test_restored_onto_another_mesh(workdir):
    mesh = make_mesh(TWO, jax.devices()[:2])
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        restored = checkpoints.restore(3, abstract(_saved(0), mesh))
    assert _equal(restored, _saved(3))
    kernel = restored.params["pyramid"]["lateral3"]["kernel"]
    assert kernel.sharding.mesh.shape["fsdp"] == 2 and kernel.sharding.shard_shape(kernel.shape)[-1] == 4
    assert restored.optimizer.mu["pyramid"]["lateral3"]["kernel"].sharding == kernel.sharding


def test_the_newest_are_kept_and_read_without_a_model(workdir):
    assert latest_step(workdir) == 3
    raw, average = open_checkpoint(workdir).parameters("raw"), open_checkpoint(workdir).parameters("ema")
    assert _equal(raw, _saved(3).params)
    assert _equal(average["pyramid"], _saved(3).ema["pyramid"]) and _equal(average["text"], raw["text"])
    assert _equal(open_checkpoint(workdir, 2).parameters("raw"), _saved(2).params)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; there are: \[2, 3\]"):
        open_checkpoint(workdir, 1)
    assert open_checkpoint(workdir).settings["train.steps"] == Config().train.steps


def test_a_save_asks_nothing_of_the_preemption_service(tmp_path, monkeypatch):
    """Whose answer is the loop's alone, see `checkpoint._Manager`; Orbax asked three times a save, once in another thread."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _saved(step), Config())
    assert latest_step(str(tmp_path)) == 2 and not asked


def test_without_an_average(tmp_path):
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(5, _saved(5)._replace(ema={}), Config())
        checkpoints.wait()
        assert _equal(checkpoints.restore(5, _saved(0)._replace(ema={})).params, _saved(5).params)
        with pytest.raises(CheckpointError, match="holds no ema"):
            checkpoints.restore(5, _saved(0))
    assert _equal(open_checkpoint(str(tmp_path)).parameters("ema"), _saved(5).params)


def test_half_written_checkpoints_are_removed_and_logged(workdir, tmp_path, caplog):
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-17"
    (half / "params").mkdir(parents=True)
    assert unfinished(workdir) == [str(half)] and latest_step(workdir) == 3
    caplog.set_level("INFO")
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
    assert "4.orbax-checkpoint-tmp-17 was left half-written" in caplog.text
    assert not half.exists()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(str(folder), keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _saved(step), Config())
    return folder


def _array_file(step):
    return max((path for path in (step / "params" / "d").iterdir()), key=lambda path: path.stat().st_size)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "truncated": (lambda step: os.truncate(_array_file(step), 100), r"params/d/\w+ has 100 bytes, expected \d+"),
    "flipped": (lambda step: _flip(_array_file(step)), r"params/d/\w+ has other bytes than were written"),
    "an array's file": (lambda step: _array_file(step).unlink(), r"params/d/\w+ is missing"),
    "a part": (lambda step: shutil.rmtree(step / "optimizer"), r"optimizer/\S+ is missing, and \d+ more files"),
    "arrays' metadata": (lambda step: (step / "params" / "_METADATA").write_text("{"), r"params/_METADATA has 1 bytes"),
    "settings": (lambda step: (step / "run" / "metadata").unlink(), r"run/metadata is missing"),
    "Orbax' metadata": (
        lambda step: (step / "_CHECKPOINT_METADATA").write_text("{"),
        "_CHECKPOINT_METADATA is no JSON",
    ),
    "checksums": (lambda step: (step / "checksums.json").write_text("[]"), "checksums.json is no list"),
    "everything": (lambda step: (shutil.rmtree(step), step.mkdir()), "_CHECKPOINT_METADATA is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_used(three, tmp_path, caplog, damage):
    shutil.copytree(three, tmp_path / "run")
    workdir, folder = str(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    act, words = DAMAGES[damage]
    act(folder / "3")
    # A reader uses the one before and leaves the damaged one where it is.
    assert latest_step(workdir) == 2 and latest_step(workdir) == 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(rf"checkpoints/3 is damaged \({words}.*\): the one of step 2 is used", record.getMessage())
    if damage == "a part":  # the optimizer's files, which only training reads
        assert _equal(open_checkpoint(workdir).parameters("raw"), _saved(3).params)
    else:
        assert _equal(open_checkpoint(workdir).parameters("raw"), _saved(2).params)
        with pytest.raises(CheckpointError, match=rf"3 is damaged \({words}.*\): name another --step"):
            open_checkpoint(workdir, 3)
    caplog.set_level("INFO")
    with Checkpoints(workdir, keep=3) as checkpoints:
        assert checkpoints.latest() == 2
        assert _equal(checkpoints.restore(2, _saved(0)), _saved(2))
        checkpoints.save(3, _saved(4), Config())
    assert re.search(rf"checkpoint 3 is damaged \({words}.*\): set aside as \S+3.damaged, step 2 is used", caplog.text)
    assert (folder / "3.damaged").is_dir() and _equal(open_checkpoint(workdir).parameters("raw"), _saved(4).params)


def test_an_open_checkpoint_does_not_change_while_training_saves(tmp_path):
    workdir = str(tmp_path)
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _saved(step), dataclasses.replace(Config(), name=f"at {step}"), [f"line {step}"])
        checkpoints.wait()
        opened = open_checkpoint(workdir)
        checkpoints.save(3, _saved(3), dataclasses.replace(Config(), name="at 3"), ["line 3"])
        checkpoints.wait()
        assert open_checkpoint(workdir).step == 3
        assert (opened.step, opened.config.name, opened.lines) == (2, "at 2", ["line 2"])
        assert _equal(opened.parameters("raw"), _saved(2).params)
        assert opened.fingerprint() == fingerprint(_saved(2).params) != open_checkpoint(workdir).fingerprint()
        checkpoints.save(4, _saved(4), Config())
        checkpoints.wait()
        with pytest.raises(CheckpointError, match="checkpoints/2 was removed while it was read.*raise checkpoint.keep"):
            opened.parameters("raw")


def test_a_checkpoint_that_is_removed_during_the_search_is_skipped(workdir, tmp_path, monkeypatch):
    choose = checkpoint_reader.latest_step

    def removed_at_once(*arguments):
        step = choose(*arguments)
        if step == 3:
            shutil.rmtree(tmp_path / "checkpoints" / "3")
        return step

    monkeypatch.setattr(checkpoint_reader, "latest_step", removed_at_once)
    assert open_checkpoint(workdir).step == 2


def test_only_the_files_that_are_read_are_hashed(three, tmp_path, monkeypatch):
    shutil.copytree(three, tmp_path / "run")
    hashed, md5_of = [], gcs.md5_of

    def recording(path):
        hashed.append(path.relative_to(tmp_path / "run" / "checkpoints").parts[:2])
        return md5_of(path)

    monkeypatch.setattr(gcs, "md5_of", recording)
    opened = open_checkpoint(str(tmp_path / "run"), verify=())
    assert set(hashed) == {("3", "run")} and opened.step == 3
    opened.parameters("raw")
    assert set(hashed) == {("3", "run"), ("3", "params")}
    opened.parameters("ema")
    assert set(hashed) == {("3", "run"), ("3", "params"), ("3", "ema")}


def test_parameters_are_verified_when_they_are_read(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    _flip(_array_file(tmp_path / "run" / "checkpoints" / "3"))
    opened = open_checkpoint(str(tmp_path / "run"), verify=())
    with pytest.raises(CheckpointError, match="checkpoints/3 is damaged.*other bytes than were written"):
        opened.parameters("raw")


def test_a_path_may_name_the_step(workdir, monkeypatch):
    assert open_checkpoint(f"{workdir}/checkpoints/2").step == 2
    assert open_checkpoint(f"{workdir}/checkpoints/2/", 2).step == 2
    with pytest.raises(CheckpointError, match="is the checkpoint of step 2, and --step=3"):
        open_checkpoint(f"{workdir}/checkpoints/2", 3)
    monkeypatch.chdir(workdir)
    opened = open_checkpoint("checkpoints/2")
    assert (opened.workdir, opened.step) == (".", 2) and open_checkpoint(f"{workdir}/checkpoints/2").workdir == workdir


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(1, _saved(float("nan")), Config())
    with pytest.raises(CheckpointError, match="2 arrays are not finite, first .*lateral3.*the run diverged"):
        open_checkpoint(str(tmp_path)).parameters("raw")


def test_a_missing_item_makes_no_complete_checkpoint(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "_METADATA").write_text("{}")
    checksums.write(tmp_path, wanted=["params/_METADATA"])
    assert checksums.mismatch(tmp_path) == ""
    with pytest.raises(OSError, match="run/metadata was not written"):
        checksums.write(tmp_path, wanted=["params/_METADATA", "run/metadata"])


def test_if_all_are_damaged_they_are_named_and_kept(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    workdir, folder = str(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        os.truncate(_array_file(folder / str(step)), step)
    for act in (
        lambda: latest_step(workdir),
        lambda: Checkpoints(workdir, keep=3),
        lambda: open_checkpoint(workdir),
    ):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert re.search(
            r"only damaged.*step 1: params/d/\w+ has 1 bytes.*step 2: .*has 2 .*step 3: ", str(caught.value)
        )
    assert sorted(os.listdir(folder)) == ["1", "2", "3"]


def test_a_checkpoint_without_checksums_is_used_and_its_damage_is_one_line(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    workdir, folder = str(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        (folder / str(step) / "checksums.json").unlink()
    assert _equal(open_checkpoint(workdir).parameters("raw"), _saved(3).params)
    (folder / "3" / "params" / "manifest.ocdbt").write_bytes(b"no manifest")
    with Checkpoints(workdir, keep=3) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(3, _saved(0))
    assert "checkpoints/3 cannot be read (" in str(caught.value) and "before checksums" in str(caught.value)
    (folder / "3" / "params" / "manifest.ocdbt").unlink()
    assert latest_step(workdir) == 2


def test_the_best_and_every_nth_are_kept_beside_the_newest(tmp_path):
    policy = CheckpointConfig(keep_every=4, best=2, best_by="evaluation/set/AP")
    with Checkpoints(str(tmp_path), keep=1, policy=policy) as checkpoints:
        for step, score in enumerate((0.1, 0.9, 0.5, 0.2, 0.8, 0.3, 0.4), start=1):
            checkpoints.save(step, _saved(step), Config(), [f"line {step}"])
            checkpoints.scored(step, score)
        checkpoints.wait()
        assert checkpoints.lines(7) == ["line 7"]
    assert complete_steps(str(tmp_path)) == [2, 4, 5, 7]
    # Scores are kept by the run, which records them again when it resumes.
    with Checkpoints(str(tmp_path), keep=1, policy=policy) as checkpoints:
        for step, score in ((2, 0.9), (5, 0.8), (7, 0.4)):
            checkpoints.scored(step, score)
        checkpoints.save(8, _saved(8), Config())
        checkpoints.scored(8, 0.85)
        checkpoints.save(9, _saved(9), Config())
    assert complete_steps(str(tmp_path)) == [2, 4, 8, 9]


def test_no_checkpoint_is_one_message(tmp_path):
    assert latest_step(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint: expected a --workdir"):
        open_checkpoint(str(tmp_path))


def test_another_model_is_refused_with_the_list(workdir):
    other = _saved(0)
    other.params["pyramid"]["lateral4"] = other.params["pyramid"].pop("lateral3")
    other.params["text"]["embeddings"]["type"] = jnp.ones((2, 4))
    with Checkpoints(workdir, keep=2) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(3, abstract(other, make_mesh(TWO, jax.devices()[:2])))
    message = str(caught.value)
    assert "only in the checkpoint: pyramid/lateral3/kernel (1, 1, 8, 8)" in message
    assert "only in the model: pyramid/lateral4/bias (8,)" in message
    assert "text/embeddings/type: (2, 8) saved, (2, 4) wanted" in message


def test_differences_of_settings(workdir, tmp_path):
    with Checkpoints(workdir, keep=2) as checkpoints:
        saved = checkpoints.run(3)
    free = Config(train=TrainConfig(log_every=3), mesh=MeshConfig(fsdp=4))
    assert check_config(workdir, 3, saved, free, accept=False) == []
    changed = dataclasses.replace(Config(), train=TrainConfig(seed=9), optimizer=OptimizerConfig(rate=0.5))
    with pytest.raises(CheckpointError) as caught:
        check_config(workdir, 3, saved, changed, accept=False)
    message = str(caught.value)
    assert "optimizer.rate: 0.0001 -> 0.5" in message and "train.seed: 0 -> 9" in message
    assert "new --workdir" in message and "--resume-with-changes" in message
    for _ in range(2):  # the same phase twice is one phase
        assert len(check_config(workdir, 3, saved, changed, accept=True)) == 2
    assert json.loads((tmp_path / "phases.json").read_text()) == [
        {"step": 3, "differences": ["optimizer.rate: 0.0001 -> 0.5", "train.seed: 0 -> 9"]}
    ]


def test_a_file_of_the_working_folder_that_is_half_written_ends_no_resume(tmp_path, caplog):
    saved = dict(flatten(Config()))
    (tmp_path / "phases.json").write_text('[{"step": 1, "diff')
    (tmp_path / "started_from.json").write_text("")
    changed = dataclasses.replace(Config(), train=TrainConfig(seed=9))
    assert len(check_config(str(tmp_path), 3, saved, changed, accept=True)) == 1
    assert [phase["step"] for phase in json.loads((tmp_path / "phases.json").read_text())] == [3]
    assert (tmp_path / "phases.json.damaged").read_text() == '[{"step": 1, "diff'
    assert "phases.json is damaged (Unterminated string" in caplog.text and "set aside as" in caplog.text
    assert started_from(str(tmp_path)) is None and "started_from.json is damaged" in caplog.text


def test_a_folder_that_the_hosts_do_not_share_is_refused_with_their_names(tmp_path, monkeypatch):
    """Of two processes, as the second one sees it: the first one's folder is another, or is the same but cannot be written."""
    name, gathered = f".seen-from-{'0' * 16}", []

    def gather(row):
        gathered.append(bytes(row).decode().strip())
        return np.stack([np.frombuffer(b" " * 240, np.uint8), row])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    share = np.frombuffer(name.encode().ljust(32), np.uint8)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: share)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(workdir_module, "_VISIBLE_SECONDS", 0.1)
    host = re.escape(socket.gethostname())
    for folder in (tmp_path, tmp_path / "nowhere"):
        line = (
            f"is not one folder for all processes: process 1 on {host} does not see what process 0 wrote there: give a"
        )
        with pytest.raises(CheckpointError, match=line):
            check_shared(str(folder))
    (tmp_path / name).touch()
    check_shared(str(tmp_path))
    (tmp_path / f"{name}-1").mkdir()
    with pytest.raises(CheckpointError, match=f"process 1 on {host} cannot write there"):
        check_shared(str(tmp_path))
    assert gathered[2] == "" and os.listdir(tmp_path).count(name) == 1


def test_config_is_written_flat(tmp_path):
    write_config(str(tmp_path / "new"), Config())
    assert json.loads((tmp_path / "new" / "config.json").read_text())["data.short_sides"] == [480, 560, 640, 720, 800]
