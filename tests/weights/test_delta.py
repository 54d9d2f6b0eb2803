"""Deltas: what differs from the base is saved, opened on its base only, and accepted wherever a checkpoint is."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath

from glip_jax.__main__ import main
from glip_jax.config import flatten
from glip_jax.io.checkpoint_reader import Checkpoint, fingerprint
from glip_jax.io.workdir import CheckpointError
from glip_jax.training import optimizer as optim
from glip_jax.training.finetuning.modes import tuned_config
from glip_jax.weights.delta import is_delta, open_delta, save_delta
from glip_jax.weights.names import WeightError
from glip_jax.weights.readers import open_checkpoint_or_export
from glip_jax.weights.tuned_parameters import starting_parameters
from tests import tiny_run

pytestmark = pytest.mark.compiles


def checkpoint(config, params, folder):
    """A base that lies nowhere."""
    return Checkpoint(str(folder), epath.Path(folder), None, dict(flatten(config)), (), lambda _: params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A delta of the mode `lora`: (folder, base, config, parameters)."""
    folder, base_config = tmp_path_factory.mktemp("deltas"), tiny_run.config()
    (folder / "base").mkdir()
    base = checkpoint(base_config, tiny_run.parameters(base_config.model), folder / "base")
    config = tuned_config(base_config, "lora", rank=2)
    # A job may fit the length of prompts to its names.
    config = tiny_run.replace(config, "model", text=dataclasses.replace(config.model.text, max_tokens=12))
    params = starting_parameters(tiny_run.parameters(config.model, seed=6), base.parameters("raw"), config)
    counts = save_delta(str(folder / "delta"), "lora", params, config, base, "raw")
    assert counts["arrays"] == 4 * 2 * 2 + 6 * 2, "the low-rank matrices and nothing else"
    return folder / "delta", base, config, params


def test_a_delta_is_opened_on_its_base(saved):
    folder, base, config, params = saved
    assert is_delta(str(folder)) and not is_delta(str(base.path))
    assert sum(file.stat().st_size for file in folder.iterdir()) < sum(
        leaf.nbytes for leaf in optim.flat(params).values()
    )
    opened = open_delta(str(folder), lambda path: base if path == str(base.path) else pytest.fail(path))
    assert opened.config == config and opened.step is None
    assert fingerprint(opened.parameters()) == opened.fingerprint() == fingerprint(params)
    assert json.loads((folder / "delta.json").read_text())["fingerprint"] == fingerprint(params)


def test_a_delta_refuses_another_base(saved):
    folder, base, _, _ = saved
    other = checkpoint(base.config, tiny_run.parameters(base.config.model, seed=7), base.path)
    with pytest.raises(CheckpointError) as raised:
        open_delta(str(folder), lambda _: other).parameters()
    for params in (base.parameters("raw"), other.parameters("raw")):
        assert fingerprint(params) in str(raised.value)
    wide = dataclasses.replace(base.config.model.head, blocks=2)
    network = checkpoint(tiny_run.replace(base.config, "model", head=wide), {}, base.path)
    with pytest.raises(CheckpointError, match=r"another network.*model\.head\.blocks: 2 -> 1"):
        open_delta(str(folder), lambda _: network)


def test_a_delta_that_is_damaged_or_alone_is_refused(saved, tmp_path):
    _, base, _, _ = saved
    folder = tmp_path / "delta"
    shutil.copytree(saved[0], folder)
    (folder / "delta.safetensors").write_bytes((folder / "delta.safetensors").read_bytes()[:-1])
    with pytest.raises(WeightError, match="delta.safetensors is not as it was written"):
        open_delta(str(folder), lambda _: base).parameters()
    with pytest.raises(CheckpointError, match=rf"delta on {base.path}.*cannot be opened.*holds no complete checkpoint"):
        open_checkpoint_or_export(str(folder))
    with pytest.raises(CheckpointError, match="is a delta, which has no steps"):
        open_checkpoint_or_export(str(folder), 3)
    (folder / "delta.json").write_text("{}")
    with pytest.raises(WeightError, match="no description of a delta"):
        open_checkpoint_or_export(str(folder))


@pytest.mark.slow
def test_export_merges_the_low_rank_deltas_of_a_delta(trained, tmp_path, capsys):
    """The job compares the file with the network of base and delta."""
    base = open_checkpoint_or_export(str(trained.workdir))
    config = tuned_config(base.config, "lora", rank=2)
    begin = base.parameters("ema")
    leaves = optim.flat(starting_parameters(tiny_run.parameters(config.model), begin, config))
    for path in leaves:
        if path.endswith("_lora_b"):
            leaves[path] = np.full_like(leaves[path], 0.01)
    folder = tmp_path / "delta"
    save_delta(str(folder), "lora", optim.nested(leaves), config, base, "ema")
    assert main(["export", f"--checkpoint={folder}", f"--out={tmp_path / 'model'}", "--format=huggingface"]) == 0
    assert "a delta on its base" in capsys.readouterr().out
    exported = open_checkpoint_or_export(str(tmp_path / "model"))
    assert exported.config.model.lora.rank == 0
    assert fingerprint(exported.parameters()) != fingerprint(begin)
