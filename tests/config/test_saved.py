"""Files that the code before the renaming wrote are opened: checkpoint, metrics, evaluation, export, shards, settings file."""

import dataclasses
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from glip_jax.cli import evaluate, import_weights
from glip_jax.cli.command_line import CommandLineError, load_config, parse
from glip_jax.config import (
    RENAMED_KEYS,
    Config,
    CropConfig,
    MeshConfig,
    current_name,
    current_names,
    differences,
    first_names,
    flatten,
    resumed,
    unflatten,
)
from glip_jax.data.scenes.draw import SceneStyle
from glip_jax.data.shards import Shards, verify
from glip_jax.distributed.mesh import make_mesh
from glip_jax.io import provenance
from glip_jax.io.checkpoint import Checkpoints, Saved, fingerprint, open_checkpoint
from glip_jax.io.workdir import CheckpointError, check_config, check_network
from glip_jax.training.monitoring import metrics
from glip_jax.training.state import abstract_state

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "old_run" / "old_run.tar.xz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder in which the old code ran, as current folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_goes_on_with_its_settings(old):
    saved = json.loads(Path("run/config.json").read_text())
    assert {"data.crop.least_side", "data.sources.web.captions.least_score", "train.hang_least"} <= saved.keys()
    assert current_names(saved) == open_checkpoint("run").settings
    config = unflatten(saved)
    assert config.data.crop == CropConfig(0.5, min_side=0.7, min_visible=0.3)
    assert config.data.sources["web.captions"].threshold == 0.3 and config.train.hang_min == 60.0
    assert differences(saved, config) == [] and check_config("run", 2, saved, config, accept=False) == []
    check_network("run", saved, config)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, crop=CropConfig(0.5, 0.6, 0.3)))
    assert differences(saved, other) == ["data.crop.min_side: 0.7 -> 0.6"]
    with pytest.raises(CheckpointError, match=r"data.crop.min_side: 0.7 -> 0.6"):
        check_config("run", 2, saved, other, accept=False)


def test_a_run_that_began_without_the_ramp_of_the_averages_resumes_without_it(old):
    saved = json.loads(Path("run/config.json").read_text())
    as_then = unflatten(saved)
    command = dataclasses.replace(as_then, optimizer=dataclasses.replace(as_then.optimizer, ema_ramp=True))
    assert "optimizer.ema_ramp" not in saved and not as_then.optimizer.ema_ramp
    assert resumed(saved, command) == as_then and check_config("run", 2, saved, as_then, accept=False) == []
    # The run goes on as saved by this version, and is resumed by the same command again.
    assert resumed(dict(flatten(as_then)), command) == as_then
    assert resumed(dict(flatten(command)), command) == command
    assert provenance.config_hash(as_then) == provenance.config_hash(saved) != provenance.config_hash(command)


@pytest.mark.compiles
def test_parameters_and_moments_are_read(old):
    config = unflatten(open_checkpoint("run").settings)
    raw, averages = open_checkpoint("run").parameters("raw"), open_checkpoint("run").parameters("ema")
    assert fingerprint(raw) != fingerprint(averages)
    recorded = json.loads(Path("run/evaluation.json").read_text())["hashes"]
    assert (fingerprint(raw), fingerprint(averages)) == (recorded["checkpoint"], recorded["parameters"])
    like = abstract_state(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    with Checkpoints("run", 1) as checkpoints:
        state = checkpoints.restore(2, Saved(like.params, like.optimizer, like.ema))
    assert fingerprint(state.params) == recorded["checkpoint"]
    assert any(np.any(moment) for moment in jax.tree.leaves(state.optimizer))


def test_metrics_are_read_under_todays_names(old):
    old_lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    assert all("boxes_unsure" in line for line in old_lines)
    lines = metrics.read("run")
    names = {"dropped/boxes_below_threshold", "source/web.captions/dropped/boxes_below_threshold"}
    assert all(line.keys() >= names and line["dropped/boxes_below_threshold"] > 0 for line in lines)
    # A resumed run writes the file again, with the lines that its checkpoint kept, each once.
    kept = metrics.cut_back("run", 2, also=old_lines)
    assert [json.loads(line)["step"] for line in kept] == [1, 2] and not any("unsure" in line for line in kept)


def test_an_unchanged_evaluation_is_done(old, monkeypatch, capsys):
    recorded = json.loads(Path("run/evaluation.json").read_text())
    # Code and libraries are others than those of then, which is a reason of its own to evaluate again.
    monkeypatch.setattr(provenance, "code", lambda: recorded["hashes"]["code"])
    monkeypatch.setattr(provenance, "versions", lambda: recorded["versions"])
    Path("run/report.html").touch()
    Path("now.py").write_text(
        "import json\nfrom glip_jax.config import unflatten\n\n\n"
        "def get_config():\n    return unflatten(json.load(open('run/config.json')))\n"
    )
    assert evaluate.main(["--config=now.py", "--workdir=run", "--unless-done"]) == 0
    assert "is evaluated" in capsys.readouterr().out


@pytest.mark.compiles
def test_an_export_is_imported(old, capsys):
    assert import_weights.main(["export", "--workdir=imported"]) == 0, capsys.readouterr().err
    assert fingerprint(open_checkpoint("imported").parameters("raw")) == fingerprint(
        open_checkpoint("run").parameters("ema")
    )
    settings, trained = unflatten(open_checkpoint("imported").settings), unflatten(open_checkpoint("run").settings)
    assert (settings.data, settings.train) == (trained.data, trained.train)


def test_shards_are_opened(old):
    shards = Shards("shards")
    assert len(shards) == 3 and verify("shards")
    assert shards[1].id == "p1" and shards[1].scores == pytest.approx((0.9, 0.2))


def test_an_old_settings_file_is_told_the_new_name(old):
    with pytest.raises(CommandLineError, match=r"settings.py, line \d+: .*'least_score'; least_score is now threshold"):
        load_config("settings.py")


def test_old_names_work_on_the_command_line(tmp_path, caplog):
    (tmp_path / "x.py").write_text(
        "from glip_jax.config import Config, DataConfig, SourceConfig\n\n\n"
        "def get_config():\n    return Config(data=DataConfig(sources={'a.b': SourceConfig('a')}))\n"
    )
    given = ["--config.data.crop.least-side=0.75", "--config.data.sources.a.b.least_score=0.25"]
    config = parse([f"--config={tmp_path / 'x.py'}", *given]).config
    assert config.data.crop.min_side == 0.75 and config.data.sources["a.b"].threshold == 0.25
    assert "use --config.data.crop.min_side" in caplog.text


def test_the_table_renames_to_what_exists_and_back():
    fields = {name for name, _ in flatten(Config())} | {"data.sources.*.threshold", *vars(SceneStyle())}
    for old, new in RENAMED_KEYS.items():
        assert "/" in new or new in fields
        old, new = old.replace("*", "a.least_score"), new.replace("*", "a.least_score")
        assert current_name(old) == current_name(new) == new
        assert current_names({old: 1}) == {new: 1} and first_names({new: 1}) == first_names({old: 1}) == {old: 1}
    assert provenance.config_hash({"data.crop.least_side": 1}) == provenance.config_hash({"data.crop.min_side": 1})
