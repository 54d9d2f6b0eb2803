"""Checkpoints: there and back onto another mesh, newest kept, half-written ones ignored, differences refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Saved,
    check_config,
    latest_step,
    restore_parameters,
    saved_config,
    unfinished,
    write_config,
)
from glip_jax.config import Config, MeshConfig, OptimizerConfig, TrainConfig
from glip_jax.parallel import abstract, make_mesh, shardings
from glip_jax.training import optimizer as adamw

EIGHT, TWO = MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=2)


def _saved(value: float) -> Saved:
    params = {
        "pyramid": {"lateral3": {"kernel": jnp.arange(64.0).reshape(1, 1, 8, 8) + value, "bias": jnp.ones(8) * value}},
        "text": {"embeddings": {"type": jnp.ones((2, 8))}},
    }
    ema = {"pyramid": jax.tree.map(lambda x: x + 1, params["pyramid"])}
    return Saved(params, adamw.init(ema, OptimizerConfig()), ema)


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
    raw, average = restore_parameters(workdir, "raw"), restore_parameters(workdir, "ema")
    assert _equal(raw, _saved(3).params)
    assert _equal(average["pyramid"], _saved(3).ema["pyramid"]) and _equal(average["text"], raw["text"])
    assert _equal(restore_parameters(workdir, "raw", step=2), _saved(2).params)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; there are: \[2, 3\]"):
        restore_parameters(workdir, step=1)
    assert saved_config(workdir)["train.steps"] == Config().train.steps


def test_without_an_average(tmp_path):
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(5, _saved(5)._replace(ema={}), Config())
        checkpoints.wait()
        assert _equal(checkpoints.restore(5, _saved(0)._replace(ema={})).params, _saved(5).params)
        with pytest.raises(CheckpointError, match="holds no ema"):
            checkpoints.restore(5, _saved(0))
    assert _equal(restore_parameters(str(tmp_path), "ema"), _saved(5).params)


def test_half_written_ones_are_ignored_and_it_is_said(workdir, tmp_path, capsys):
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-17"
    (half / "params").mkdir(parents=True)
    assert unfinished(workdir) == [str(half)] and latest_step(workdir) == 3
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
    assert "4.orbax-checkpoint-tmp-17 was left half-written" in capsys.readouterr().out
    assert not half.exists()


def test_no_checkpoint_is_one_message(tmp_path):
    assert latest_step(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint: expected a --workdir"):
        restore_parameters(str(tmp_path))


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


def test_config_is_written_flat(tmp_path):
    write_config(str(tmp_path / "new"), Config())
    assert json.loads((tmp_path / "new" / "config.json").read_text())["data.short_sides"] == [480, 560, 640, 720, 800]
